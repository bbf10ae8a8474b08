"""Text for people: what reports and commands share."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of left-aligned columns, indented by two."""
    return [f"  {line}" for line in _aligned(rows, "<")]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, the first left-aligned."""
    return "\n".join(_aligned(rows, ">"))


def _aligned(rows: Sequence[Sequence[str]], others: str) -> list[str]:
    """Lines, the first column to the left, the others by ``others``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<", *others * (len(widths) - 1)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
