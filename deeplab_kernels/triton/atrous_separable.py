"""The whole atrous separable convolution in inference, as one Triton kernel.

    y[p, c] = act1(norm1(sum_t act0(x)[p + t, c] depthwise_weight[c, t]))        (tile by tile, never written)
    out[p, o] = act2(norm2(sum_c y[p, c] pointwise_weight[o, c]) + residual[p, o])

The function has the signature and result of :mod:`deeplab_kernels.reference.atrous_separable`; float32, float16 and
bfloat16 with float32 accumulation. y is rounded to x's dtype, as it is where two kernels pass it through memory.
Products of float32 use TF32 where torch's convolutions may (``torch.backends.cudnn.conv.fp32_precision``), otherwise
full float32. float64, empty tensors and channel multipliers go to the reference.

A program makes BLOCK_M pixels x BLOCK_N results. It goes through the channels BLOCK_K at a time: the weights' tile is
asked for first; while it is under way the depthwise tile is made in registers, as in atrous_depthwise.py, and becomes
an operand of the matrix product. channels_last: out = y w^T; contiguous: out^T = w y^T; so the fast axis in memory is
the tile's last in both.

Bytes, in tensors of the activation's size (X input, Y depthwise result, Z output; R residual where there is one):
    floor                           X + Z (+ R), and the weights once
    this kernel, main memory        X + Z (+ R): programs of one pixel tile run side by side, share x in the L2 cache
    two kernels                     X + 2 Y + Z; with the residual and the activation apart 3 Z + R more
    this kernel, L2 to a multiprocessor, for each pixel and channel and column of BLOCK_N results
                                    one to three rows of taps (a 3 x 3 kernel), BLOCK_N / BLOCK_M elements of weights

Recomputed: programs share nothing but caches, so y is made ceil(results / BLOCK_N) times. Another way was to loop over
the results inside a program, with y of all channels kept: BLOCK_M x channels elements, 190 KB at 728 channels x 128
pixels in 16 bits, do not fit beside a pipeline, and Triton does not index shared memory. So BLOCK_N is as wide as the
accumulators allow: with 256 columns in 8 warps (128 registers a thread) ASPP, decoder and entry flow, with at most 256
results, compute y once; 728 results three times, 1536 six.

What a second making of y costs. On an H100, per pixel and channel in 16 bits: 18 bytes through L1 at 29 TB/s are 0.6 ps
and 9 multiply-adds with their conversions 0.3 to 0.8 ps on the float32 units; 256 columns of the product are 0.64 ps at
800 TFLOP/s, their x and weights from L2 1.3 to 1.8 ps at 5.5 TB/s; writing and reading y is 1.3 ps at 3 TB/s. One
column is therefore expected to win, three and more to lose (benchmarks/NOTES_atrous_separable.md).

The configurations are chosen by reasoning, on a model of these costs (:func:`_tiling`); none has been timed.

Copies that are made: a tensor that is neither contiguous nor channels_last becomes contiguous, the residual takes x's
layout, and channels_last transposes the depthwise weight to [taps][channels].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from ._tiles import (
    _activate,
    _by_channel,
    _first_item,
    _load_tap,
    _load_weight,
    _mask,
    _offsets,
    _pixels,
    _zeros,
)
from ._tiling import (
    _geometry,
    _Shape,
    _shape,
    _Tiling,
    _unit,
)
from .atrous_depthwise import (
    _dense,
    _kernel_weight,
    _output,
    _served,
    _vector,
)

# Programs that run at the same time: the multiprocessors of an H100, each holding one of the largest tiles.
_MULTIPROCESSORS = 132
_BLOCK_M = (128, 64)
_MAX_BLOCK_N = 256
_STEP_BYTES = 64  # of one pixel's channels: BLOCK_K is 32 in 16 bits, 16 in float32
# Results that are finished together (residual, activation, store), and the halvings that lead there.
_PART = 32
_MAX_HALVINGS = tl.constexpr(4)
# Full float32 runs on the float32 units, with both operands in registers.
_IEEE_BLOCK_M, _IEEE_MAX_BLOCK_N = (64,), 64
# Making y of a pixel takes as long as this many columns of the product; fetching the weights of a column takes as long
# as the product of this many pixels.
_DEPTHWISE_COLUMNS = 256
_WEIGHT_PIXELS = 128


# Device code.


@triton.jit
def _normalise(z, c, c_valid, gamma, beta, mean, var, eps, CHANNELS_LAST: tl.constexpr):
    """gamma (z - mean) / sqrt(var + eps) + beta; what is None is left out."""
    if mean is not None:
        z -= _by_channel(tl.load(mean + c, mask=c_valid, other=0.0), CHANNELS_LAST)
    if var is not None:
        z *= _by_channel(tl.rsqrt(tl.load(var + c, mask=c_valid, other=1.0) + eps), CHANNELS_LAST)
    if gamma is not None:
        z *= _by_channel(tl.load(gamma + c, mask=c_valid, other=0.0), CHANNELS_LAST)
    if beta is not None:
        z += _by_channel(tl.load(beta + c, mask=c_valid, other=0.0), CHANNELS_LAST)
    return z


@triton.jit
def _halves(tile, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The tile's first and second BLOCK_C / 2 channels."""
    if CHANNELS_LAST:
        return tl.split(tl.permute(tl.reshape(tile, [PIXELS, 2, BLOCK_C // 2]), (0, 2, 1)))
    else:
        return tl.split(tl.permute(tl.reshape(tile, [2, BLOCK_C // 2, PIXELS]), (1, 2, 0)))


@triton.jit
def _separable_kernel(
    x,  # [N, channels, height, width]
    weight,  # depthwise: [taps][channels] in channels_last, else [channels][taps]
    pointwise_weight,  # [out_channels, channels]
    residual,  # [N, out_channels, rows, cols] or None
    out,  # [N, out_channels, rows, cols]
    gamma, beta, mean, var,  # [channels] each or None
    out_gamma, out_beta, out_mean, out_var,  # [out_channels] each or None
    eps, out_eps, channel_tiles, channel_units, out_units, height, width, rows, cols, row_tiles, col_tiles, phases_h,
    phases_w, pad_top, pad_left, rate_h, rate_w,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, OUT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """BLOCK_C: results of this program; BLOCK_K: channels of one step. channel_tiles: columns of programs."""
    PIXELS: tl.constexpr = TILE_H * TILE_W
    channels = channel_units * UNIT  # tells the compiler what channels is divisible by
    out_channels = out_units * OUT_UNIT
    column, _, item = _first_item(channel_tiles, 1, WIDE)
    n, i, j, pixel, valid = _pixels(
        item, rows, cols, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
    )  # fmt: skip
    x_image = x + n.to(tl.int64) * height * width * channels
    o = column * BLOCK_C + tl.arange(0, BLOCK_C)
    o_valid = o < out_channels
    sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
    # One stage: what is loaded through the taps would otherwise be staged in shared memory, nine tiles at a time.
    for first in tl.range(0, channels, BLOCK_K, num_stages=1):
        c = first + tl.arange(0, BLOCK_K)
        c_valid = c < channels
        w = tl.load(
            pointwise_weight + o[:, None].to(tl.int64) * channels + c[None, :],
            mask=o_valid[:, None] & c_valid[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            c = c.to(tl.int64)
        y = _zeros(PIXELS, BLOCK_K, CHANNELS_LAST)
        for tap in tl.range(0, KH * KW, num_stages=1):
            value = _load_tap(
                x_image, i, j, pixel, valid, c, c_valid, tap, channels, height, width, pad_top, pad_left, rate_h,
                rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
            )  # fmt: skip
            factor = _load_weight(weight, tap, c, c_valid, channels, KH * KW, CHANNELS_LAST)
            y += factor * _activate(value, PRE_ACTIVATION)
        # Channels that do not exist are zero here too: their weights, means and betas are read as zero.
        y = _normalise(y, c, c_valid, gamma, beta, mean, var, eps, CHANNELS_LAST)
        operand = _activate(y, ACTIVATION).to(x.dtype.element_ty)
        if CHANNELS_LAST:
            sums = tl.dot(operand, tl.trans(w), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(w, operand, sums, input_precision=PRECISION)
    # A few results at a time: with their addresses and the residual, all would not fit the registers.
    PARTS: tl.constexpr = BLOCK_C // PART
    parts = (sums,)
    for level in tl.static_range(_MAX_HALVINGS):
        if PART << level < BLOCK_C:
            halves = ()
            for k in tl.static_range(1 << level):
                halves += _halves(parts[k], PIXELS, BLOCK_C >> level, CHANNELS_LAST)  # type: ignore[assignment]
            parts = halves  # type: ignore[assignment]
    start = n.to(tl.int64) * rows * cols * out_channels
    for part in tl.static_range(PARTS):
        o = column * BLOCK_C + part * PART + tl.arange(0, PART)
        o_valid = o < out_channels
        z = _normalise(parts[part], o, o_valid, out_gamma, out_beta, out_mean, out_var, out_eps, CHANNELS_LAST)
        if WIDE:
            o = o.to(tl.int64)
        offsets = start + _offsets(pixel, o, out_channels, rows * cols, CHANNELS_LAST)
        mask = _mask(valid, o_valid, CHANNELS_LAST)
        if residual is not None:
            z += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets, _activate(z, OUT_ACTIVATION).to(out.dtype.element_ty), mask=mask)


# Host code.


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's precision of float32 operands: that of torch's own convolutions."""
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"


def _pixel_tiles(shape: _Shape, block_m: int) -> dict[str, Any]:
    """Cut of the output's plane: 8 rows of one phase of the rate, which share what their taps read, where that pads the
    plane by at most a fifth; otherwise consecutive pixels, across row ends."""
    pixels = shape.rows * shape.cols
    if shape.channels_last:
        phases = [
            r // math.gcd(r, s) if r // math.gcd(r, s) < size else 1
            for r, s, size in zip(shape.rate, shape.stride, (shape.rows, shape.cols), strict=True)
        ]
        tile = (8, block_m // 8)
        tiles = [triton.cdiv(triton.cdiv(size, phase), t)
                 for size, phase, t in zip((shape.rows, shape.cols), phases, tile, strict=True)]  # fmt: skip
        if 5 * math.prod((*tiles, *phases, *tile)) <= 6 * pixels:
            return {
                "tile_h": tile[0], "tile_w": tile[1], "phases_h": phases[0], "phases_w": phases[1],
                "row_tiles": tiles[0], "col_tiles": tiles[1], "flat": False,
                "items": shape.batch * math.prod((*tiles, *phases)),
            }  # fmt: skip
    row_tiles = triton.cdiv(pixels, block_m)
    return {
        "tile_h": 1, "tile_w": block_m, "phases_h": 1, "phases_w": 1, "row_tiles": row_tiles, "col_tiles": 1,
        "flat": True, "items": shape.batch * row_tiles,
    }  # fmt: skip


def _tiling(shape: _Shape, out_channels: int, precision: str) -> _Tiling:
    """The cheapest cut on a model of an H100: rounds of programs, times the time of one (the product or the fetching of
    its weights, whichever takes longer, and the depthwise tile)."""
    ieee = precision == "ieee" and shape.element_size == 4
    largest_n = _IEEE_MAX_BLOCK_N if ieee else _MAX_BLOCK_N
    largest_n = max(16, min(largest_n, triton.next_power_of_2(out_channels)))
    widths = [largest_n >> k for k in range(3) if largest_n >> k >= 16]

    def candidate(block_m: int, block_n: int) -> _Tiling:
        return _Tiling(
            block_c=block_n, channel_tiles=triton.cdiv(out_channels, block_n), steps=1, **_pixel_tiles(shape, block_m)
        )

    def cost(tiling: _Tiling) -> int:
        pixels = tiling.tile_h * tiling.tile_w
        one = tiling.block_c * max(pixels, _WEIGHT_PIXELS) + _DEPTHWISE_COLUMNS * pixels
        return triton.cdiv(tiling.programs, _MULTIPROCESSORS) * one

    return min(itertools.starmap(candidate, itertools.product(_IEEE_BLOCK_M if ieee else _BLOCK_M, widths)), key=cost)


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    residual: Tensor | None,
    depthwise_gamma: Tensor | None,
    depthwise_beta: Tensor | None,
    depthwise_mean: Tensor | None,
    depthwise_var: Tensor | None,
    pointwise_gamma: Tensor | None,
    pointwise_beta: Tensor | None,
    pointwise_mean: Tensor | None,
    pointwise_var: Tensor | None,
    depthwise_eps: float,
    pointwise_eps: float,
    pre_activation: int,
    depthwise_activation: int,
    pointwise_activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    served = _served(x, depthwise_weight) and pointwise_weight.numel() > 0
    if not served or depthwise_weight.shape[0] != x.shape[1]:
        return reference.atrous_separable_conv2d(
            x, depthwise_weight, pointwise_weight, residual, depthwise_gamma, depthwise_beta, depthwise_mean,
            depthwise_var, pointwise_gamma, pointwise_beta, pointwise_mean, pointwise_var, depthwise_eps,
            pointwise_eps, pre_activation, depthwise_activation, pointwise_activation, stride, padding, dilation,
        )  # fmt: skip
    x = _dense(x)
    shape = _shape(x, depthwise_weight, stride, padding, dilation)
    out_shape = replace(shape, channels=pointwise_weight.shape[0])
    out = _output(x, out_shape)
    precision = _precision(x.dtype)
    tiling = _tiling(shape, out_shape.channels, precision)
    unit, out_unit = _unit(shape.channels), _unit(out_shape.channels)
    geometry = _geometry(shape, tiling)
    for name in ("items", "steps", "MULTIPLIER"):
        del geometry[name]
    arguments = {
        **geometry, "x": x, "weight": _kernel_weight(depthwise_weight, shape),
        "pointwise_weight": pointwise_weight.contiguous(),
        "residual": None if residual is None else residual.contiguous(memory_format=output_memory_format(x)),
        "out": out,
        "gamma": _vector(depthwise_gamma), "beta": _vector(depthwise_beta),
        "mean": _vector(depthwise_mean), "var": _vector(depthwise_var),
        "out_gamma": _vector(pointwise_gamma), "out_beta": _vector(pointwise_beta),
        "out_mean": _vector(pointwise_mean), "out_var": _vector(pointwise_var),
        "eps": depthwise_eps, "out_eps": pointwise_eps,
        "channel_units": shape.channels // unit, "UNIT": unit,
        "out_units": out_shape.channels // out_unit, "OUT_UNIT": out_unit,
        "PRE_ACTIVATION": pre_activation, "ACTIVATION": depthwise_activation, "OUT_ACTIVATION": pointwise_activation,
        "PRECISION": precision, "WIDE": out_shape.wide, "BLOCK_K": _STEP_BYTES // x.element_size(),
        "PART": min(_PART, tiling.block_c),
    }  # fmt: skip
    warps = 8 if tiling.block_c * tiling.tile_h * tiling.tile_w >= 128 * 128 else 4
    _launch(_separable_kernel, (tiling.programs,), arguments, warps, x.device)
    return out
