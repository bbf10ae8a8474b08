"""PASCAL VOC 2012 (Everingham et al.), with the additional annotations of SBD (Hariharan et al., 2011) if they are
there."""

from __future__ import annotations

import os
from pathlib import Path

from deeplab_kernels.errors import UserError

from .annotations import voc_palette
from .pairs import PairedDataset, check_complete, read_lines

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SPLITS = ("train", "val", "trainval", "train_aug")
LISTS, IMAGES, LABELS, AUGMENTED_LABELS = (
    Path("ImageSets/Segmentation"),
    Path("JPEGImages"),
    Path("SegmentationClass"),
    Path("SegmentationClassAug"),
)
_FOLDERS = (".", "VOC2012", "VOCdevkit/VOC2012")  # where the archive may have been unpacked, below what is given


class PascalVOC(PairedDataset):
    """The segmentation task: 20 classes and background; 255 on the boundaries of objects.

    Args:
        root: folder with JPEGImages, SegmentationClass and ImageSets/Segmentation, or a folder above (VOCdevkit, or
            where the archive was unpacked). A classes.txt in it, one name a line, replaces VOC's class names.
        split: "train", "val", "trainval", or "train_aug": the list train_aug.txt (or trainaug.txt) in
            ImageSets/Segmentation, with label maps from SegmentationClassAug.

    A line of a list is an image's name, or the paths of image and label map from the root, as some distributions of
    train_aug.txt have it.

    Raises:
        UserError: the layout is another one, the list is empty, or files of it are missing (the first are named).
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        if split not in SPLITS:
            raise UserError(f"split of PASCAL VOC must be one of {', '.join(SPLITS)}, got {split!r}")
        folder = find_voc(root)
        if folder is None:
            raise UserError(f"{os.fspath(root)}: not PASCAL VOC's layout: there is no folder {IMAGES}")
        labels = AUGMENTED_LABELS if split == "train_aug" else LABELS
        source = _list_file(folder, split)
        pairs = [_pair(folder, labels, line, source) for line in read_lines(source)]
        if not pairs:
            raise UserError(f"{source}: lists no images")
        check_complete((image for image, _ in pairs), "images are", source)
        check_complete((label for _, label in pairs), "label maps are", source)
        named = folder / "classes.txt"
        class_names = tuple(read_lines(named)) if named.is_file() else CLASS_NAMES
        super().__init__([image.stem for image, _ in pairs], pairs, class_names, voc_palette())


def find_voc(root: str | os.PathLike[str]) -> Path | None:
    """The folder at or below ``root`` that has PASCAL VOC's layout."""
    folders = (Path(root, below) for below in _FOLDERS)
    return next((folder for folder in folders if (folder / IMAGES).is_dir() and (folder / LISTS).is_dir()), None)


def _list_file(folder: Path, split: str) -> Path:
    candidates = [folder / LISTS / f"{split}.txt"]
    if split == "train_aug":
        candidates.append(folder / LISTS / "trainaug.txt")
    for path in candidates:
        if path.is_file():
            return path
    hint = "; it comes with SBD's annotations, see add_sbd" if split == "train_aug" else ""
    raise UserError(f"there is no list {candidates[0]}{hint}")


def _pair(folder: Path, labels: Path, line: str, source: Path) -> tuple[Path, Path]:
    words = line.split()
    if len(words) == 1 and "/" not in line:
        return folder / IMAGES / f"{line}.jpg", folder / labels / f"{line}.png"
    if len(words) == 2 and all("." in word for word in words):
        image, label = (folder / word.lstrip("/") for word in words)
        return image, label
    raise UserError(f"{source}: a line is a name, or the paths of image and label map, got {line[:80]!r}")
