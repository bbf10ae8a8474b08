"""Cityscapes (Cordts et al., arXiv:1604.01685), the fine annotations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.errors import UserError

from .pairs import PairedDataset, check_complete
from .scenes import IGNORE


class _Class(NamedTuple):
    label_id: int  # in the annotation files
    name: str
    colour: tuple[int, int, int]


# In the order of the train ids; what the files have besides is not evaluated.
_CLASSES = (
    _Class(7, "road", (128, 64, 128)),
    _Class(8, "sidewalk", (244, 35, 232)),
    _Class(11, "building", (70, 70, 70)),
    _Class(12, "wall", (102, 102, 156)),
    _Class(13, "fence", (190, 153, 153)),
    _Class(17, "pole", (153, 153, 153)),
    _Class(19, "traffic light", (250, 170, 30)),
    _Class(20, "traffic sign", (220, 220, 0)),
    _Class(21, "vegetation", (107, 142, 35)),
    _Class(22, "terrain", (152, 251, 152)),
    _Class(23, "sky", (70, 130, 180)),
    _Class(24, "person", (220, 20, 60)),
    _Class(25, "rider", (255, 0, 0)),
    _Class(26, "car", (0, 0, 142)),
    _Class(27, "truck", (0, 0, 70)),
    _Class(28, "bus", (0, 60, 100)),
    _Class(31, "train", (0, 80, 100)),
    _Class(32, "motorcycle", (0, 0, 230)),
    _Class(33, "bicycle", (119, 11, 32)),
)
CLASS_NAMES = tuple(c.name for c in _CLASSES)
PALETTE = tuple(c.colour for c in _CLASSES)
_LABEL_IDS = 34  # 0 to 33
SPLITS = ("train", "val")  # the labels of the test images are not public
IMAGES, LABELS = Path("leftImg8bit"), Path("gtFine")
_IMAGE_END, _LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"


class Cityscapes(PairedDataset):
    """The 19 evaluated classes; every other label id of the annotations becomes 255.

    Args:
        root: folder with leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png.
        split: "train" or "val".

    Raises:
        UserError: the layout is another one, there are no images, or label maps are missing (the first are named).
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        if split not in SPLITS:
            raise UserError(f"split of Cityscapes must be one of {', '.join(SPLITS)}, got {split!r}")
        folder = Path(root) / IMAGES / split
        if not folder.is_dir():
            raise UserError(f"{os.fspath(root)}: not Cityscapes' layout: there is no folder {IMAGES / split}")
        images = sorted(folder.glob(f"*/*{_IMAGE_END}"))
        if not images:
            raise UserError(f"{folder}: has no */*{_IMAGE_END}")
        names = [image.name.removesuffix(_IMAGE_END) for image in images]
        pairs = [
            (image, Path(root) / LABELS / split / image.parent.name / f"{name}{_LABEL_END}")
            for image, name in zip(images, names, strict=True)
        ]
        check_complete((label for _, label in pairs), "label maps are", Path(root) / LABELS / split)
        super().__init__(names, pairs, CLASS_NAMES, np.array(PALETTE, np.uint8))

    def _to_classes(self, stored: NDArray[np.integer[Any]], path: Path) -> NDArray[np.uint8]:
        wrong = stored[(stored >= _LABEL_IDS) & (stored != IGNORE)]
        if wrong.size:
            raise UserError(f"{path}: has label id {int(wrong.max())}; Cityscapes' are 0 to {_LABEL_IDS - 1}")
        return _TRAIN_IDS[stored]


_TRAIN_IDS = np.full(256, IGNORE, np.uint8)
for _train_id, _class in enumerate(_CLASSES):
    _TRAIN_IDS[_class.label_id] = _train_id
