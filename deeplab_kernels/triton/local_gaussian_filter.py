"""Gaussian filter of a feature image, cut off outside a window around each pixel, in Triton.

    out[y, x] = sum over |dy| <= rv, |dx| <= rh of exp(-|f[y, x] - f[y + dy, x + dx]|^2 / 2) v[y + dy, x + dx]

The functions have the signatures and results of :mod:`deeplab_kernels.reference.local_gaussian_filter`; they hand
float64 and empty tensors to the reference. A program owns a few rows of a few neighbouring columns and goes through the
window; what its pixels' windows share, later offsets find in the L1 cache. Sums are formed in float32, in the order of
the window: results repeat bit for bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.gaussian_filter import poison
from ..reference.local_gaussian_filter import clamped

# Rows and columns of a program's tile; its warps; channels that it sums up (further ones go to further programs).
_TILE_H, _TILE_W, _WARPS = 4, 32, 8
_MAX_CHANNELS = 32
# exp(-s / 2) = 2^(_EXPONENT s)
_EXPONENT = tl.constexpr(-0.7213475204444817)


@triton.jit
def _pixels(tiles_w, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns of this program's pixels, and whether they exist."""
    p = tl.arange(0, TILE_H * TILE_W)
    y = (tl.program_id(0) // tiles_w) * TILE_H + p // TILE_W
    x = (tl.program_id(0) % tiles_w) * TILE_W + p % TILE_W
    return y, x, (y < height) & (x < width)


@triton.jit
def _kernel_to(features, pixel, neighbour, valid, inside, plane, D: tl.constexpr):
    """exp(-|f_i - f_j|^2 / 2), 0 for absent neighbours."""
    square = tl.zeros(pixel.shape, tl.float32)
    for e in tl.static_range(D):
        here = tl.load(features + e * plane + pixel, mask=valid, other=0.0).to(tl.float32)
        there = tl.load(features + e * plane + neighbour, mask=inside, other=0.0).to(tl.float32)
        square += (here - there) * (here - there)
    return tl.where(inside, tl.exp2(square * _EXPONENT), 0.0)


@triton.jit
def _filter_kernel(
    features,  # [B, D, height, width]
    rows,  # [B, channels, height, width]
    out,  # [B, channels, height, width], float32
    channels, height, width, plane, tiles_w, radius_v, radius_h,
    D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    y, x, valid = _pixels(tiles_w, height, width, TILE_H, TILE_W)
    pixel = y * width + x
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < channels
    planes = (image * channels + c.to(tl.int64)[:, None]) * plane
    features += image * D * plane
    acc = tl.zeros([BLOCK_C, TILE_H * TILE_W], tl.float32)
    for dy in range(-radius_v, radius_v + 1):
        for dx in range(-radius_h, radius_h + 1):
            inside = valid & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            neighbour = pixel + (dy * width + dx)
            kernel = _kernel_to(features, pixel, neighbour, valid, inside, plane, D)
            v = tl.load(rows + planes + neighbour[None, :], mask=c_valid[:, None] & inside[None, :], other=0.0)
            acc += kernel[None, :] * v.to(tl.float32)
    tl.store(out + planes + pixel[None, :], acc, mask=c_valid[:, None] & valid[None, :])


@triton.jit
def _grad_features_kernel(
    features,  # [B, D, height, width]
    values, grads,  # [B, channels, height, width]
    out,  # [B, D, height, width], float32
    channels, height, width, plane, tiles_w, radius_v, radius_h,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad f_i = sum_j k_ij (f_j - f_i) (g_i.v_j + v_i.g_j)"""
    image = tl.program_id(1).to(tl.int64)
    y, x, valid = _pixels(tiles_w, height, width, TILE_H, TILE_W)
    pixel = y * width + x
    features += image * D * plane
    values += image * channels * plane
    grads += image * channels * plane
    coordinate = tl.arange(0, PAD_D)[:, None]
    acc = tl.zeros([PAD_D, TILE_H * TILE_W], tl.float32)
    for dy in range(-radius_v, radius_v + 1):
        for dx in range(-radius_h, radius_h + 1):
            inside = valid & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            neighbour = pixel + (dy * width + dx)
            pull = tl.zeros([TILE_H * TILE_W], tl.float32)
            for start in range(0, channels, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                planes = c.to(tl.int64)[:, None] * plane
                here, there = planes + pixel[None, :], planes + neighbour[None, :]
                mask = (c < channels)[:, None] & inside[None, :]
                g_i = tl.load(grads + here, mask=mask, other=0.0).to(tl.float32)
                v_j = tl.load(values + there, mask=mask, other=0.0).to(tl.float32)
                v_i = tl.load(values + here, mask=mask, other=0.0).to(tl.float32)
                g_j = tl.load(grads + there, mask=mask, other=0.0).to(tl.float32)
                pull += tl.sum(g_i * v_j + v_i * g_j, 0)
            pull *= _kernel_to(features, pixel, neighbour, valid, inside, plane, D)
            for e in tl.static_range(D):
                f_i = tl.load(features + e * plane + pixel, mask=inside, other=0.0).to(tl.float32)
                f_j = tl.load(features + e * plane + neighbour, mask=inside, other=0.0).to(tl.float32)
                acc += tl.where(coordinate == e, (pull * (f_j - f_i))[None, :], 0.0)
    target = out + (image * D + coordinate.to(tl.int64)) * plane + pixel[None, :]
    tl.store(target, acc, mask=(coordinate < D) & valid[None, :])


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


def _served(values: Tensor) -> bool:
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"values must be float32, float16, bfloat16 or float64, got {values.dtype}")
    batch, channels, height, width = values.shape
    # A grid's second and third axes take 65535 programs; offsets inside a plane are 32-bit.
    sizes_served = values.numel() > 0 and batch < 2**16 and channels < 2**20 and height * width < 2**30
    return values.dtype != torch.float64 and sizes_served


def _arguments(features: Tensor, radius: Sequence[int]) -> tuple[int, dict[str, Any]]:
    """(tiles of an image, arguments that both kernels take)."""
    _, dimensions, height, width = features.shape
    radius_v, radius_h = clamped(radius, height, width)
    tiles_h, tiles_w = triton.cdiv(height, _TILE_H), triton.cdiv(width, _TILE_W)
    return tiles_h * tiles_w, {
        "features": features, "height": height, "width": width, "plane": height * width, "tiles_w": tiles_w,
        "radius_v": radius_v, "radius_h": radius_h, "D": dimensions, "TILE_H": _TILE_H, "TILE_W": _TILE_W,
    }  # fmt: skip


def _filtered(rows: Tensor, features: Tensor, radius: Sequence[int]) -> Tensor:
    batch, channels = rows.shape[:2]
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    block_c = min(_MAX_CHANNELS, triton.next_power_of_2(channels))
    tiles, arguments = _arguments(features, radius)
    arguments |= {"rows": rows, "out": out, "channels": channels, "BLOCK_C": block_c}
    _launch(_filter_kernel, (tiles, batch, triton.cdiv(channels, block_c)), arguments, _WARPS, rows.device)
    return out


def local_gaussian_filter(values: Tensor, features: Tensor, radius: Sequence[int]) -> Tensor:
    if not _served(values):
        return reference.local_gaussian_filter(values, features, radius)
    out = _filtered(values.contiguous(), features.contiguous(), radius)
    return out.add_(poison(features, (1, 2, 3)))


def local_gaussian_filter_backward(
    grad_out: Tensor,
    values: Tensor,
    features: Tensor,
    radius: Sequence[int],
    need_grad_values: bool,
    need_grad_features: bool,
) -> tuple[Tensor, Tensor]:
    if not _served(values):
        return reference.local_gaussian_filter_backward(
            grad_out, values, features, radius, need_grad_values, need_grad_features
        )
    grad, f, bad_features = grad_out.contiguous(), features.contiguous(), poison(features, (1, 2, 3))
    grad_values, grad_features = values.new_empty(0), features.new_empty(0)
    if need_grad_values:
        grad_values = _filtered(grad, f, radius).add_(bad_features).to(values.dtype)
    if need_grad_features:
        batch, channels = values.shape[:2]
        out = torch.empty(features.shape, dtype=torch.float32, device=features.device)
        tiles, arguments = _arguments(f, radius)
        arguments |= {
            "values": values.contiguous(), "grads": grad, "out": out, "channels": channels,
            "BLOCK_C": min(_MAX_CHANNELS, triton.next_power_of_2(channels)),
            "PAD_D": triton.next_power_of_2(features.shape[1]),
        }  # fmt: skip
        _launch(_grad_features_kernel, (tiles, batch), arguments, _WARPS, features.device)
        grad_features = out.add_(bad_features).to(features.dtype)
    return grad_values, grad_features
