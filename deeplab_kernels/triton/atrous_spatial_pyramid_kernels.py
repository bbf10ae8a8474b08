"""Device code of the atrous spatial pyramid; atrous_spatial_pyramid.py launches it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import triton
import triton.language as tl

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
from .atrous_depthwise_kernels import (
    _KEPT_TAPS,
    _forward_tiles,
    _grad_weight_tiles,
    _load_tile_weight,
)


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
        y = None
        if ys is not None:
            y = ys[r]
        branch_partials = None
        branch_counts = None
        if partials is not None:
            branch_partials = partials + r * slices * 2 * channels
            branch_counts = counts + r * slices
        _forward_tiles(
            x, branch_weight, y, mean, var, gamma, beta, branch_partials, branch_counts, eps, first, end, slice_index,
            c, c + r * channels, channels, channels, height, width, height, width, row_tiles, col_tiles, phases_h,
            phases_w, pad_top, pad_left, rate_h, rate_w, 1, KH, KW, 1, 1, ACTIVATION, True, FLAT, CHANNELS_LAST,
            TILE_H, TILE_W, BLOCK_C,
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
