"""The classes of known datasets, by name: for weights that do not say what their classes are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deeplab_kernels.errors import UserError

from . import ade20k, cityscapes, voc
from .annotations import voc_palette
from .pairs import read_lines

Palette = list[tuple[int, int, int]]


def named_classes(classes: str | os.PathLike[str] | Sequence[str]) -> tuple[tuple[str, ...], Palette]:
    """Names and colours of classes: "voc" (21), "cityscapes" (19), "ade20k" (151, with "other"), a text file with one
    name a line, or the names.

    Raises:
        UserError: no such file, or it has no names, or more than 256.
    """
    if classes == "cityscapes":
        return cityscapes.CLASS_NAMES, list(cityscapes.PALETTE)
    names: tuple[str, ...]
    if classes in ("voc", "ade20k"):
        names = voc.CLASS_NAMES if classes == "voc" else ade20k.CLASS_NAMES
    elif isinstance(classes, (str, os.PathLike)):
        if not Path(classes).is_file():
            raise UserError(
                f"classes are voc, cityscapes, ade20k, or a text file with one name a line; got {classes!s}"
            )
        names = tuple(read_lines(Path(classes)))
    else:
        names = tuple(classes)
    if not 0 < len(names) <= 256:
        raise UserError(f"there must be 1 to 256 classes, got {len(names)}")
    return names, [(int(r), int(g), int(b)) for r, g, b in voc_palette()[: len(names)]]
