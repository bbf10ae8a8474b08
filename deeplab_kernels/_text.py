"""Text for people: what the reports share."""

from __future__ import annotations


def table(rows: list[list[str]]) -> list[str]:
    """The lines of a table of left-aligned columns, indented by two."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
