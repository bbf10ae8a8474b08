"""All depthwise rates of an atrous spatial pyramid and the image's mean, in Triton.

    y_r[n, c, i, j] = sum_{u,v} x[n, c, i + rate_r*(u - 1), j + rate_r*(v - 1)] w_r[c, 0, u, v]
    out_r = act(gamma_r * (y_r - mean_r) / sqrt(var_r + eps) + beta_r),  pooled[n, c] = mean_{i,j} x[n, c, i, j]

The functions have the signatures and results of :mod:`deeplab_kernels.reference.atrous_spatial_pyramid`; they take
float32, float16 and bfloat16 with float32 accumulation, and hand float64 and empty tensors to the reference.

A program takes a run of tiles of one image through all branches, one after the other, as atrous_depthwise.py takes them
through one. The tiles are pixels of one phase of the rates' greatest common divisor (channels_last): what any tap of a
branch reads is in the same phase, 6 x 6 pixels of a 33 x 33 map at rates 6, 12, 18, and stays in the L1 cache.

Memory traffic in tensors of x's size (X; R branches), where the caches keep a phase of an image:
    inference                   read X, write R X
    training, convolution kept  read X, write R X with the statistics; read R X, write R X
    training, recomputed        read X; read X, write R X
    backward of the norms       R times: read dout, Y; read dout, Y, write dY
    backward of the branches    read R X (dY) and X, write X: all gradients in one kernel

Weight gradients are summed branch by branch in registers; the gradient of x is gathered from all branches in a second
loop over the same tiles and rounded once. Partial sums are merged in a fixed order: no atomics, results repeat bit for
bit. Padding is multiplied as a zero, as by torch's convolutions in general: an infinite weight gives NaN there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from . import _tiling, atrous_depthwise
from ._tiles import (
    _by_channel,
    _load_gradient,
    _load_weight,
    _mask,
    _offsets,
    _pixels,
    _sum_pixels,
    _zeros,
)
from ._tiling import (
    _elements_per_thread,
    _geometry,
    _Shape,
    _tap_tiling,
    _Tiling,
    _unit,
)
from .atrous_depthwise import (
    _TAP_GROUP,
    _conv_gradient,
    _dense,
    _merge_statistics,
    _norm_sums,
    _normalise_into,
    _served,
    _sum_slices,
    _vector,
)
from .atrous_depthwise_kernels import (
    _KEPT_TAPS,
    _forward_tiles,
    _grad_weight_tiles,
    _load_tile_weight,
)

# Device code.


@triton.jit
def _run_of_image(channel_tiles, parts, per_image, steps, WIDE: tl.constexpr):
    """This program's channel tile, slice, image and tiles: slice s takes a part of image s // parts."""
    program = tl.program_id(0)
    slice_index = program // channel_tiles
    if WIDE:  # every index derived from it becomes 64-bit
        slice_index = slice_index.to(tl.int64)
    n = slice_index // parts
    first = n * per_image + (slice_index % parts) * steps
    return program % channel_tiles, slice_index, n, first, tl.minimum(first + steps, (n + 1) * per_image)


@triton.jit
def _pyramid_forward_kernel(
    x,  # [N, channels, height, width]
    weight,  # [R][taps][channels] in channels_last, else [R][channels][taps]
    ys,  # R of [N, channels, height, width], or None: only statistics are wanted
    mean, var, gamma, beta,  # [R][channels] each; mean None: no normalisation; gamma, beta None: 1, 0
    partials,  # [R][slices][mean, M2][channels] or None: no statistics
    counts,  # [R][slices]
    pool,  # [slices][channels], sums of x over height * width, or None
    eps, per_image, steps, parts, channel_tiles, channel_units, height, width, row_tiles, col_tiles, phases_h,
    phases_w,
    RATES_H: tl.constexpr, RATES_W: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, ACTIVATION: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = TILE_H * TILE_W
    channels = channel_units * UNIT  # tells the compiler what channels is divisible by
    channel_tile, slice_index, _image, first, end = _run_of_image(channel_tiles, parts, per_image, steps, WIDE)
    slices = tl.num_programs(0).to(tl.int64) // channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    c_valid = c < channels
    if pool is not None:
        sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
        for item in range(first, end):
            n, _, _, pixel, valid = _pixels(
                item, height, width, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
            )
            x_image = x + n.to(tl.int64) * height * width * channels
            offsets = _offsets(pixel, c, channels, height * width, CHANNELS_LAST)
            sums += tl.load(x_image + offsets, mask=_mask(valid, c_valid, CHANNELS_LAST), other=0.0).to(tl.float32)
        total = _sum_pixels(sums, CHANNELS_LAST) / (height * width)
        tl.store(pool + slice_index.to(tl.int64) * channels + c, total, mask=c_valid)
    for r in tl.static_range(BRANCHES):
        rate_h = RATES_H[r]
        rate_w = RATES_W[r]
        pad_top = rate_h * (KH - 1) // 2
        pad_left = rate_w * (KW - 1) // 2
        branch_weight = weight + r * KH * KW * channels
        if partials is None:
            _forward_tiles(
                x, branch_weight, ys[r], mean, var, gamma, beta, None, None, eps, first, end, slice_index, c,
                c + r * channels, channels, channels, height, width, height, width, row_tiles, col_tiles, phases_h,
                phases_w, pad_top, pad_left, rate_h, rate_w, 1, KH, KW, 1, 1, ACTIVATION, True, FLAT, CHANNELS_LAST,
                TILE_H, TILE_W, BLOCK_C,
            )  # fmt: skip
        elif ys is None:
            _forward_tiles(
                x, branch_weight, None, None, None, None, None, partials + r * slices * 2 * channels,
                counts + r * slices, eps, first, end, slice_index, c, c, channels, channels, height, width, height,
                width, row_tiles, col_tiles, phases_h, phases_w, pad_top, pad_left, rate_h, rate_w, 1, KH, KW, 1, 1,
                ACTIVATION, True, FLAT, CHANNELS_LAST, TILE_H, TILE_W, BLOCK_C,
            )  # fmt: skip
        else:
            _forward_tiles(
                x, branch_weight, ys[r], None, None, None, None, partials + r * slices * 2 * channels,
                counts + r * slices, eps, first, end, slice_index, c, c, channels, channels, height, width, height,
                width, row_tiles, col_tiles, phases_h, phases_w, pad_top, pad_left, rate_h, rate_w, 1, KH, KW, 1, 1,
                ACTIVATION, True, FLAT, CHANNELS_LAST, TILE_H, TILE_W, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _pyramid_backward_kernel(
    x, weight,  # as in _pyramid_forward_kernel
    grads,  # R of [N, channels, height, width]: gradients of the convolutions
    pooled,  # [N, channels], gradient of the mean, or None
    grad_x,  # like x, or None
    partials,  # [R][slices][taps][channels], of the weights' gradient, or None
    per_image, steps, parts, channel_tiles, channel_units, height, width, row_tiles, col_tiles, phases_h,
    phases_w,
    RATES_H: tl.constexpr, RATES_W: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Axis 1: groups of taps of the weights' gradient; the first also has grad_x."""
    TAPS: tl.constexpr = KH * KW
    PIXELS: tl.constexpr = TILE_H * TILE_W
    channels = channel_units * UNIT
    channel_tile, slice_index, image, first, end = _run_of_image(channel_tiles, parts, per_image, steps, WIDE)
    slices = tl.num_programs(0).to(tl.int64) // channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    c_valid = c < channels
    if partials is not None:
        for r in tl.static_range(BRANCHES):
            rate_h = RATES_H[r]
            rate_w = RATES_W[r]
            _grad_weight_tiles(
                grads[r], x, weight, None, partials + r * slices * TAPS * channels, first, end,
                slice_index, c, channels, channels, height, width, height, width, row_tiles, col_tiles, phases_h,
                phases_w, rate_h * (KH - 1) // 2, rate_w * (KW - 1) // 2, rate_h, rate_w, 1, KH, KW, GROUP, 1, 1, True,
                FLAT, CHANNELS_LAST, TILE_H, TILE_W, BLOCK_C,
            )  # fmt: skip
    if grad_x is not None:
        if tl.program_id(1) > 0:
            end = first
        from_mean = tl.zeros([BLOCK_C], tl.float32)
        if pooled is not None:
            row = pooled + image.to(tl.int64) * channels
            from_mean = tl.load(row + c, mask=c_valid, other=0.0).to(tl.float32) / (height * width)
        for item in range(first, end):
            n, h, w, pixel, valid = _pixels(
                item, height, width, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
            )
            start = n.to(tl.int64) * height * width * channels
            offsets = _offsets(pixel, c, channels, height * width, CHANNELS_LAST)
            mask = _mask(valid, c_valid, CHANNELS_LAST)
            sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST) + _by_channel(from_mean, CHANNELS_LAST)
            for r in tl.static_range(BRANCHES):
                rate_h = RATES_H[r]
                rate_w = RATES_W[r]
                branch_weight = weight + r * TAPS * channels
                if CHANNELS_LAST and TAPS <= _KEPT_TAPS:
                    for tap in tl.static_range(TAPS):
                        g = _load_gradient(
                            grads[r] + start, h, w, pixel, valid, c, c_valid, tap, channels, height, width,
                            rate_h * (KH - 1) // 2, rate_w * (KW - 1) // 2, rate_h, rate_w, KW, 1, 1, True,
                            CHANNELS_LAST,
                        )  # fmt: skip
                        sums += g * _load_tile_weight(branch_weight, tap, c, mask, channels, PIXELS)
                else:  # unrolled, the taps of all branches would not fit the registers
                    for tap in range(TAPS):
                        g = _load_gradient(
                            grads[r] + start, h, w, pixel, valid, c, c_valid, tap, channels, height, width,
                            rate_h * (KH - 1) // 2, rate_w * (KW - 1) // 2, rate_h, rate_w, KW, 1, 1, True,
                            CHANNELS_LAST,
                        )  # fmt: skip
                        sums += g * _load_weight(branch_weight, tap, c, c_valid, channels, TAPS, CHANNELS_LAST)
            tl.store(grad_x + start + offsets, sums.to(grad_x.dtype.element_ty), mask=mask)


# Host code.


def _shape(x: Tensor, weight: Tensor, dilation: Sequence[int]) -> _Shape:
    """Of a branch; its rate is the greatest common divisor of all: the phases that the tiles lie in."""
    batch, channels, height, width = x.shape
    rates = math.gcd(*dilation[::2]), math.gcd(*dilation[1::2])
    return _Shape(
        batch, channels, channels, height, width, height, width, (weight.shape[3], weight.shape[4]), (1, 1), 0, 0,
        rates, output_memory_format(x) == torch.channels_last, x.element_size(),
    )  # fmt: skip


def _run_tiling(shape: _Shape, elements: int) -> _Tiling:
    """The tiles of one image; steps are chosen for the whole batch."""
    one = replace(shape, batch=1)
    tiling = _tap_tiling(one, shape.channels, shape.rows, shape.cols, shape.rate, elements)
    programs = shape.batch * tiling.items * tiling.channel_tiles
    steps = max(1, min(_tiling._MAX_STEPS, programs // _tiling._ENOUGH_PROGRAMS))
    return replace(tiling, steps=min(steps, tiling.items))


def _arguments(x: Tensor, weight: Tensor, shape: _Shape, tiling: _Tiling, dilation: Sequence[int]) -> dict[str, Any]:
    unit = _unit(shape.channels)
    geometry = _geometry(shape, tiling)
    for name in ("items", "rows", "cols", "pad_top", "pad_left", "rate_h", "rate_w", "MULTIPLIER", "SH", "SW",
                 "SAME_WIDTH"):  # fmt: skip
        del geometry[name]
    return {
        **geometry, "x": x, "weight": weight, "per_image": tiling.items,
        "parts": tiling.slices, "channel_units": shape.channels // unit, "UNIT": unit, "BRANCHES": len(dilation) // 2,
        "RATES_H": tuple(dilation[::2]), "RATES_W": tuple(dilation[1::2]),
    }  # fmt: skip


def _kernel_weight(weight: Tensor, shape: _Shape) -> Tensor:
    """[R][taps][channels] in channels_last, so that a tap is read in vectors; [R][channels][taps] otherwise."""
    flat = weight.contiguous().view(weight.shape[0], shape.channels, shape.taps)
    return flat.transpose(1, 2).contiguous() if shape.channels_last else flat


def _images(x: Tensor, count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    memory_format = output_memory_format(x)
    return [torch.empty_like(x, dtype=dtype, memory_format=memory_format) for _ in range(count)]


def _vectors(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(weight.shape[:2], dtype=torch.float32, device=x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    dilation: Sequence[int],
    ys: list[Tensor] | None,
    *,
    pool: bool,
    statistics: bool = False,
    norm: dict[str, Any] | None = None,
    activation: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes ``ys``; returns (pooled, mean, var), the last two with ``statistics``."""
    per_thread = _elements_per_thread(shape, 3 if statistics else 1)
    tiling = _run_tiling(shape, 128 * per_thread)
    branches, slices = weight.shape[0], shape.batch * tiling.slices
    partials = counts = sums = None
    if statistics:
        partials = torch.empty((branches, slices, 2, shape.channels), dtype=torch.float32, device=x.device)
        counts = torch.empty((branches, slices), dtype=torch.float32, device=x.device)
    if pool:
        sums = torch.empty((shape.batch, tiling.slices, 1, shape.channels), dtype=torch.float32, device=x.device)
    arguments = {
        **_arguments(x, _kernel_weight(weight, shape), shape, tiling, dilation),
        **(norm or dict.fromkeys(("mean", "var", "gamma", "beta")) | {"eps": 0.0}),
        "ys": None if ys is None else tuple(ys), "partials": partials, "counts": counts, "pool": sums,
        "ACTIVATION": activation,
    }  # fmt: skip
    programs = shape.batch * tiling.programs
    atrous_depthwise._launch(_pyramid_forward_kernel, (programs,), arguments, tiling.warps(per_thread), x.device)
    pooled = x.new_empty(0)
    if sums is not None:
        pooled = x.new_empty((shape.batch, shape.channels, 1, 1))
        _sum_slices(sums, pooled)
    if partials is None or counts is None:
        return pooled, None, None
    mean, var = _vectors(x, weight), _vectors(x, weight)
    _merge_statistics(partials, counts, mean, var, shape.batch * shape.rows * shape.cols)
    return pooled, mean, var


def _norm(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> dict[str, Any]:
    return {"mean": _vector(mean), "var": _vector(var), "gamma": _vector(gamma), "beta": _vector(beta), "eps": eps}


def _of_branch(norm: dict[str, Any], r: int) -> dict[str, Any]:
    return {name: v[r] if isinstance(v, Tensor) else v for name, v in norm.items()}


def _backward(
    grads: Sequence[Tensor],
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """``grads``: of the convolutions, in the layout of ``x``."""
    grad_x = _images(x, 1)[0] if need_grad_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else 0)
    group = min(shape.taps, _TAP_GROUP)
    per_thread = _elements_per_thread(shape, group if need_grad_weight else 1)
    tiling = _run_tiling(shape, 128 * per_thread)
    partials = None
    if need_grad_weight:
        size = (weight.shape[0], shape.batch * tiling.slices, shape.taps, shape.channels)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
    arguments = {
        **_arguments(x, _kernel_weight(weight, shape), shape, tiling, dilation), "grads": tuple(grads),
        "pooled": _vector(grad_pooled), "grad_x": grad_x if need_grad_x else None, "partials": partials, "GROUP": group,
    }  # fmt: skip
    grid = (shape.batch * tiling.programs, triton.cdiv(shape.taps, group) if need_grad_weight else 1)
    atrous_depthwise._launch(_pyramid_backward_kernel, grid, arguments, tiling.warps(per_thread), x.device)
    if partials is not None:
        _sum_slices(partials, grad_weight)
    return grad_x, grad_weight


# The operators.


def atrous_spatial_pyramid(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    dilation: Sequence[int],
    pool: bool,
) -> tuple[list[Tensor], Tensor]:
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid(x, weight, gamma, beta, mean, var, eps, activation, dilation, pool)
    x = _dense(x)
    out = _images(x, weight.shape[0])
    norm = None if mean is None else _norm(gamma, beta, mean, var, eps)
    pooled, _, _ = _forward(
        x, weight, _shape(x, weight, dilation), dilation, out, pool=pool, norm=norm, activation=activation
    )
    return out, pooled


def atrous_spatial_pyramid_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    dilation: Sequence[int],
    pool: bool,
    save_conv: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid_training(
            x, weight, gamma, beta, eps, activation, dilation, pool, save_conv
        )
    x = _dense(x)
    shape = _shape(x, weight, dilation)
    conv = _images(x, weight.shape[0]) if save_conv else []
    pooled, mean, var = _forward(x, weight, shape, dilation, conv or None, pool=pool, statistics=True)
    assert mean is not None
    assert var is not None
    norm, out = _norm(gamma, beta, mean, var, eps), _images(x, weight.shape[0])
    if not save_conv:
        _forward(x, weight, shape, dilation, out, pool=False, norm=norm, activation=activation)
    for r, y in enumerate(conv):
        _normalise_into(out[r], y, shape, _of_branch(norm, r), activation)
    return out, conv, mean, var, pooled


def atrous_spatial_pyramid_backward(
    grad_out: Sequence[Tensor],
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor,
    conv: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    batch_statistics: bool,
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid_backward(
            grad_out, grad_pooled, x, weight, conv, gamma, beta, mean, var, eps, activation, batch_statistics, dilation,
            need_grad_x, need_grad_weight,
        )  # fmt: skip
    x = _dense(x)
    shape, memory_format = _shape(x, weight, dilation), output_memory_format(x)
    grads = [g.contiguous(memory_format=memory_format) for g in grad_out]
    grad_gamma = grad_beta = x.new_empty(0, dtype=torch.float32)
    if mean is not None:
        kept = [y.contiguous(memory_format=memory_format) for y in conv]
        if not kept:  # in float32: the forward pass activated the unrounded sums, and its mask must be found again
            kept = _images(x, len(grads), torch.float32)
            _forward(x, weight, shape, dilation, kept, pool=False)
        norm = _norm(gamma, beta, mean, var, eps)
        grad_gamma, grad_beta = _vectors(x, weight), _vectors(x, weight)
        sums = [_norm_sums(g, y, shape, _of_branch(norm, r), activation)
                for r, (g, y) in enumerate(zip(grads, kept, strict=True))]  # fmt: skip
        _sum_slices(torch.stack(sums), grad_beta, grad_gamma)
        if need_grad_x or need_grad_weight:
            grads = [
                _conv_gradient(
                    g, y, shape, _of_branch(norm, r), activation, batch_statistics, grad_beta[r], grad_gamma[r]
                )
                for r, (g, y) in enumerate(zip(grads, kept, strict=True))
            ]
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_grad_x or need_grad_weight:
        grad_x, grad_weight = _backward(grads, grad_pooled, x, weight, shape, dilation, need_grad_x, need_grad_weight)
    return grad_x, grad_weight, grad_gamma, grad_beta if mean is not None else grad_beta.clone()
