"""Any images with label maps beside them: a folder images/ and a folder labels/."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deeplab_kernels.errors import UserError

from .annotations import voc_palette
from .pairs import PairedDataset, files_in, listed, read_lines

IMAGES, LABELS, CLASSES = "images", "labels", "classes.txt"
_LABEL_SUFFIXES = frozenset((".png", ".bmp", ".gif", ".tif", ".tiff"))
_IMAGE_SUFFIXES = _LABEL_SUFFIXES | {".jpg", ".jpeg", ".webp", ".ppm", ".jp2"}


class FolderDataset(PairedDataset):
    """``root``/images and ``root``/labels, paired by the files' names without suffix.

    Label maps are palette or grey images whose pixel values are the classes; 255 does not count.

    Args:
        class_names: by default the lines of classes.txt, in ``root`` or the folder above.
        names: the items to take, in this order; by default all, sorted.

    Raises:
        UserError: a folder is missing or empty, an image has no label map or the reverse (the first are named), or
            nothing tells the class names.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        class_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        folder = Path(root)
        images = files_in(folder / IMAGES, _IMAGE_SUFFIXES)
        labels = files_in(folder / LABELS, _LABEL_SUFFIXES)
        if names is None:
            _check_paired(folder, images, labels)
            names = list(images)
        for found, what in ((images, IMAGES), (labels, LABELS)):
            if missing := [name for name in names if name not in found]:
                raise UserError(f"{folder / what}: {len(missing)} of the listed names are missing: {listed(missing)}")
        if not names:
            raise UserError(f"{folder / IMAGES}: has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        if class_names is None:
            class_names = _class_names(folder)
        super().__init__(names, [(images[name], labels[name]) for name in names], class_names, voc_palette())


def _check_paired(folder: Path, images: dict[str, Path], labels: dict[str, Path]) -> None:
    alone = [path for name, path in images.items() if name not in labels]
    if alone:
        raise UserError(f"{folder}: {len(alone)} images without a label map: {listed([p.name for p in alone])}")
    alone = [path for name, path in labels.items() if name not in images]
    if alone:
        raise UserError(f"{folder}: {len(alone)} label maps without an image: {listed([p.name for p in alone])}")


def _class_names(folder: Path) -> list[str]:
    for path in (folder / CLASSES, folder.parent / CLASSES):
        if path.is_file():
            if names := read_lines(path):
                return names
            raise UserError(f"{path}: names no classes")
    raise UserError(f"{folder}: nothing tells the classes; write their names into {folder / CLASSES}, one a line")


def open_folder(root: str | os.PathLike[str], split: str) -> FolderDataset:
    """The part ``split`` of a folder: its subfolder ``split`` with images/ and labels/, or the names that ``split``.txt
    lists. A folder without any such part is all "train"; "all" takes the folder's own images/ in any case.

    Raises:
        UserError: there is no such part; see also :class:`FolderDataset`.
    """
    folder = Path(root)
    if split == "all":
        return FolderDataset(folder)
    if (folder / split / IMAGES).is_dir():
        return FolderDataset(folder / split)
    if (folder / f"{split}.txt").is_file():
        names = read_lines(folder / f"{split}.txt")
        if not names:
            raise UserError(f"{folder / split}.txt: lists no names")
        return FolderDataset(folder, names=names)
    divided = any((folder / f"{part}.txt").is_file() or (folder / part / IMAGES).is_dir() for part in ("train", "val"))
    if split == "train" and not divided:
        return FolderDataset(folder)
    raise UserError(
        f"{folder}: has no split {split!r}: neither a folder {split}/{IMAGES} nor a list {split}.txt of names; "
        "split 'all' takes every image"
    )
