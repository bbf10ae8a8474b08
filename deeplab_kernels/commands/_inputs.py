"""The files that a command is given: names, folders and patterns; and where their results go."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

OUTPUT_ENDS = ("-labels.png", "-overlay.png", "-overlay.mp4")  # what segment writes, and so does not read in folders


class Input(NamedTuple):
    """path: the file. below: the folder of its results, from the output folder."""

    path: Path
    below: Path
    is_video: bool


def collect(arguments: Sequence[Path], recursive: bool) -> list[Input]:
    """The images and videos that the arguments name, each once, in their order; those of a folder by name.

    A name that does not exist and is no pattern is taken as a file, whose absence shows when it is opened.

    Raises:
        UserError: a folder without images and videos, a pattern that fits nothing.
    """
    from ..models.data.video import VIDEO_SUFFIXES

    found: dict[Path, Input] = {}
    for argument in arguments:
        for path, below in _expanded(argument, recursive, VIDEO_SUFFIXES):
            found.setdefault(path.resolve(), Input(path, below, path.suffix.lower() in VIDEO_SUFFIXES))
    return list(found.values())


def _expanded(argument: Path, recursive: bool, video_suffixes: frozenset[str]) -> list[tuple[Path, Path]]:
    if argument.is_dir():
        suffixes = image_suffixes() | video_suffixes
        paths = sorted(argument.rglob("*") if recursive else argument.iterdir())
        kept = [path for path in paths if _is_wanted(path, suffixes)]
        if not kept:
            raise UserError(
                f"{argument}: has no images or videos" + ("" if recursive else "; --recursive looks deeper")
            )
        return [(path, path.parent.relative_to(argument)) for path in kept]
    if not argument.exists() and glob.has_magic(str(argument)):
        matches = sorted(Path(match) for match in glob.glob(str(argument), recursive=True))
        kept = [path for path in matches if path.is_file() and not path.name.endswith(OUTPUT_ENDS)]
        if not kept:
            raise UserError(f"{argument}: no file has such a name")
        return [(path, Path()) for path in kept]
    return [(argument, Path())]


def image_suffixes() -> frozenset[str]:
    """Those of the kinds that Pillow reads."""
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _is_wanted(path: Path, suffixes: frozenset[str]) -> bool:
    hidden = path.name.startswith(".") or path.name.endswith(OUTPUT_ENDS)
    return path.suffix.lower() in suffixes and not hidden and path.is_file()


def stems(inputs: Sequence[Input]) -> list[Path]:
    """The results' common beginning of each input, from the output folder: its name without suffix; with it, or a
    number, where two inputs would have one."""
    taken: dict[Path, int] = {}
    for item in inputs:
        taken[item.below / item.path.stem] = taken.get(item.below / item.path.stem, 0) + 1
    out: list[Path] = []
    used: set[Path] = set()
    for item in inputs:
        stem = item.below / item.path.stem
        if taken[stem] > 1:
            stem = item.below / f"{item.path.stem}-{item.path.suffix.lstrip('.')}"
        number, wanted = 2, stem
        while stem in used:
            stem, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
        used.add(stem)
        out.append(stem)
    return out
