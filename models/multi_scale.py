"""Fusion of several scales of an image inside a network (Chen et al., DeepLab v2: arXiv:1606.00915, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .layers import resize_bilinear

SCALES = (0.5, 0.75, 1.0)


def check_scales(scales: object) -> tuple[float, ...]:
    """``scales`` as a tuple, if it is a non-empty sequence of positive numbers."""
    items = tuple(scales) if isinstance(scales, Sequence) and not isinstance(scales, str) else ()
    if not items or any(not isinstance(s, (int, float)) or not 0 < s < math.inf for s in items):
        raise ValueError(f"scales must be positive numbers, got {scales!r}")
    return tuple(float(s) for s in items)


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) of an image resized by ``scale``: the distances of its corner pixels scale, so that 321 becomes 161."""
    height, width = (max(1, round((n - 1) * scale) + 1) for n in size)
    return height, width


def score_maps(scores: Callable[[Tensor], Tensor], x: Tensor, scales: Sequence[float] = SCALES) -> dict[float, Tensor]:
    """The score map of each scale; the weights are shared by all of them.

    Args:
        scores: (N, 3, h, w) -> score map (N, K, h', w').
        x: images (N, 3, H, W).
        scales: positive.
    """
    return {s: scores(x if s == 1 else resize_bilinear(x, scaled_size(x.shape[2:], s))) for s in scales}


def max_over_scales(maps: Mapping[float, Tensor]) -> Tensor:
    """The largest score at each position.

    Args:
        maps: of :func:`score_maps`. The result has the size of that of scale 1, or of the largest scale where 1 is not
            among them; the others are resized to it (bilinear, corners aligned).
    """
    base = 1.0 if 1.0 in maps else max(maps)
    fused = maps[base]
    for scale, other in maps.items():
        if scale != base:
            fused = torch.maximum(fused, resize_bilinear(other, maps[base].shape[2:]))
    return fused
