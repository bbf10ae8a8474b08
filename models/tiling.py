"""Windows that together cover an image, for networks and memories that do not take it whole."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """rows, columns: the part of the image whose result is kept. seen_rows, seen_columns: what the network sees."""

    rows: slice
    columns: slice
    seen_rows: slice
    seen_columns: slice

    @property
    def kept(self) -> tuple[slice, slice]:
        """The part to keep, within what is seen."""
        pairs = ((self.rows, self.seen_rows), (self.columns, self.seen_columns))
        rows, columns = (slice(inner.start - outer.start, inner.stop - outer.start) for inner, outer in pairs)
        return rows, columns


def windows(height: int, width: int, side: int | None, margin: int) -> list[Window]:
    """Windows of ``side`` pixels on an image, all of one size, whose kept parts cover it once.

    Every pixel is taken from a window that sees at least ``margin`` pixels around it, or up to the border of the image.
    Where the image is no longer than ``side``, or ``side`` is None, one window spans it.

    Raises:
        ValueError: ``margin`` is negative, or ``side`` does not exceed twice the margin.
    """
    check_window(side, margin)
    rows, columns = ([(0, n, 0, n)] if side is None else _spans(n, side, margin) for n in (height, width))
    return [
        Window(slice(*row[:2]), slice(*column[:2]), slice(*row[2:]), slice(*column[2:]))
        for row in rows
        for column in columns
    ]


def check_window(side: int | None, margin: int) -> None:
    if margin < 0 or (side is not None and side <= 2 * margin):
        raise ValueError(f"a window must exceed twice its margin, got {side=}, {margin=}")


def _spans(length: int, side: int, margin: int) -> list[tuple[int, int, int, int]]:
    """(start, end, seen start, seen end) along one axis; the windows at the border are moved inwards."""
    if length <= side:
        return [(0, length, 0, length)]
    count = -(-(length - 2 * margin) // (side - 2 * margin))
    starts = [i * (length - side) // (count - 1) for i in range(count)]
    # Between two windows the kept parts meet in the middle of what both see.
    edges = [0, *((a + side + b + 1) // 2 for a, b in itertools.pairwise(starts)), length]
    return [(a, b, start, start + side) for (a, b), start in zip(itertools.pairwise(edges), starts, strict=True)]
