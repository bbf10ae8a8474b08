"""Exact Gaussian filter of points with features, in plain torch.

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j        (j = i included)

The functions have the signatures of the operators in csrc/torch/schema.cpp. Rows of the kernel matrix are formed a
block at a time; under autograd torch keeps every block, so that derivatives of these functions take O(N^2) memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .atrous_depthwise import accumulation_dtype

# Elements of the kernel matrix that are held at once.
_BLOCK_ELEMENTS = 2**21


def poison(t: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """0, or NaN where ``t`` has a NaN or an infinity along ``dims`` (which are kept, of size 1).

    Kernels leave out what is too far away to matter; a NaN there must show all the same, on every backend."""
    return (t * 0).sum(dims, keepdim=True)


def _row_blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, exp(-|f_i - f_j|^2 / 2) of these rows: (B, rows, N))."""
    batch, dimensions, points = features.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, batch * points))
    for start in range(0, points, rows):
        block = slice(start, min(start + rows, points))
        square = features.new_zeros((batch, block.stop - start, points))
        for e in range(dimensions):
            square = square + (features[:, e, block, None] - features[:, e, None, :]).square()
        yield block, torch.exp(-0.5 * square)


def gaussian_filter(values: Tensor, features: Tensor) -> Tensor:
    acc = accumulation_dtype(values.dtype)
    v, f = values.to(acc), features.to(acc)
    parts = [v @ kernel.mT for _, kernel in _row_blocks(f)]
    out = torch.cat(parts, -1) if parts else torch.zeros_like(v)
    return out + poison(v, 2) + poison(f, (1, 2))


def gaussian_filter_backward(
    grad_out: Tensor, values: Tensor, features: Tensor, need_grad_values: bool, need_grad_features: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(values.dtype)
    g, v, f = grad_out.to(acc), values.to(acc), features.to(acc)
    by_values, by_features = [], []
    for rows, kernel in _row_blocks(f):
        if need_grad_values:
            by_values.append(g @ kernel.mT)
        if need_grad_features:
            pull = kernel * (g[:, :, rows].mT @ v + v[:, :, rows].mT @ g)
            along = [(pull * (f[:, e, None, :] - f[:, e, rows, None])).sum(-1) for e in range(f.shape[1])]
            by_features.append(torch.stack(along, 1))
    grad_values, grad_features = values.new_empty(0), features.new_empty(0)
    bad_features = poison(f, (1, 2))
    if need_grad_values:
        total = torch.cat(by_values, -1) if by_values else torch.zeros_like(v)
        grad_values = (total + poison(g, 2) + bad_features).to(values.dtype)
    if need_grad_features:
        total = torch.cat(by_features, -1) if by_features else torch.zeros_like(f)
        grad_features = (total + poison(g, (1, 2)) + poison(v, (1, 2)) + bad_features).to(features.dtype)
    return grad_values, grad_features
