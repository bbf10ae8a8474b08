"""Gaussian filter of a feature image, cut off outside a window around each pixel, in plain torch.

    out[y, x] = sum over |dy| <= rv, |dx| <= rh of exp(-|f[y, x] - f[y + dy, x + dx]|^2 / 2) v[y + dy, x + dx]

Pixels outside the image are absent. The functions have the signatures of the operators in csrc/torch/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .atrous_depthwise import accumulation_dtype
from .gaussian_filter import poison

Shift = Callable[[Tensor], Tensor]


def clamped(radius: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """``radius`` without what lies outside the image for every pixel."""
    return max(0, min(radius[0], height - 1)), max(0, min(radius[1], width - 1))


def _neighbours(features: Tensor, radius: Sequence[int]) -> Iterator[tuple[Shift, Tensor]]:
    """For every offset of the window: what moves the neighbours, zero outside the image, onto their pixels, and the
    kernel (B, 1, H, W)."""
    height, width = features.shape[2:]
    rv, rh = clamped(radius, height, width)

    def padded(t: Tensor) -> Tensor:
        return F.pad(t, (rh, rh, rv, rv))

    for dy in range(-rv, rv + 1):
        for dx in range(-rh, rh + 1):

            def shift(t: Tensor, top: int = rv + dy, left: int = rh + dx) -> Tensor:
                return padded(t)[:, :, top : top + height, left : left + width]

            yield shift, torch.exp(-0.5 * (features - shift(features)).square().sum(1, keepdim=True))


def local_gaussian_filter(values: Tensor, features: Tensor, radius: Sequence[int]) -> Tensor:
    acc = accumulation_dtype(values.dtype)
    v, f = values.to(acc), features.to(acc)
    out = torch.zeros_like(v)
    for shift, kernel in _neighbours(f, radius):
        out = out + kernel * shift(v)
    return (out + poison(f, (1, 2, 3))).contiguous()


def local_gaussian_filter_backward(
    grad_out: Tensor,
    values: Tensor,
    features: Tensor,
    radius: Sequence[int],
    need_grad_values: bool,
    need_grad_features: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(values.dtype)
    g, v, f = grad_out.to(acc), values.to(acc), features.to(acc)
    total_v, total_f = torch.zeros_like(v), torch.zeros_like(f)
    for shift, kernel in _neighbours(f, radius):
        there_g = shift(g)
        total_v = total_v + kernel * there_g
        if need_grad_features:
            pull = kernel * (g * shift(v) + v * there_g).sum(1, keepdim=True)
            total_f = total_f + pull * (shift(f) - f)
    bad_features = poison(f, (1, 2, 3))
    grad_values, grad_features = values.new_empty(0), features.new_empty(0)
    if need_grad_values:
        grad_values = (total_v + bad_features).to(values.dtype).contiguous()
    if need_grad_features:
        grad_features = (total_f + bad_features).to(features.dtype).contiguous()
    return grad_values, grad_features
