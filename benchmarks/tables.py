"""Markdown tables, and cells that set the layouts of a contender side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LAYOUTS = ("nchw", "nhwc")


def milliseconds(record: Mapping[str, Any], kind: str, statistic: str) -> list[float]:
    """Of the contender ``kind``, in those layouts that were measured."""
    timings = record["timings"]
    return [timings[f"{kind} {layout}"][statistic] for layout in LAYOUTS if f"{kind} {layout}" in timings]


def pair(values: Iterable[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values) or "-"


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table without a newline at its end."""
    head = list(head)
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, lines)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
