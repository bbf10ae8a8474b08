"""Exact Gaussian filter of points with features, in Triton.

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j        (j = i included)

The functions have the signatures and results of :mod:`deeplab_kernels.reference.gaussian_filter`; they hand float64 and
empty tensors to the reference.

The shape of flash attention: a program owns a tile of outputs and goes through all tiles of summands; the part of the
kernel matrix of two tiles lives in registers and is multiplied with the values on tensor cores, sums in float32. Points
are sorted along a space-filling curve first, so that tiles are compact; pairs of tiles whose bounding boxes are further
apart than the cutoff (csrc/core/gaussian_filter.h) are skipped. Squared distances are sums of squared differences, not
the product form, so that features far from the origin lose nothing; the order of sums is fixed, results repeat bit for
bit.

Precision of the product of kernel and values: float16 and bfloat16 values round the kernel to their type; float32 ones
are multiplied in float32 unless torch.set_float32_matmul_precision allows TF32. The gradient w.r.t. features always
takes float32 or TF32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.gaussian_filter import poison

# Points of a tile of outputs and of one of summands; the latter divides the former. Warps of a program.
_BLOCK_I, _BLOCK_J, _WARPS = 128, 64, 8
# Channels that one program sums up; more are taken by further programs, which form the kernel again.
_MAX_CHANNELS = 64
# Boxes compared at once.
_CHUNK = tl.constexpr(16)
_MORTON_BITS, _MORTON_POINTS = 20, 1024
# exp(-s / 2) = 2^(_EXPONENT s)
_EXPONENT = tl.constexpr(-0.7213475204444817)


# Device code.


@triton.jit
def _morton_kernel(
    features,  # [B, D, points]
    low,  # [B, D]
    scale,  # [B], cells per unit
    codes,  # [B, points], int64
    points,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The number of each point's cell along the Z-order curve."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < points
    cells_per_unit = tl.load(scale + image)
    code = tl.zeros([BLOCK], tl.int64)
    for e in tl.static_range(D):
        f = tl.load(features + (image * D + e) * points + i, mask=valid, other=0.0)
        offset = (f - tl.load(low + image * D + e)) * cells_per_unit
        cell = tl.minimum(tl.maximum(offset, 0.0), 2.0**BITS - 1).to(tl.int64)
        for bit in tl.static_range(BITS):
            code = code | (((cell >> bit) & 1) << (bit * D + e))
    tl.store(codes + image * points + i, code, mask=valid)


@triton.jit
def _square(features, i, j, padded, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Squared distances of points i and j: [BLOCK_I, BLOCK_J]."""
    square = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for e in tl.static_range(D):
        difference = tl.load(features + e * padded + i)[:, None] - tl.load(features + e * padded + j)[None, :]
        square += difference * difference
    return square


@triton.jit
def _near_tiles(features, low, high, i, first, padded, tiles, cutoff, D: tl.constexpr):
    """Bit k: whether summands' tile first + k may matter to points i."""
    k = tl.arange(0, _CHUNK)
    tile = first + k
    exists = tile < tiles
    square = tl.zeros([_CHUNK], tl.float32)
    for e in tl.static_range(D):
        f = tl.load(features + e * padded + i)
        above = tl.load(low + e * tiles + tile, mask=exists, other=0.0) - tl.max(f, 0)
        below = tl.min(f, 0) - tl.load(high + e * tiles + tile, mask=exists, other=0.0)
        gap = tl.maximum(tl.maximum(above, below), 0.0)
        square += gap * gap
    return tl.sum(tl.where((square <= cutoff) & exists, 1 << k, 0), 0)


@triton.jit
def _filter_kernel(
    features,  # [B, D, padded], sorted
    low, high,  # [B, D, tiles], boxes of the tiles of summands
    order,  # [B, padded], int64
    rows,  # [B, padded, channels], sorted
    out,  # [B, out_channels, points], float32
    points, padded, tiles, channels, out_channels, output_tiles, cutoff,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) % output_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = (tl.program_id(0) // output_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    features += image * D * padded
    low += image * D * tiles
    high += image * D * tiles
    rows += image * padded * channels
    acc = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for first in range(0, tiles, _CHUNK):
        near = _near_tiles(features, low, high, i, first, padded, tiles, cutoff, D)
        for k in range(_CHUNK):
            if (near >> k) & 1:
                j = (first + k) * BLOCK_J + tl.arange(0, BLOCK_J)
                kernel = tl.exp2(_square(features, i, j, padded, D, BLOCK_I, BLOCK_J) * _EXPONENT)
                v = tl.load(rows + j.to(tl.int64)[:, None] * channels + c[None, :])
                acc = tl.dot(kernel.to(v.dtype), v, acc, input_precision=PRECISION)
    place = tl.load(order + image * padded + i)
    target = out + (image * out_channels + c[None, :]) * points + place[:, None]
    tl.store(target, acc, mask=(i < points)[:, None] & (c < out_channels)[None, :])


@triton.jit
def _grad_features_kernel(
    features,  # [B, D, padded], sorted
    low, high,  # [B, D, tiles]
    order,  # [B, padded], int64
    values, grads,  # [B, padded, channels], sorted, float32
    out,  # [B, D, points], float32
    points, padded, tiles, channels, cutoff,
    D: tl.constexpr, PAD_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad f_i = sum_j k_ij (f_j - f_i) (g_i.v_j + v_i.g_j)"""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    features += image * D * padded
    low += image * D * tiles
    high += image * D * tiles
    values += image * padded * channels
    grads += image * padded * channels
    at_i = i.to(tl.int64)[:, None] * channels
    coordinate = tl.arange(0, PAD_D)[None, :]
    acc = tl.zeros([BLOCK_I, PAD_D], tl.float32)
    for first in range(0, tiles, _CHUNK):
        near = _near_tiles(features, low, high, i, first, padded, tiles, cutoff, D)
        for k in range(_CHUNK):
            if (near >> k) & 1:
                j = (first + k) * BLOCK_J + tl.arange(0, BLOCK_J)
                at_j = j.to(tl.int64)[None, :] * channels
                pull = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
                for start in tl.range(0, channels, BLOCK_C, num_stages=1):
                    c = start + tl.arange(0, BLOCK_C)
                    g_i = tl.load(grads + at_i + c[None, :])
                    v_j = tl.load(values + at_j + c[:, None])
                    pull = tl.dot(g_i, v_j, pull, input_precision=PRECISION)
                    v_i = tl.load(values + at_i + c[None, :])
                    g_j = tl.load(grads + at_j + c[:, None])
                    pull = tl.dot(v_i, g_j, pull, input_precision=PRECISION)
                pull *= tl.exp2(_square(features, i, j, padded, D, BLOCK_I, BLOCK_J) * _EXPONENT)
                for e in tl.static_range(D):
                    f_i = tl.load(features + e * padded + i)[:, None]
                    f_j = tl.load(features + e * padded + j)[None, :]
                    along = tl.sum(pull * (f_j - f_i), 1)
                    acc += tl.where(coordinate == e, along[:, None], 0.0)
    place = tl.load(order + image * padded + i)
    target = out + (image * D + coordinate) * points + place[:, None]
    tl.store(target, acc, mask=(i < points)[:, None] & (coordinate < D))


# Host code.


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


def _precision(dtype: torch.dtype, *, may_round: bool = False) -> str:
    """tl.dot's precision of float32 operands; ``may_round``: they came from half precision."""
    allowed = may_round or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


class _Points:
    """The features sorted along a space-filling curve, with what depends on them alone."""

    def __init__(self, features: Tensor) -> None:
        f = features.float().contiguous()
        self.device = f.device
        self.batch, self.dimensions, self.count = f.shape
        block = max(_BLOCK_I, _BLOCK_J)
        self.padded = triton.cdiv(self.count, block) * block
        self.tiles = self.padded // _BLOCK_J
        order = self._morton_codes(f).argsort(dim=-1, stable=True)
        # Padding repeats the last point, so that boxes do not grow; its values are zero.
        self.order = torch.cat((order, order[:, -1:].expand(-1, self.padded - self.count)), 1)
        self.features = f.gather(2, self.order[:, None].expand(-1, self.dimensions, -1))
        tiled = self.features.view(self.batch, self.dimensions, self.tiles, _BLOCK_J)
        self.low, self.high = tiled.amin(-1), tiled.amax(-1)
        # csrc/core/gaussian_filter.h
        self.cutoff = 1.001 * 2 * math.log(2) * (24 + math.log2(self.count))

    def _morton_codes(self, f: Tensor) -> Tensor:
        bits = min(_MORTON_BITS, 63 // self.dimensions)
        low = f.amin(-1)
        extent = (f.amax(-1) - low).amax(-1)
        scale = torch.where(extent > 0, 2.0**bits / extent, 0.0)
        codes = torch.empty((self.batch, self.count), dtype=torch.int64, device=f.device)
        arguments = {
            "features": f, "low": low, "scale": scale, "codes": codes, "points": self.count,
            "D": self.dimensions, "BITS": bits, "BLOCK": _MORTON_POINTS,
        }  # fmt: skip
        _launch(_morton_kernel, (triton.cdiv(self.count, _MORTON_POINTS), self.batch), arguments, 4, f.device)
        return codes

    def sorted_rows(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, C, N) as [B, padded, C padded], zero in the padding."""
        channels = _padded_channels(t.shape[1])
        rows = torch.zeros((self.batch, self.padded, channels), dtype=dtype, device=self.device)
        order = self.order[:, : self.count, None].expand(-1, -1, t.shape[1])
        rows[:, : self.count, : t.shape[1]] = t.mT.gather(1, order)
        return rows

    def arguments(self) -> dict[str, Any]:
        return {
            "features": self.features, "low": self.low, "high": self.high, "order": self.order, "points": self.count,
            "padded": self.padded, "tiles": self.tiles, "cutoff": self.cutoff, "D": self.dimensions,
            "BLOCK_I": _BLOCK_I, "BLOCK_J": _BLOCK_J,
        }  # fmt: skip

    def filtered(self, t: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
        """(B, C, N) in float32: the filter of ``t``, whose sorted copy has ``dtype``."""
        rows = self.sorted_rows(t, dtype)
        out = torch.empty(t.shape, dtype=torch.float32, device=self.device)
        block_c = min(_MAX_CHANNELS, rows.shape[2])
        output_tiles = self.padded // _BLOCK_I
        arguments = self.arguments() | {
            "rows": rows, "out": out, "channels": rows.shape[2], "out_channels": t.shape[1],
            "output_tiles": output_tiles, "PRECISION": precision, "BLOCK_C": block_c,
        }  # fmt: skip
        _launch(_filter_kernel, (output_tiles * (rows.shape[2] // block_c), self.batch), arguments, _WARPS, self.device)
        return out

    def grad_features(self, values: Tensor, grad: Tensor, precision: str) -> Tensor:
        rows = [self.sorted_rows(t, torch.float32) for t in (values, grad)]
        out = torch.empty((self.batch, self.dimensions, self.count), dtype=torch.float32, device=self.device)
        channels = rows[0].shape[2]
        arguments = self.arguments() | {
            "values": rows[0], "grads": rows[1], "out": out, "channels": channels, "PRECISION": precision,
            "BLOCK_C": min(32, channels), "PAD_D": triton.next_power_of_2(self.dimensions),
        }  # fmt: skip
        _launch(_grad_features_kernel, (self.padded // _BLOCK_I, self.batch), arguments, _WARPS, self.device)
        return out


def _padded_channels(channels: int) -> int:
    """A power of two from 16 on, as tensor cores want them, or a multiple of what one program takes."""
    if channels > _MAX_CHANNELS:
        return triton.cdiv(channels, _MAX_CHANNELS) * _MAX_CHANNELS
    return max(16, triton.next_power_of_2(channels))


def _served(values: Tensor) -> bool:
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"values must be float32, float16, bfloat16 or float64, got {values.dtype}")
    # A grid's second axis takes 65535 programs.
    return values.dtype != torch.float64 and values.numel() > 0 and values.shape[0] < 2**16 and values.shape[2] < 2**30


def gaussian_filter(values: Tensor, features: Tensor) -> Tensor:
    if not _served(values):
        return reference.gaussian_filter(values, features)
    out = _Points(features).filtered(values, values.dtype, _precision(values.dtype))
    return out.add_(poison(values, 2)).add_(poison(features, (1, 2)))


def gaussian_filter_backward(
    grad_out: Tensor, values: Tensor, features: Tensor, need_grad_values: bool, need_grad_features: bool
) -> tuple[Tensor, Tensor]:
    if not _served(values):
        return reference.gaussian_filter_backward(grad_out, values, features, need_grad_values, need_grad_features)
    grad_values, grad_features = values.new_empty(0), features.new_empty(0)
    points, bad_features = _Points(features), poison(features, (1, 2))
    precision = _precision(torch.float32, may_round=values.dtype != torch.float32)
    if need_grad_values:
        out = points.filtered(grad_out, torch.float32, precision)
        grad_values = out.add_(poison(grad_out, 2)).add_(bad_features).to(values.dtype)
    if need_grad_features:
        out = points.grad_features(values, grad_out, precision)
        out.add_(poison(grad_out, (1, 2))).add_(poison(values, (1, 2))).add_(bad_features)
        grad_features = out.to(features.dtype)
    return grad_values, grad_features
