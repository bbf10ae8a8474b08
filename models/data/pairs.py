"""What the datasets in files have in common: pairs of an image and a label map, decoded one at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.errors import UserError

from .annotations import LabelMap, read_annotation
from .images import read_image
from .scenes import IGNORE, Scene

_SHOWN_NAMES = 5  # in an error's list of files


class PairedDataset:
    """Images with label maps, in files that are read when an item is asked for; nothing is kept.

    Args:
        names: of the items; they say which image an error or a result belongs to.
        pairs: (image file, label file) of each.
        class_names: K names; labels are 0 to K - 1, and 255 where neither training nor evaluation counts.
        palette: (K, 3), the colours of the classes.

    Raises:
        UserError: no items; K is not 1 to 255. Items raise it for damaged files, labels that are not allowed and label
            maps of another size than their image's; the message names the file.
    """

    def __init__(
        self,
        names: Sequence[str],
        pairs: Sequence[tuple[Path, Path]],
        class_names: Sequence[str],
        palette: NDArray[np.uint8],
    ) -> None:
        if not 0 < len(class_names) <= IGNORE:
            raise UserError(f"a dataset has 1 to {IGNORE} classes, got {len(class_names)}")
        self.names, self._pairs = list(names), list(pairs)
        self.class_names = tuple(class_names)
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in palette[: len(class_names)])

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        image_path, label_path = self._pairs[index]
        image, labels = read_image(image_path), self._read_labels(label_path)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"{label_path}: {labels.shape[1]} x {labels.shape[0]} pixels, but its image {image_path} has "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        return Scene(image, labels)

    def _read_labels(self, path: Path) -> NDArray[np.uint8]:
        annotation = read_annotation(path)
        if not isinstance(annotation, LabelMap):
            raise UserError(f"{path}: holds scores, not labels")
        return self._to_classes(annotation.labels, path)

    def _to_classes(self, stored: NDArray[np.integer[Any]], path: Path) -> NDArray[np.uint8]:
        """The stored label map as classes; here they are the same."""
        wrong = stored[(stored >= len(self.class_names)) & (stored != IGNORE)]
        if wrong.size:
            raise UserError(
                f"{path}: has label {int(wrong.max())}; the dataset has {len(self.class_names)} classes, so that "
                f"labels are 0 to {len(self.class_names) - 1}, and {IGNORE} for pixels that do not count"
            )
        return stored.astype(np.uint8)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason})") from None


def files_in(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Stem -> file, of the files in ``folder`` with one of ``suffixes`` (lower case), sorted by name.

    Raises:
        UserError: there is no such folder, or two files have one stem.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = Path(entry.path)
            if path.suffix.lower() not in suffixes or entry.name.startswith(".") or not entry.is_file():
                continue
            if path.stem in found:
                raise UserError(f"{folder}: {found[path.stem].name} and {path.name} have one name")
            found[path.stem] = path
    return found


def check_complete(paths: Iterable[Path], what: str, source: Path) -> None:
    """Raises UserError that names the files of ``paths`` that do not exist, if there are any."""
    listings: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in listings:  # one listing of a folder instead of thousands of look-ups
            listings[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in listings[path.parent]:
            missing.append(path)
    if missing:
        raise UserError(f"{source}: {len(missing)} {what} missing: {listed([str(p) for p in missing])}")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
