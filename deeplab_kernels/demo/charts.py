"""The curves of the demo's report as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .._html import escape
from .crf import WIDTHS, Comparison
from .results import mean

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 56, 8, 14, 30


@dataclass(frozen=True)
class Frame:
    """The area of a chart; values from ``low`` at its bottom to ``high`` at its top."""

    height: int
    low: float
    high: float

    def place(self, share: float, value: float) -> tuple[float, float]:
        """Where ``value`` is drawn; share: 0 at the left end, 1 at the right one."""
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        return x, TOP + (self.high - value) / (self.high - self.low) * (self.height - TOP - BOTTOM)

    def levels(self, levels: Iterable[tuple[float, str]]) -> str:
        """A line across for each (value, text)."""
        parts = []
        for value, text in levels:
            y = self.place(0, value)[1]
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        return "".join(parts)

    def below(self, texts: Sequence[str]) -> str:
        """Evenly spaced texts under the chart."""
        parts = []
        for index, text in enumerate(texts):
            anchor = "start" if index == 0 else "end" if index == len(texts) - 1 else "middle"
            x = self.place(index / (len(texts) - 1), self.low)[0]
            parts.append(f'<text x="{x:.1f}" y="{self.height - 8}" text-anchor="{anchor}">{text}</text>')
        return "".join(parts)

    def line(self, values: Sequence[float], style: str) -> str:
        """Evenly spaced values, NaN left out; style: a class of the style sheet."""
        places = [self.place(i / (len(values) - 1), v) for i, v in enumerate(values) if not math.isnan(v)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline points="{path}" class="{style}"/>'

    def picture(self, label: str, content: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{label}">{content}</svg>'


def trimap_curve(comparison: Comparison) -> str:
    """Mean IoU over the width of the band, one line for each row; the widths are evenly spaced."""
    values = [v for row in comparison.rows for v in row.trimap if not math.isnan(v)]
    if not values:
        return ""
    low, high = math.floor(10 * min(values)), math.ceil(10 * max(values))
    high = max(high, low + 1)
    frame = Frame(300, low / 10, high / 10)
    parts = [
        frame.levels((tenth / 10, f"{10 * tenth} %") for tenth in range(low, high + 1)),
        frame.below([f"b = {width}" for width in WIDTHS]),
        *(frame.line(row.trimap, f"line line{number}") for number, row in enumerate(comparison.rows)),
    ]
    legend = "".join(
        f'<li><i class="key line{number}"></i>{escape(row.name)}</li>' for number, row in enumerate(comparison.rows)
    )
    return f"{frame.picture('trimap mean IoU', ''.join(parts))}<ul class=legend>{legend}</ul>"


def loss_curve(losses: Sequence[float]) -> str:
    """The loss of every step, and its running mean."""
    if len(losses) < 2:
        return ""
    window = max(1, len(losses) // 60)
    smooth = [mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    top = math.ceil(2 * max(losses)) / 2 or 1.0
    frame = Frame(220, 0.0, top)
    parts = [
        frame.levels((top * fifth / 5, f"{top * fifth / 5:.1f}") for fifth in range(6)),
        frame.line(losses, "faint"),
        frame.line(smooth, "strong"),
        frame.below(["step 1", "training loss", f"step {len(losses)}"]),
    ]
    return frame.picture("loss over steps", "".join(parts))
