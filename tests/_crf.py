"""Mean field by hand, and random problems for it."""

from __future__ import annotations

from typing import Any

import torch
from _filters import random
from torch import Tensor

D = torch.float64


def by_hand(
    unary: Tensor,
    features: list[Tensor],
    compatibility: list[Tensor],
    iterations: int,
    normalization: str = "symmetric",
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Exact mean field with whole N x N kernels: unary (B, L, N), mask (B, N); a window for (B, L, H, W)."""
    size = unary.shape
    if window is not None:
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in size[2:]), indexing="ij")
        y, x = rows.flatten(), columns.flatten()
        near = ((y[:, None] - y).abs() <= window) & ((x[:, None] - x).abs() <= window)
    present = torch.ones(size[0], unary.flatten(2).shape[2], dtype=unary.dtype)
    present = present if mask is None else mask.flatten(1).to(unary.dtype)
    kernels = []
    for f in features:
        points = f.flatten(2).mT
        k = torch.exp(-(points[:, :, None] - points[:, None]).square().sum(-1) / 2)
        k = k * present[:, :, None] * present[:, None]
        k = k if window is None else k * near
        n = k.sum(2)
        n = torch.where(n == 0, 1, n)
        if normalization == "symmetric":
            k = k * n.rsqrt()[:, :, None] * n.rsqrt()[:, None]
        elif normalization != "none":
            k = k / (n[:, None] if normalization == "before" else n[:, :, None])
        kernels.append(k)
    energy = unary.flatten(2)
    logits = -energy
    for _ in range(iterations):
        q = logits.softmax(1)
        logits = -energy - sum(
            torch.einsum("lk,bij,bkj->bli", c, k, q) for c, k in zip(compatibility, kernels, strict=True)
        )
    return logits.view(size)


def problem(batch: int = 2, labels: int = 3, points: int = 33, dtype: torch.dtype = D) -> dict[str, Any]:
    return {
        "unary": random(batch, labels, points, dtype=dtype),
        "features": [random(batch, 5, points, dtype=dtype, scale=0.5), random(batch, 2, points, dtype=dtype)],
        "compatibility": [random(labels, labels, dtype=dtype, scale=0.5), random(labels, dtype=dtype)],
    }
