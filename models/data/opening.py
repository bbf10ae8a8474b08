"""Datasets by a word: what the commands take for ``--data``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from deeplab_kernels.errors import UserError

from . import cityscapes, folder
from .cityscapes import Cityscapes
from .folder import open_folder
from .generated import generated_dataset
from .scenes import Scenes
from .voc import PascalVOC, find_voc

FORMS = "generated, voc:PATH, cityscapes:PATH, folder:PATH, or the path of a folder with one of these layouts"


class Dataset(Scenes, Protocol):
    """Scenes that know their classes."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> Sequence[tuple[int, int, int]]: ...


_READERS: dict[str, Callable[[str, str], Dataset]] = {"voc": PascalVOC, "cityscapes": Cityscapes, "folder": open_folder}


def open_dataset(spec: str | os.PathLike[str], split: str = "train") -> Dataset:
    """The part ``split`` ("train", "val", ...) of the dataset that ``spec`` names.

    Args:
        spec: "generated", also with settings ("generated:length=60,size=97,seed=3"); "voc:PATH", "cityscapes:PATH",
            "folder:PATH"; or a path, whose layout then tells which of the three it is.

    Raises:
        UserError: ``spec`` is none of these, or the dataset has no such part; see also the datasets' own.
    """
    text = os.fspath(spec)
    kind, _, rest = text.partition(":")
    if kind == "generated":
        return generated_dataset(split, **_settings(rest, text))
    if kind in _READERS:
        if not Path(rest).is_dir() or not rest:
            raise UserError(f"{text}: there is no folder {rest or 'named after the colon'}")
        return _READERS[kind](rest, split)
    if not Path(text).is_dir():
        raise UserError(f"a dataset is {FORMS}; got {text!r}, which is no folder")
    return _READERS[_layout(Path(text))](text, split)


def _layout(root: Path) -> str:
    if find_voc(root) is not None:
        return "voc"
    if (root / cityscapes.IMAGES).is_dir():
        return "cityscapes"
    if any((root / part / folder.IMAGES).is_dir() for part in (".", "train", "val")):
        return "folder"
    raise UserError(
        f"{root}: has no layout of a dataset: neither PASCAL VOC's (JPEGImages, ImageSets/Segmentation), nor "
        "Cityscapes' (leftImg8bit, gtFine), nor images/ and labels/"
    )


def _settings(text: str, spec: str) -> dict[str, int]:
    settings: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in ("length", "size", "seed") or not value.isdecimal():
            raise UserError(f"{spec}: settings of the generated dataset are length=N, size=N and seed=N, got {item!r}")
        settings[name] = int(value)
    if settings.get("length") == 0 or settings.get("size") == 0:
        raise UserError(f"{spec}: length and size must be at least 1")
    return settings
