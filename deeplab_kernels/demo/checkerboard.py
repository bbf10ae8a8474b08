"""The checkerboard that a transposed convolution leaves, beside resizing followed by a convolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..models.upsampling import Upsampling
from .pictures import probability, side_by_side
from .results import Figure

FACTOR, STEPS = 2, 2
PERIOD = FACTOR**STEPS  # of what the steps leave together, in pixels
_CHANNELS = 8
_SIZE, _MARGIN = 20, 12  # of the input, and what is cut off the output: padding makes a border of its own


@dataclass(frozen=True)
class Panel:
    """One way of upsampling: its name, its output as RGB (H, W, 3), and :func:`pattern_energy` of it."""

    name: str
    image: NDArray[np.uint8]
    energy: float


CASES = (
    ("transposed, 3x3", "transposed", 3),  # 2 does not divide 3: one, two or four inputs reach an output
    ("transposed, 4x4", "transposed", 4),
    ("nearest, then 3x3", "nearest", 3),
    ("bilinear, then 3x3", "bilinear", 3),
)


def panels(seed: int = 0) -> list[Panel]:
    """A smooth map enlarged four times by two untrained layers of each kind, each with random positive weights."""
    result = []
    for name, mode, kernel in CASES:
        y = _enlarged(mode, kernel, torch.Generator().manual_seed(seed))
        low, high = y[0].min(), y[0].max()
        result.append(Panel(name, probability(((y[0] - low) / (high - low)).numpy()), pattern_energy(y, PERIOD)))
    return result


def figure(seed: int = 0) -> Figure:
    """The panels side by side, with their energies."""
    shown = panels(seed)
    energies = "; ".join(f"{panel.name}: {100 * panel.energy:.2g} %" for panel in shown)
    caption = f"Share of the variance in a pattern that repeats every {PERIOD} pixels: {energies}."
    return Figure(side_by_side([panel.image for panel in shown], scale=4), caption, "Four ways of upsampling")


def pattern_energy(maps: Tensor, period: int) -> float:
    """Share of the variance of ``maps`` (C, H, W) in a pattern that repeats every ``period`` pixels on both axes: the
    power at the multiples of the frequency 1 / period, but for the mean."""
    smooth = F.avg_pool2d(maps[None].double(), period, 1)[0]
    first = (period - 1) // 2
    _, height, width = (n // period * period for n in smooth.shape)
    residue = (maps[:, first:, first:][:, : smooth.shape[1], : smooth.shape[2]] - smooth)[:, :height, :width]
    phases = residue.view(len(maps), height // period, period, width // period, period).mean((1, 3))
    return (phases.var((1, 2), correction=0) / maps.double().var((1, 2), correction=0)).mean().item()


@torch.no_grad()
def _enlarged(mode: str, kernel: int, generator: torch.Generator) -> Tensor:
    """(_CHANNELS, H, W)"""
    axis = torch.linspace(-1, 1, _SIZE)
    x = (torch.exp(-2 * (axis[:, None] ** 2 + (axis - 0.2) ** 2)) + 0.3 * axis)[None, None]
    for _ in range(STEPS):
        layer = Upsampling(x.shape[1], _CHANNELS, mode, FACTOR, kernel)
        layer.conv.weight.copy_(torch.rand(layer.conv.weight.shape, generator=generator))
        layer.conv.bias.zero_()  # type: ignore[union-attr]
        x = layer(x)
    return x[0, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
