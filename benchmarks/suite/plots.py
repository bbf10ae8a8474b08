"""The report's two plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deeplab_kernels._html import escape

from .rows import Row

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 12, 48
TONES = 6  # colours of the style sheet


@dataclass(frozen=True)
class Point:
    """A mark in units of the axes; ``text`` appears beside it, ``tip`` when it is pointed at."""

    x: float
    y: float
    tip: str
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour (a class of the style sheet), joined by a line where ``line``."""

    name: str
    tone: str
    points: Sequence[Point]
    line: bool = False


class LogAxes:
    """Two logarithmic axes that hold ``xs`` and ``ys``, with a little room around."""

    def __init__(self, xs: Iterable[float], ys: Iterable[float], x_title: str, y_title: str) -> None:
        self.x_range, self.y_range = _padded(list(xs)), _padded(list(ys))
        self.titles = x_title, y_title

    def x(self, value: float) -> float:
        return LEFT + _share(value, self.x_range) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (1 - _share(value, self.y_range)) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> str:
        parts = []
        for value in _ticks(self.x_range):
            x = self.x(value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
        for value in _ticks(self.y_range):
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{self.titles[0]}</text>'
            f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{self.titles[1]}</text>'
        )
        return "".join(parts)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.05, 1.15)
    return low / room, high * room


def _share(value: float, ends: tuple[float, float]) -> float:
    return math.log(value / ends[0]) / math.log(ends[1] / ends[0])


def _ticks(ends: tuple[float, float]) -> list[float]:
    """Powers of ten, and more between them the shorter the axis is."""
    low, high = (math.floor(math.log10(end)) for end in ends)
    steps = (1,) if high - low > 2 else (1, 2, 5) if ends[1] / ends[0] > 20 else (1, 1.5, 2, 3, 4, 5, 7)
    found = (step * 10.0**exponent for exponent in range(low, high + 1) for step in steps)
    return [value for value in found if ends[0] <= value <= ends[1]]


@dataclass(frozen=True)
class Limits:
    """What the machine reached: copy bandwidth in GB/s, matrix products in GFLOP/s; 0 where not measured."""

    copy: float
    matrix: float

    @property
    def text(self) -> str:
        parts = [f"copy, {self.copy:g} GB/s (slope)"] * bool(self.copy)
        parts += [f"matrix product, {self.matrix:.0f} GFLOP/s (level)"] * bool(self.matrix)
        return f"limits: {'; '.join(parts) or 'not measured'}"

    def draw(self, axes: LogAxes) -> str:
        left, right = axes.x_range
        bottom, top = axes.y_range
        lines = []
        if self.copy:
            start, end = max(left, bottom / self.copy), min(right, (self.matrix or top) / self.copy, top / self.copy)
            if start < end:
                lines.append((start, start * self.copy, end, end * self.copy))
        if self.matrix:
            start = min(max(left, self.matrix / self.copy if self.copy else left), right)
            lines.append((start, self.matrix, right, self.matrix))
        return "".join(
            f'<line x1="{axes.x(x1):.1f}" y1="{axes.y(y1):.1f}" x2="{axes.x(x2):.1f}" y2="{axes.y(y2):.1f}" '
            'class="ceiling"/>'
            for x1, y1, x2, y2 in lines
        )


def figure(title: str, axes: LogAxes, series: Sequence[Series], note: str, limits: Limits | None = None) -> str:
    """A plot with its title, its legend and a note below."""
    marks = []
    for one in series:
        places = [(axes.x(p.x), axes.y(p.y), p) for p in one.points]
        if one.line and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            marks.append(f'<polyline points="{path}" class="{one.tone}"/>')
        for x, y, point in places:
            tip = f"<title>{escape(point.tip)}</title>"
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{one.tone}">{tip}</circle>')
            if point.text:
                anchor = "end" if x > 0.7 * WIDTH else "start"
                place = f'x="{x:.1f}" y="{y + 22:.1f}" text-anchor="{anchor}"'
                marks.append(f'<text {place} class="label">{escape(point.text)}</text>')
    keys = [(one.tone, one.name) for one in series]
    if limits:
        keys.append(("rule", limits.text))
    legend = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for style, name in keys)
    return (
        f'<figure class=plot><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{axes.draw()}{limits.draw(axes) if limits else ""}{"".join(marks)}</svg>'
        f"<ul class=legend>{legend}</ul><p>{escape(note)}</p></figure>"
    )


def roofline(rows: Sequence[Row]) -> str:
    """Arithmetic intensity against the speed reached, ours and the best alternatives, under the measured ceilings."""
    usable = [row for row in rows if row.madds and row.bytes]
    if not usable:
        return ""
    groups: dict[tuple[str, bool], list[Point]] = {}
    best = {(row.subject, row.case, row.mode, row.setting, row.rival) for row in usable if row.ours}
    for row in usable:
        rival = (row.subject, row.case, row.mode, row.setting, row.contender) in best
        if not (row.ours or rival):
            continue
        speed = row.achieved_gflop_per_s or 0.0
        tip = f"{row.case}, {row.mode}, {row.contender}: {speed:.3g} GFLOP/s, {row.median_ms:.3g} ms"
        groups.setdefault((row.subject, row.ours), []).append(Point(2 * row.madds / row.bytes, speed, tip))
    # Ours last: they lie on top.
    order = sorted(groups, key=lambda group: (group[1], group[0]))
    subjects = list(dict.fromkeys(subject for subject, _ in order))
    series = [
        Series(
            f"{subject}: {'ours' if ours else 'best of PyTorch'}",
            f"{'solid' if ours else 'hollow'} tone{subjects.index(subject) % TONES}",
            groups[subject, ours],
        )
        for subject, ours in order
    ]
    points = [point for group in groups.values() for point in group]
    copy = max((row.copy_gb_per_s or 0.0 for row in usable), default=0.0)
    matrix = max((row.gflop_per_s or 0.0 for row in usable), default=0.0)
    xs = [point.x for point in points]
    ys = [point.y for point in points] + ([matrix] if matrix else [])
    axes = LogAxes(xs, ys, "arithmetic intensity, FLOP per byte", "achieved speed, GFLOP/s")
    note = (
        "Inputs read once and results written once, two FLOP a Multiply-Add. The limits were measured: a copy of a "
        "tensor far larger than the caches, and the fastest fp32 matrix product. Tensors that fit in the caches may "
        "lie above the slope."
    )
    return figure("Roofline: speed against arithmetic intensity", axes, series, note, Limits(copy, matrix))


def latency(rows: Sequence[Row]) -> str:
    """Whole networks in inference: Multiply-Adds against milliseconds, the best layout of each contender.

    Of several batch sizes and dtypes the one in which most networks were measured.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.network and row.mode == "inference" and row.madds:
            groups.setdefault(row.case.removeprefix(row.network), []).append(row)
    if not groups:
        return ""
    setting, chosen = max(groups.items(), key=lambda group: len({row.network for row in group[1]}))
    kinds: dict[str, dict[str, Row]] = {}
    for row in chosen:
        fastest = kinds.setdefault(row.contender.split()[0], {})
        if row.network not in fastest or row.median_ms < fastest[row.network].median_ms:
            fastest[row.network] = row
    series = []
    for number, (kind, found) in enumerate(kinds.items()):
        points = [
            Point(
                1e-9 * row.madds,
                row.median_ms,
                f"{row.case}, {row.contender}: {1e-9 * row.madds:.1f} billion Multiply-Adds, {row.median_ms:.0f} ms",
                ", ".join(row.network.split(", ")[1:]) if kind == "ours" else "",
            )
            for row in sorted(found.values(), key=lambda row: row.madds or 0)
        ]
        name = kind if kind == "ours" else f"PyTorch, {kind}"
        series.append(
            Series(name, f"{'solid' if kind == 'ours' else 'hollow'} tone{number % TONES}", points, line=True)
        )
    points = [point for one in series for point in one.points]
    xs, ys = [point.x for point in points], [point.y for point in points]
    axes = LogAxes(xs, ys, "Multiply-Adds of the call, billions", "latency, ms")
    title = "Table 5's networks in inference: latency against Multiply-Adds"
    note = "The networks of the DeepLab v3+ paper's table 5 that were measured, in the faster layout of each contender."
    return figure(f"{title} ({setting.strip(',/ ')})", axes, series, note)
