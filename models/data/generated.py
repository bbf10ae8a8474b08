"""The drawn scenes as a dataset with splits, and in files, in the layout of PASCAL VOC."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from deeplab_kernels.errors import UserError

from .annotations import LabelMap, voc_palette
from .scenes import CLASS_NAMES, IGNORE, Scene, SceneDataset
from .voc import IMAGES, LABELS, LISTS

LENGTHS = {"train": 400, "val": 60}
SIZE = 193


def generated_dataset(
    split: str = "train", *, length: int | None = None, size: int = SIZE, seed: int = 0
) -> SceneDataset:
    """The part ``split`` of the drawn scenes: "train" or "val", which have no scene in common.

    Args:
        length: number of scenes; by default 400 and 60.
        size: pixels of their sides.
        seed: another one draws other scenes.
    """
    if split not in LENGTHS:
        raise UserError(f"split of the generated dataset must be one of {', '.join(LENGTHS)}, got {split!r}")
    part = list(LENGTHS).index(split)
    return SceneDataset(LENGTHS[split] if length is None else length, size, len(LENGTHS) * seed + part)


def write_generated_dataset(
    root: str | os.PathLike[str],
    *,
    train: int = LENGTHS["train"],
    val: int = LENGTHS["val"],
    size: int = SIZE,
    seed: int = 0,
    void: int = 0,
    on_scene: Callable[[], object] = lambda: None,
) -> Path:
    """Writes drawn scenes as PASCAL VOC's layout has them: JPEGImages, SegmentationClass with palette PNGs,
    ImageSets/Segmentation with train.txt, val.txt and trainval.txt, and classes.txt.

    Args:
        root: a folder that does not exist yet, or is empty.
        train, val: number of scenes in each part.
        size: pixels of their sides.
        void: pixels to both sides of a boundary get 255, as in VOC (where it is about 2); 0 for none.
        on_scene: called after every scene.

    Returns:
        ``root``, which :class:`deeplab_kernels.models.data.PascalVOC` reads.

    Raises:
        UserError: ``root`` is a file or not empty.
        ValueError: a count, size or width that is not allowed.
    """
    if train < 1 or val < 1 or void < 0:
        raise ValueError(f"train and val must be at least 1 and void not negative, got {train=}, {val=}, {void=}")
    parts = {
        name: generated_dataset(name, length=n, size=size, seed=seed) for name, n in (("train", train), ("val", val))
    }
    folder = Path(root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder")
    for below in (IMAGES, LABELS, LISTS):
        (folder / below).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    for name, scenes in parts.items():
        for index in range(len(scenes)):
            _write_scene(folder, f"{name}_{index:06d}", scenes[index], void)
            on_scene()
        _write_list(folder, name, {name: scenes})
    _write_list(folder, "trainval", parts)
    return folder


def _write_scene(folder: Path, name: str, scene: Scene, void: int) -> None:
    from ..evaluation import boundary_distance  # which imports this package

    labels = scene.labels
    if void:
        labels = np.where(boundary_distance(labels, void) <= void, np.uint8(IGNORE), labels)
    Image.fromarray(scene.image).save(folder / IMAGES / f"{name}.jpg", quality=95, subsampling=0)
    LabelMap(labels, voc_palette()).to_image().save(folder / LABELS / f"{name}.png")


def _write_list(folder: Path, split: str, parts: dict[str, SceneDataset]) -> None:
    names = (f"{name}_{index:06d}\n" for name, scenes in parts.items() for index in range(len(scenes)))
    (folder / LISTS / f"{split}.txt").write_text("".join(names), encoding="utf-8")
