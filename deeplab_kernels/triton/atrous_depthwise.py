"""Atrous depthwise convolution, alone and fused with batch normalisation and activation, in Triton.

    y[n, c*m + q, i, j] = sum_{u,v} x[n, c, s*i + r*u - p, s*j + r*v - p] w[c*m + q, 0, u, v]
    out = act(gamma * (y - mean) / sqrt(var + eps) + beta)

The functions have the signatures and results of :mod:`deeplab_kernels.reference.atrous_depthwise`; they take float32,
float16 and bfloat16 with float32 accumulation, and hand float64 and empty tensors to the reference.

How the work is cut. A tile is a few pixels times a few channels. In channels_last the channels are its fast axis and
its pixels are neighbours of one phase of the rate (rows i, i + r, i + 2r ...), so that the taps of a tile overlap; in
contiguous tensors its pixels are consecutive elements of a plane, across row ends. A program takes a run of tiles, down
the rows of a phase or along a plane: what the taps of one tile read, the next tile finds in the L1 cache.

Memory traffic in tensors of the activation's size (X input, Y output):
    inference                    read X, write Y
    training, convolution kept   read X, write Y with the statistics in its epilogue; read Y, write out
    training, recomputed         read X; read X, write out
    backward of the norm         read dout, Y; read dout, Y, write dY
    backward of the convolution  read dY, X, write dX: both gradients in one pass for kernels of up to 9 taps

Sums over pixels (statistics, gradients of weight, gamma and beta) are formed per program in registers, written as
[slices, ..., channels] in float32 and added up by a second kernel in a fixed order: no atomics, results repeat bit for
bit. Statistics are merged as (count, mean, M2) (Chan, Golub, LeVeque 1983), so a mean far from zero costs no digits.

Copies that are made: a tensor that is neither contiguous nor channels_last becomes contiguous, a gradient or saved
convolution in another layout than x takes x's, and channels_last transposes the weight to [taps][channels].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._layout import output_memory_format

_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
# Weight gradients that one program accumulates in registers: all of a 3 x 3 kernel.
_TAP_GROUP = 9
# The weights of so many taps are kept in registers and their loop is unrolled.
_KEPT_TAPS = tl.constexpr(9)
# A program takes several tiles once there are this many programs (an H100 holds about 1000 at a time) ...
_ENOUGH_PROGRAMS = 2048
# ... but no more than this many tiles.
_MAX_STEPS = 64
# From this many elements on, offsets inside one image (C*H*W) are 64-bit; offsets of whole images always are.
_WIDE_FROM = 2**31


# Device code.


@triton.jit
def _pixels(item, rows, cols, row_tiles, col_tiles, phases_h, phases_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
            FLAT: tl.constexpr):  # fmt: skip
    """Tile number -> image n and, per pixel of the tile, its row, column, index in the plane, and whether it exists."""
    p = tl.arange(0, TILE_H * TILE_W)
    if FLAT:
        n = item // row_tiles
        pixel = (item % row_tiles) * (TILE_H * TILE_W) + p
        i = pixel // cols
        j = pixel % cols
        valid = pixel < rows * cols
    else:
        row_tile = item % row_tiles
        rest = item // row_tiles
        col_tile = rest % col_tiles
        rest = rest // col_tiles
        phase_w = rest % phases_w
        rest = rest // phases_w
        phase_h = rest % phases_h
        n = rest // phases_h
        i = phase_h + phases_h * (row_tile * TILE_H + p // TILE_W)
        j = phase_w + phases_w * (col_tile * TILE_W + p % TILE_W)
        pixel = i * cols + j
        valid = (i < rows) & (j < cols)
    return n, i, j, pixel, valid


@triton.jit
def _offsets(pixel, c, channels, plane, CHANNELS_LAST: tl.constexpr):
    """Offsets inside one image: [pixels, channels] in channels_last, else [channels, pixels]; the fast axis is last."""
    if CHANNELS_LAST:
        return pixel[:, None] * channels + c[None, :]
    else:
        return c[:, None] * plane + pixel[None, :]


@triton.jit
def _mask(pixels, channels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return pixels[:, None] & channels[None, :]
    else:
        return channels[:, None] & pixels[None, :]


@triton.jit
def _by_channel(v, CHANNELS_LAST: tl.constexpr):
    return v[None, :] if CHANNELS_LAST else v[:, None]


@triton.jit
def _by_pixel(v, CHANNELS_LAST: tl.constexpr):
    return v[:, None] if CHANNELS_LAST else v[None, :]


@triton.jit
def _sum_pixels(tile, CHANNELS_LAST: tl.constexpr):
    return tl.sum(tile, 0 if CHANNELS_LAST else 1)


@triton.jit
def _zeros(PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    return tl.zeros([PIXELS, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, PIXELS], tl.float32)


@triton.jit
def _load_weight(weight, tap, c, c_valid, channels, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """One tap of [taps][channels] (channels_last) or [channels][taps]."""
    offset = tap * channels + c if CHANNELS_LAST else c * TAPS + tap
    return _by_channel(tl.load(weight + offset, mask=c_valid, other=0.0).to(tl.float32), CHANNELS_LAST)


@triton.jit
def _load_weights(weight, c, c_valid, channels, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """All taps, to be kept in registers: in a loop each would be loaded, and often passed between threads, anew."""
    weights = ()
    for tap in tl.static_range(TAPS):
        kept = _load_weight(weight, tap, c, c_valid, channels, TAPS, CHANNELS_LAST)
        weights = weights + (kept,)  # type: ignore[assignment]  # noqa: RUF005
    return weights


@triton.jit
def _load_tap(image, i, j, pixel, valid, c, c_valid, tap, channels, height, width, pad_top, pad_left, rate_h, rate_w,
              KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SAME_WIDTH: tl.constexpr,
              CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """What outputs (i, j) read through one tap; zero outside the image."""
    down = (tap // KW) * rate_h - pad_top
    right = (tap % KW) * rate_w - pad_left
    h = i * SH + down
    w = j * SW + right
    inside = valid & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    # With equal widths and stride 1 a tap is a constant distance in memory: loads stay contiguous across row ends.
    source = pixel + (down * width + right) if SAME_WIDTH else h * width + w
    offsets = _offsets(source, c, channels, height * width, CHANNELS_LAST)
    return tl.load(image + offsets, mask=_mask(inside, c_valid, CHANNELS_LAST), other=0.0).to(tl.float32)


@triton.jit
def _load_gradient(image, h, w, pixel, valid, c, c_valid, tap, channels, rows, cols, pad_top, pad_left, rate_h, rate_w,
                   KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SAME_WIDTH: tl.constexpr,
                   CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """The gradient of the output that read inputs (h, w) through one tap; zero where there is none."""
    up = pad_top - (tap // KW) * rate_h
    left = pad_left - (tap % KW) * rate_w
    i = h + up
    j = w + left
    inside = valid & (i >= 0) & (j >= 0)
    if SH > 1:
        inside = inside & (i % SH == 0)
        i = i // SH
    if SW > 1:
        inside = inside & (j % SW == 0)
        j = j // SW
    inside = inside & (i < rows) & (j < cols)
    source = pixel + (up * cols + left) if SAME_WIDTH else i * cols + j
    offsets = _offsets(source, c, channels, rows * cols, CHANNELS_LAST)
    return tl.load(image + offsets, mask=_mask(inside, c_valid, CHANNELS_LAST), other=0.0).to(tl.float32)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    # Written so that NaN propagates, as torch.relu and relu6 do.
    if ACTIVATION >= 1:
        z = tl.where(z < 0, 0.0, z)
    if ACTIVATION == 2:
        z = tl.where(z > 6, 6.0, z)
    return z


@triton.jit
def _through_activation(grad, z, ACTIVATION: tl.constexpr):
    """Gradient at pre-activation z; zero at the kinks, as torch's relu and hardtanh backward have it."""
    if ACTIVATION >= 1:
        grad = tl.where(z <= 0, 0.0, grad)
    if ACTIVATION == 2:
        grad = tl.where(z >= 6, 0.0, grad)
    return grad


@triton.jit
def _load_or(vector, c, c_valid, default: tl.constexpr):
    if vector is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(vector + c, mask=c_valid, other=default)


@triton.jit
def _first_item(channel_tiles, steps, WIDE: tl.constexpr):
    """This program's channel tile, slice and first tile. Programs of neighbouring channels run next to each other."""
    program = tl.program_id(0)
    slice_index = program // channel_tiles
    if WIDE:  # every index derived from it becomes 64-bit
        slice_index = slice_index.to(tl.int64)
    return program % channel_tiles, slice_index, slice_index * steps


@triton.jit
def _forward_tiles(
    x, weight, y, mean, var, gamma, beta, partials, counts, eps,  # as in _forward_kernel
    first, end, slice_index,  # tiles, and where their statistics go
    c, row_c,  # channels of the image, and where the vectors have them
    channels, in_channels, height, width, rows, cols, row_tiles, col_tiles, phases_h, phases_w, pad_top, pad_left,
    rate_h, rate_w,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    ACTIVATION: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution of tiles [first, end) of one tile of channels."""
    TAPS: tl.constexpr = KH * KW
    PIXELS: tl.constexpr = TILE_H * TILE_W
    c_valid = c < channels
    if MULTIPLIER == 1:
        c_in = c
        x_channels = channels
    else:
        c_in = c // MULTIPLIER
        x_channels = in_channels
    if mean is not None:
        centre = _by_channel(tl.load(mean + row_c, mask=c_valid, other=0.0), CHANNELS_LAST)
        variance = tl.load(var + row_c, mask=c_valid, other=1.0)
        scale = _by_channel(tl.rsqrt(variance + eps) * _load_or(gamma, row_c, c_valid, 1.0), CHANNELS_LAST)
        shift = _by_channel(_load_or(beta, row_c, c_valid, 0.0), CHANNELS_LAST)
    if TAPS <= _KEPT_TAPS:
        weights = _load_weights(weight, c, c_valid, channels, TAPS, CHANNELS_LAST)
    if partials is not None:  # Welford's running mean and M2, one per lane
        lane_count = tl.zeros([PIXELS], tl.float32)
        lane_mean = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
        lane_m2 = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
    for item in range(first, end):
        n, i, j, pixel, valid = _pixels(
            item, rows, cols, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
        )
        x_image = x + n.to(tl.int64) * height * width * x_channels
        sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
        if TAPS <= _KEPT_TAPS:
            for tap in tl.static_range(TAPS):
                sums += weights[tap] * _load_tap(
                    x_image, i, j, pixel, valid, c_in, c_valid, tap, x_channels, height, width, pad_top, pad_left,
                    rate_h, rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
                )  # fmt: skip
        else:
            for tap in range(TAPS):
                sums += _load_weight(weight, tap, c, c_valid, channels, TAPS, CHANNELS_LAST) * _load_tap(
                    x_image, i, j, pixel, valid, c_in, c_valid, tap, x_channels, height, width, pad_top, pad_left,
                    rate_h, rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
                )  # fmt: skip
        if partials is not None:
            lane_count += valid.to(tl.float32)
            share = _by_pixel(1.0 / tl.maximum(lane_count, 1.0), CHANNELS_LAST)
            value = tl.where(_by_pixel(valid, CHANNELS_LAST), sums, lane_mean)
            difference = value - lane_mean
            lane_mean += difference * share
            lane_m2 += difference * (value - lane_mean)
        if y is not None:
            if mean is not None:
                sums = _activate((sums - centre) * scale + shift, ACTIVATION)
            offsets = _offsets(pixel, c, channels, rows * cols, CHANNELS_LAST)
            y_image = y + n.to(tl.int64) * rows * cols * channels
            tl.store(y_image + offsets, sums.to(y.dtype.element_ty), mask=_mask(valid, c_valid, CHANNELS_LAST))
    if partials is not None:
        count = tl.sum(lane_count, 0)
        lane_weight = _by_pixel(lane_count, CHANNELS_LAST)
        slice_mean = _sum_pixels(lane_mean * lane_weight, CHANNELS_LAST) / tl.maximum(count, 1.0)
        away = lane_mean - _by_channel(slice_mean, CHANNELS_LAST)
        rounding = _sum_pixels(lane_weight * away, CHANNELS_LAST) / tl.maximum(count, 1.0)
        slice_m2 = _sum_pixels(lane_m2 + lane_weight * away * away, CHANNELS_LAST) - count * rounding * rounding
        slice_mean += rounding  # of the large sum above
        tl.store(counts + slice_index, count)  # the same from every channel tile
        row = partials + slice_index.to(tl.int64) * 2 * channels
        tl.store(row + c, slice_mean, mask=c_valid)
        tl.store(row + channels + c, slice_m2, mask=c_valid)


@triton.jit
def _forward_kernel(
    x,  # [N, in_channels, height, width]
    weight,  # [taps][channels] in channels_last, else [channels][taps]
    y,  # [N, channels, rows, cols] or None: only statistics are wanted
    mean, var, gamma, beta,  # [channels] each; mean None: no normalisation; gamma, beta None: 1, 0
    partials,  # [slices][mean, M2][channels] or None: no statistics
    counts,  # [slices]
    eps, items, steps, channel_tiles, channel_units, in_channels, height, width, rows, cols, row_tiles, col_tiles,
    phases_h, phases_w, pad_top, pad_left, rate_h, rate_w,
    UNIT: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, ACTIVATION: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = channel_units * UNIT  # tells the compiler what channels is divisible by
    channel_tile, slice_index, first = _first_item(channel_tiles, steps, WIDE)
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    _forward_tiles(
        x, weight, y, mean, var, gamma, beta, partials, counts, eps, first, tl.minimum(first + steps, items),
        slice_index, c, c, channels, in_channels, height, width, rows, cols, row_tiles, col_tiles, phases_h, phases_w,
        pad_top, pad_left, rate_h, rate_w, MULTIPLIER, KH, KW, SH, SW, ACTIVATION, SAME_WIDTH, FLAT, CHANNELS_LAST,
        TILE_H, TILE_W, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _merge_statistics_kernel(
    partials,  # [slices][mean, M2][channels]
    counts,  # [slices]
    mean, var,  # [channels], var biased
    count,  # of all slices
    slices, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean = sum(count_s mean_s) / count, M2 = sum(M2_s + count_s (mean_s - mean)^2). Axis 1: branches."""
    branch = tl.program_id(1)
    partials += branch.to(tl.int64) * slices * 2 * channels
    counts += branch * slices
    mean += branch * channels
    var += branch * channels
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, slices, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < slices)[:, None] & (c < channels)[None, :]
        weight = tl.load(counts + s, mask=s < slices, other=0.0)[:, None]
        total += weight * tl.load(partials + s[:, None].to(tl.int64) * 2 * channels + c[None, :], mask=mask, other=0.0)
    centre = tl.sum(total, 0) / count
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    rest = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, slices, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < slices)[:, None] & (c < channels)[None, :]
        weight = tl.load(counts + s, mask=s < slices, other=0.0)[:, None]
        row = partials + s[:, None].to(tl.int64) * 2 * channels + c[None, :]
        away = tl.load(row, mask=mask, other=0.0) - centre[None, :]
        m2 += tl.load(row + channels, mask=mask, other=0.0) + weight * away * away
        rest += weight * away
    rounding = tl.sum(rest, 0) / count  # of the large sum above
    tl.store(mean + c, centre + rounding, mask=c < channels)
    variance = tl.sum(m2, 0) / count - rounding * rounding
    tl.store(var + c, tl.where(variance < 0, 0.0, variance), mask=c < channels)


@triton.jit
def _channel_of_element(start, channels, plane, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channels of elements start, start + 1 ...: 64-bit arithmetic on the scalar only."""
    e = tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        return ((start % channels).to(tl.int32) + e) % channels
    else:
        return ((start // plane % channels).to(tl.int32) + ((start % plane).to(tl.int32) + e) // plane) % channels


@triton.jit
def _normalise_kernel(
    y, out,  # elements in memory order
    mean, var, gamma, beta, eps, element_units, channel_units, plane,
    ELEMENT_UNIT: tl.constexpr, UNIT: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    c = _channel_of_element(start, channel_units * UNIT, plane, BLOCK, CHANNELS_LAST)
    e = tl.arange(0, BLOCK)
    valid = e < (element_units - start // ELEMENT_UNIT) * ELEMENT_UNIT  # 64-bit, and its divisor is known
    value = tl.load(y + start + e, mask=valid, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.load(var + c) + eps)
    if gamma is not None:
        scale *= tl.load(gamma + c)
    z = (value - tl.load(mean + c)) * scale
    if beta is not None:
        z += tl.load(beta + c)
    tl.store(out + start + e, _activate(z, ACTIVATION).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _norm_sums_kernel(
    grad, y,  # [N, channels, pixels]
    mean, var, gamma, beta,
    partials,  # [slices][sum g, sum g xhat][channels]
    eps, items, steps, channel_tiles, channel_units, pixels, tiles,
    UNIT: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = channel_units * UNIT
    channel_tile, slice_index, first = _first_item(channel_tiles, steps, WIDE)
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    c_valid = c < channels
    centre = _by_channel(tl.load(mean + c, mask=c_valid, other=0.0), CHANNELS_LAST)
    invstd = _by_channel(tl.rsqrt(tl.load(var + c, mask=c_valid, other=1.0) + eps), CHANNELS_LAST)
    factor = _by_channel(_load_or(gamma, c, c_valid, 1.0), CHANNELS_LAST)
    shift = _by_channel(_load_or(beta, c, c_valid, 0.0), CHANNELS_LAST)
    sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
    products = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
    for item in range(first, tl.minimum(first + steps, items)):
        n, _, _, pixel, valid = _pixels(item, 1, pixels, tiles, 1, 1, 1, 1, PIXELS, True)
        image = n.to(tl.int64) * pixels * channels
        offsets = _offsets(pixel, c, channels, pixels, CHANNELS_LAST)
        mask = _mask(valid, c_valid, CHANNELS_LAST)
        g = tl.load(grad + image + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(y + image + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = (value - centre) * invstd
        g = _through_activation(g, xhat * factor + shift, ACTIVATION)
        sums += g
        products += tl.where(mask, g * xhat, 0.0)
    row = partials + slice_index.to(tl.int64) * 2 * channels
    tl.store(row + c, _sum_pixels(sums, CHANNELS_LAST), mask=c_valid)
    tl.store(row + channels + c, _sum_pixels(products, CHANNELS_LAST), mask=c_valid)


@triton.jit
def _sum_slices_kernel(
    partials,  # [branches][slices][rows][channels]
    first,  # [branches][channels][rows]; [branches][channels] if second is not None
    second,  # [branches][channels] or None: then there are two rows, one for each
    slices, rows, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    branch = tl.program_id(2)
    partials += branch.to(tl.int64) * slices * rows * channels
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, slices, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < slices)[:, None] & (c < channels)[None, :]
        line = s.to(tl.int64) * rows + row
        sums += tl.load(partials + line[:, None] * channels + c[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0).to(first.dtype.element_ty)
    if second is None:
        tl.store(first + (branch * channels + c) * rows + row, total, mask=c < channels)
    elif row == 0:
        tl.store(first + branch * channels + c, total, mask=c < channels)
    else:
        tl.store(second + branch * channels + c, total, mask=c < channels)


@triton.jit
def _norm_grad_kernel(
    grad, y, grad_y,  # elements in memory order
    mean, var, gamma, beta, sum_g, sum_gx,  # [channels]
    count, eps, element_units, channel_units, plane,
    ELEMENT_UNIT: tl.constexpr, UNIT: tl.constexpr, ACTIVATION: tl.constexpr, BATCH_STATISTICS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_y = gamma / std * (g - mean(g) - xhat * mean(g xhat)); the means only if mean and var depend on x."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    c = _channel_of_element(start, channel_units * UNIT, plane, BLOCK, CHANNELS_LAST)
    e = tl.arange(0, BLOCK)
    valid = e < (element_units - start // ELEMENT_UNIT) * ELEMENT_UNIT  # 64-bit, and its divisor is known
    g = tl.load(grad + start + e, mask=valid, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.load(var + c) + eps)
    xhat = (tl.load(y + start + e, mask=valid, other=0.0).to(tl.float32) - tl.load(mean + c)) * scale
    z = xhat
    if gamma is not None:
        factor = tl.load(gamma + c)
        z *= factor
        scale *= factor
    if beta is not None:
        z += tl.load(beta + c)
    g = _through_activation(g, z, ACTIVATION)
    if BATCH_STATISTICS:
        g -= (tl.load(sum_g + c) + xhat * tl.load(sum_gx + c)) / count
    tl.store(grad_y + start + e, (g * scale).to(grad_y.dtype.element_ty), mask=valid)


@triton.jit
def _grad_input_kernel(
    grad,  # [N, in_channels * MULTIPLIER, rows, cols]
    weight, grad_x,  # as in _forward_kernel; grad_x like x
    items, steps, channel_tiles, channel_units, height, width, rows, cols, row_tiles, col_tiles, phases_h, phases_w,
    pad_top, pad_left, rate_h, rate_w,
    UNIT: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    in_channels = channel_units * UNIT
    channels = in_channels * MULTIPLIER
    channel_tile, _, first = _first_item(channel_tiles, steps, WIDE)
    c_in = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c_in = c_in.to(tl.int64)
    c_valid = c_in < in_channels
    KEEP_WEIGHTS: tl.constexpr = MULTIPLIER == 1 and TAPS <= _KEPT_TAPS
    if KEEP_WEIGHTS:
        weights = _load_weights(weight, c_in, c_valid, channels, TAPS, CHANNELS_LAST)
    for item in range(first, tl.minimum(first + steps, items)):
        n, h, w, pixel, valid = _pixels(
            item, height, width, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
        )
        grad_image = grad + n.to(tl.int64) * rows * cols * channels
        sums = _zeros(TILE_H * TILE_W, BLOCK_C, CHANNELS_LAST)
        if KEEP_WEIGHTS:
            for tap in tl.static_range(TAPS):
                sums += weights[tap] * _load_gradient(
                    grad_image, h, w, pixel, valid, c_in, c_valid, tap, channels, rows, cols, pad_top, pad_left,
                    rate_h, rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
                )  # fmt: skip
        else:
            for k in range(TAPS * MULTIPLIER):
                c = c_in * MULTIPLIER + k // TAPS
                sums += _load_weight(weight, k % TAPS, c, c_valid, channels, TAPS, CHANNELS_LAST) * _load_gradient(
                    grad_image, h, w, pixel, valid, c, c_valid, k % TAPS, channels, rows, cols, pad_top, pad_left,
                    rate_h, rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
                )  # fmt: skip
        offsets = _offsets(pixel, c_in, in_channels, height * width, CHANNELS_LAST)
        x_image = grad_x + n.to(tl.int64) * height * width * in_channels
        tl.store(x_image + offsets, sums.to(grad_x.dtype.element_ty), mask=_mask(valid, c_valid, CHANNELS_LAST))


@triton.jit
def _load_tile_weight(weight, tap, c, mask, channels, PIXELS: tl.constexpr):
    """One tap in channels_last, loaded for each pixel, so that every thread loads its own vector."""
    row = weight + tap * channels + tl.zeros([PIXELS, 1], tl.int32)
    return tl.load(row + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _grad_weight_tiles(
    grad, x, weight, grad_x, partials,  # as in _grad_weight_kernel
    first, end, slice_index, c,  # tiles, where their sums go, channels
    channels, in_channels, height, width, rows, cols, row_tiles, col_tiles, phases_h, phases_w, pad_top, pad_left,
    rate_h, rate_w,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of tiles [first, end) of one tile of channels, for the group of taps that axis 1 names."""
    TAPS: tl.constexpr = KH * KW
    PIXELS: tl.constexpr = TILE_H * TILE_W
    c_valid = c < channels
    if MULTIPLIER == 1:
        c_in = c
        x_channels = channels
    else:
        c_in = c // MULTIPLIER
        x_channels = in_channels
    if GROUP == TAPS:
        first_tap: tl.constexpr = 0
    else:
        first_tap = tl.program_id(1) * GROUP
    if grad_x is not None and not CHANNELS_LAST:
        weights = _load_weights(weight, c, c_valid, channels, TAPS, CHANNELS_LAST)
    tap_sums = ()
    for _ in tl.static_range(GROUP):
        tap_sums = tap_sums + (_zeros(PIXELS, BLOCK_C, CHANNELS_LAST),)  # type: ignore[assignment]  # noqa: RUF005
    for item in range(first, end):
        n, h, w, pixel, valid = _pixels(
            item, height, width, row_tiles, col_tiles, phases_h, phases_w, TILE_H, TILE_W, FLAT
        )
        grad_image = grad + n.to(tl.int64) * rows * cols * channels
        x_start = n.to(tl.int64) * height * width * x_channels
        offsets = _offsets(pixel, c_in, x_channels, height * width, CHANNELS_LAST)
        mask = _mask(valid, c_valid, CHANNELS_LAST)
        value = tl.load(x + x_start + offsets, mask=mask, other=0.0).to(tl.float32)
        sums = _zeros(PIXELS, BLOCK_C, CHANNELS_LAST)
        updated = ()
        for k in tl.static_range(GROUP):
            g = _load_gradient(
                grad_image, h, w, pixel, valid, c, c_valid, first_tap + k, channels, rows, cols, pad_top, pad_left,
                rate_h, rate_w, KW, SH, SW, SAME_WIDTH, CHANNELS_LAST,
            )  # fmt: skip
            updated = updated + (tap_sums[k] + g * value,)  # type: ignore[assignment]  # noqa: RUF005
            if grad_x is not None:
                if CHANNELS_LAST:
                    # All taps would not fit the registers.
                    sums += g * _load_tile_weight(weight, k, c, mask, channels, PIXELS)
                else:
                    sums += g * weights[k]
        tap_sums = updated
        if grad_x is not None:
            tl.store(grad_x + x_start + offsets, sums.to(grad_x.dtype.element_ty), mask=mask)
    for k in tl.static_range(GROUP):
        row = partials + (slice_index.to(tl.int64) * TAPS + first_tap + k) * channels
        exists = c < (TAPS - first_tap - k) * channels  # the last group of a large kernel may reach past its end
        tl.store(row + c, _sum_pixels(tap_sums[k], CHANNELS_LAST), mask=c_valid & exists)


@triton.jit
def _grad_weight_kernel(
    grad, x, weight,  # as in _grad_input_kernel; channels = in_channels * MULTIPLIER
    grad_x,  # like x, or None. Not None only for one group of taps and MULTIPLIER 1
    partials,  # [slices][taps][channels]
    items, steps, channel_tiles, channel_units, in_channels, height, width, rows, cols, row_tiles, col_tiles, phases_h,
    phases_w, pad_top, pad_left, rate_h, rate_w,
    UNIT: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, SAME_WIDTH: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the inputs: grad_weight[u, v] = sum_{h,w} x[h, w] * (gradient of the output that read it through u, v).

    The gathered gradients are also what grad_x adds up, so one pass over them gives both.
    """
    channels = channel_units * UNIT
    channel_tile, slice_index, first = _first_item(channel_tiles, steps, WIDE)
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    _grad_weight_tiles(
        grad, x, weight, grad_x, partials, first, tl.minimum(first + steps, items), slice_index, c, channels,
        in_channels, height, width, rows, cols, row_tiles, col_tiles, phases_h, phases_w, pad_top, pad_left, rate_h,
        rate_w, MULTIPLIER, KH, KW, GROUP, SH, SW, SAME_WIDTH, FLAT, CHANNELS_LAST, TILE_H, TILE_W, BLOCK_C,
    )  # fmt: skip


# Host code.


@dataclass(frozen=True)
class _Shape:
    """Geometry of one call. channels are the output's."""

    batch: int
    in_channels: int
    channels: int
    height: int
    width: int
    rows: int
    cols: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad_top: int
    pad_left: int
    rate: tuple[int, int]
    channels_last: bool
    element_size: int

    @property
    def multiplier(self) -> int:
        return self.channels // self.in_channels

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def wide(self) -> bool:
        return max(self.in_channels * self.height * self.width, self.channels * self.rows * self.cols) >= _WIDE_FROM

    @property
    def same_width(self) -> bool:
        return self.stride == (1, 1) and self.width == self.cols


@dataclass(frozen=True)
class _Tiling:
    """How the pixels and channels of a tensor are cut into tiles, and the tiles into programs."""

    block_c: int
    tile_h: int
    tile_w: int
    phases_h: int
    phases_w: int
    row_tiles: int
    col_tiles: int
    channel_tiles: int
    items: int  # tiles of one channel tile
    steps: int  # tiles that one program takes
    flat: bool

    @property
    def slices(self) -> int:
        return triton.cdiv(self.items, self.steps)

    @property
    def programs(self) -> int:
        return self.slices * self.channel_tiles

    def warps(self, elements_per_thread: int) -> int:
        elements = self.block_c * self.tile_h * self.tile_w
        return max(1, min(8, elements // (32 * elements_per_thread)))


def _padded(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _largest_fitting(size: int, largest: int) -> int:
    """The largest power of two up to ``largest`` that pads ``size`` by no more than an eighth."""
    return max(b for k in range(largest.bit_length()) if 8 * _padded(size, b := 1 << k) <= 9 * size)


def _channel_block(channels: int, element_size: int) -> int:
    """Channels of a channels_last tile: a 128-byte line, or a half or quarter of one where that pads less."""
    line = 128 // element_size
    if channels <= line:
        return triton.next_power_of_2(channels)
    return max(_largest_fitting(channels, line), line // 4)


def _in_programs(items: int, channels: int, block_c: int, **tile: Any) -> _Tiling:
    channel_tiles = triton.cdiv(channels, block_c)
    steps = max(1, min(_MAX_STEPS, items * channel_tiles // _ENOUGH_PROGRAMS))
    return _Tiling(items=items, channel_tiles=channel_tiles, steps=steps, block_c=block_c, **tile)


def _flat_tiling(shape: _Shape, channels: int, plane: int, elements: int, planes_together: bool = True) -> _Tiling:
    """Tiles of consecutive pixels of a plane."""
    if shape.channels_last:
        block_c = _channel_block(channels, shape.element_size)
        tile_w = min(max(1, elements // block_c), triton.next_power_of_2(plane))
    else:
        # At least a warp's worth of lanes.
        tile_w = max(_largest_fitting(plane, elements), min(32, triton.next_power_of_2(plane)))
        block_c = min(elements // tile_w, triton.next_power_of_2(channels)) if planes_together else 1
    row_tiles = triton.cdiv(plane, tile_w)
    return _in_programs(
        shape.batch * row_tiles, channels, block_c, tile_h=1, tile_w=tile_w, phases_h=1, phases_w=1,
        row_tiles=row_tiles, col_tiles=1, flat=True,
    )  # fmt: skip


def _tap_tiling(shape: _Shape, channels: int, rows: int, cols: int, phases: tuple[int, int], elements: int) -> _Tiling:
    """Tiles for kernels that read a tile's pixels through the taps; ``phases``: pixels this far apart share inputs."""
    if not shape.channels_last:
        # Several planes share the index arithmetic; but unless taps are consecutive in memory too, Triton could take
        # the planes for the fast axis.
        return _flat_tiling(shape, channels, rows * cols, elements, shape.same_width)
    phases_h, phases_w = (q if q < size else 1 for q, size in zip(phases, (rows, cols), strict=True))
    phase_rows, phase_cols = triton.cdiv(rows, phases_h), triton.cdiv(cols, phases_w)
    block_c = _channel_block(channels, shape.element_size)
    # As few as possible of: lanes that are computed times what a 3-wide kernel reads for each column of them.
    widths = [w for w in (8, 16, 32, 4, 2, 1) if w == 1 or w < 2 * phase_cols]
    tile_w = min(widths, key=lambda w: _padded(phase_cols, w) * (w + 2) / w)
    tile_h = _largest_fitting(phase_rows, max(1, elements // (block_c * tile_w)))
    while 2 * block_c * tile_w * tile_h <= elements and 8 * _padded(channels, 2 * block_c) <= 9 * channels:
        block_c *= 2
    # Small tensors do not fill a tile: then padding is free, and fewer programs are better.
    while 2 * block_c * tile_w * tile_h <= elements and tile_h < phase_rows:
        tile_h *= 2
    while 2 * block_c * tile_w * tile_h <= elements and tile_w < phase_cols:
        tile_w *= 2
    row_tiles, col_tiles = triton.cdiv(phase_rows, tile_h), triton.cdiv(phase_cols, tile_w)
    return _in_programs(
        shape.batch * phases_h * phases_w * row_tiles * col_tiles, channels, block_c, tile_h=tile_h, tile_w=tile_w,
        phases_h=phases_h, phases_w=phases_w, row_tiles=row_tiles, col_tiles=col_tiles, flat=False,
    )  # fmt: skip


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


def _unit(size: int) -> int:
    """A power of two that divides ``size``. Triton itself only sees divisibility by 16, and 8 channels of 2 bytes are a
    16-byte access already."""
    return math.gcd(size, 16)


def _elements(t: Tensor) -> dict[str, int]:
    unit = _unit(t.numel())
    return {"element_units": t.numel() // unit, "ELEMENT_UNIT": unit}


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve this call; float64, empty tensors and planes of 2^31 pixels go to plain torch."""
    if x.dtype not in (*_HALF_OR_SINGLE, torch.float64):
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    sizes_served = x.numel() > 0 and weight.numel() > 0 and x.shape[2] * x.shape[3] < 2**31
    return sizes_served and x.dtype != torch.float64


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=output_memory_format(x)) else x.contiguous()


def _shape(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> _Shape:
    batch, in_channels, height, width = x.shape
    top, bottom, left, right = padding
    kh, kw = weight.shape[2:]
    rows = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    cols = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    return _Shape(
        batch, in_channels, weight.shape[0], height, width, rows, cols, (kh, kw), (stride[0], stride[1]), top, left,
        (dilation[0], dilation[1]), output_memory_format(x) == torch.channels_last, x.element_size(),
    )  # fmt: skip


def _kernel_weight(weight: Tensor, shape: _Shape) -> Tensor:
    """[taps][channels] in channels_last, so that a tap is read in vectors; [channels][taps] otherwise."""
    flat = weight.contiguous().view(shape.channels, shape.taps)
    return flat.t().contiguous() if shape.channels_last else flat


def _output(x: Tensor, shape: _Shape, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        (shape.batch, shape.channels, shape.rows, shape.cols), dtype=dtype or x.dtype, device=x.device,
        memory_format=torch.channels_last if shape.channels_last else torch.contiguous_format,
    )  # fmt: skip


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _geometry(shape: _Shape, tiling: _Tiling) -> dict[str, Any]:
    return {
        "items": tiling.items, "steps": tiling.steps, "channel_tiles": tiling.channel_tiles,
        "height": shape.height, "width": shape.width, "rows": shape.rows, "cols": shape.cols,
        "row_tiles": tiling.row_tiles, "col_tiles": tiling.col_tiles,
        "phases_h": tiling.phases_h, "phases_w": tiling.phases_w,
        "pad_top": shape.pad_top, "pad_left": shape.pad_left, "rate_h": shape.rate[0], "rate_w": shape.rate[1],
        "MULTIPLIER": shape.multiplier, "KH": shape.kernel[0], "KW": shape.kernel[1],
        "SH": shape.stride[0], "SW": shape.stride[1], "SAME_WIDTH": shape.same_width, "FLAT": tiling.flat,
        "CHANNELS_LAST": shape.channels_last, "WIDE": shape.wide,
        "TILE_H": tiling.tile_h, "TILE_W": tiling.tile_w, "BLOCK_C": tiling.block_c,
    }  # fmt: skip


def _new_vector(x: Tensor, shape: _Shape) -> Tensor:
    return torch.empty(shape.channels, dtype=torch.float32, device=x.device)


def _slice_block(slices: int) -> tuple[int, int]:
    """Slices and channels that one step of the second pass takes."""
    return (128, 16) if slices > 32 else (triton.next_power_of_2(slices), 64)


def _elements_per_thread(shape: _Shape, accumulators: int = 1) -> int:
    """channels_last: two 16-byte vectors where a thread keeps one accumulator for each element, one where it keeps
    more. Contiguous: shifted rows are not aligned and load one element at a time; more than 4 would spill."""
    if not shape.channels_last:
        return 4
    vector = 16 // shape.element_size
    return vector if accumulators > 1 else 2 * vector


def _forward(
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    y: Tensor | None,
    *,
    statistics: bool = False,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """Writes ``y``; returns the batch's (mean, var) if ``statistics``."""
    per_thread = _elements_per_thread(shape, 3 if statistics else 1)
    # Outputs i and i + q read the same input rows, one tap apart, if s*q = r*(whole number).
    phases = (shape.rate[0] // math.gcd(shape.rate[0], shape.stride[0]),
              shape.rate[1] // math.gcd(shape.rate[1], shape.stride[1]))  # fmt: skip
    tiling = _tap_tiling(shape, shape.channels, shape.rows, shape.cols, phases, 128 * per_thread)
    partials = counts = None
    if statistics:
        partials = torch.empty((tiling.slices, 2, shape.channels), dtype=torch.float32, device=x.device)
        counts = torch.empty(tiling.slices, dtype=torch.float32, device=x.device)
    unit = _unit(shape.channels)
    arguments = {
        "x": x, "weight": _kernel_weight(weight, shape), "y": y, "mean": mean, "var": var, "gamma": gamma, "beta": beta,
        "partials": partials, "counts": counts, "eps": eps, "channel_units": shape.channels // unit, "UNIT": unit,
        "in_channels": shape.in_channels, "ACTIVATION": activation, **_geometry(shape, tiling),
    }  # fmt: skip
    _launch(_forward_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), x.device)
    if partials is None or counts is None:
        return None
    mean, var = _new_vector(x, shape), _new_vector(x, shape)
    _merge_statistics(partials[None], counts[None], mean, var, shape.batch * shape.rows * shape.cols)
    return mean, var


def _merge_statistics(partials: Tensor, counts: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
    """``partials`` (branches, slices, 2, channels) of ``count`` values a channel -> mean and biased var."""
    branches, slices, _, channels = partials.shape
    block_s, block_c = _slice_block(slices)
    arguments = {
        "partials": partials, "counts": counts, "mean": mean, "var": var, "count": float(count), "slices": slices,
        "channels": channels, "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    _launch(_merge_statistics_kernel, (triton.cdiv(channels, block_c), branches), arguments, 4, partials.device)


def _flat_block(shape: _Shape) -> int:
    """Elements of a program of the elementwise kernels: two 16-byte vectors for each of 128 threads."""
    return 128 * 2 * (16 // shape.element_size)


def _sum_slices(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first[b, c, r] = sum_s partials[b, s, r, c]; with ``second`` the two rows go to one vector each."""
    branches, slices, rows, channels = partials.shape
    block_s, block_c = _slice_block(slices)
    arguments = {
        "partials": partials, "first": first, "second": second, "slices": slices, "rows": rows, "channels": channels,
        "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    _launch(_sum_slices_kernel, (triton.cdiv(channels, block_c), rows, branches), arguments, 8, partials.device)


def _normalise_into(out: Tensor, y: Tensor, shape: _Shape, norm: dict[str, Any], activation: int) -> None:
    """out = act(norm(y)); ``norm``: mean, var, gamma, beta, eps."""
    unit, block = _unit(shape.channels), _flat_block(shape)
    arguments = {
        **norm, "y": y, "out": out, **_elements(y),
        "channel_units": shape.channels // unit, "UNIT": unit, "plane": shape.rows * shape.cols,
        "ACTIVATION": activation, "CHANNELS_LAST": shape.channels_last, "BLOCK": block,
    }  # fmt: skip
    _launch(_normalise_kernel, (triton.cdiv(y.numel(), block),), arguments, 4, y.device)


def _norm_sums(grad: Tensor, conv: Tensor, shape: _Shape, norm: dict[str, Any], activation: int) -> Tensor:
    """Sums of g and of g xhat in slices, (slices, 2, channels); ``grad``: of act(norm(conv))."""
    unit, pixels = _unit(shape.channels), shape.rows * shape.cols
    per_thread = _elements_per_thread(shape)
    tiling = _flat_tiling(shape, shape.channels, pixels, 128 * per_thread)
    partials = torch.empty((tiling.slices, 2, shape.channels), dtype=torch.float32, device=grad.device)
    arguments = {
        **norm, "grad": grad, "y": conv, "partials": partials, "channel_units": shape.channels // unit, "UNIT": unit,
        "ACTIVATION": activation, "CHANNELS_LAST": shape.channels_last, "items": tiling.items, "steps": tiling.steps,
        "channel_tiles": tiling.channel_tiles, "pixels": pixels, "tiles": tiling.row_tiles, "WIDE": shape.wide,
        "PIXELS": tiling.tile_w, "BLOCK_C": tiling.block_c,
    }  # fmt: skip
    _launch(_norm_sums_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), grad.device)
    return partials


def _conv_gradient(
    grad: Tensor,
    conv: Tensor,
    shape: _Shape,
    norm: dict[str, Any],
    activation: int,
    batch_statistics: bool,
    grad_beta: Tensor,
    grad_gamma: Tensor,
) -> Tensor:
    """The gradient of conv, from that of act(norm(conv))."""
    grad_y = torch.empty_like(grad)
    unit, block, pixels = _unit(shape.channels), _flat_block(shape), shape.rows * shape.cols
    arguments = {
        **norm, "grad": grad, "y": conv, "grad_y": grad_y, "sum_g": grad_beta, "sum_gx": grad_gamma,
        "channel_units": shape.channels // unit, "UNIT": unit, "ACTIVATION": activation,
        "CHANNELS_LAST": shape.channels_last, "count": float(shape.batch * pixels), **_elements(grad), "plane": pixels,
        "BATCH_STATISTICS": batch_statistics, "BLOCK": block,
    }  # fmt: skip
    _launch(_norm_grad_kernel, (triton.cdiv(grad.numel(), block),), arguments, 4, grad.device)
    return grad_y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, shape: _Shape, need_grad_x: bool, need_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution; ``grad`` has the layout of ``x``."""
    grad_x = torch.empty_like(x, memory_format=output_memory_format(x)) if need_grad_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else 0)
    kernel_weight = _kernel_weight(weight, shape)
    # Both gradients come from one kernel if its registers hold all taps and both have the same channels.
    together = need_grad_weight and need_grad_x and shape.taps <= _TAP_GROUP and shape.multiplier == 1
    if need_grad_x and not together:
        per_thread = _elements_per_thread(shape)
        tiling = _tap_tiling(shape, shape.in_channels, shape.height, shape.width, shape.rate, 128 * per_thread)
        unit = _unit(shape.in_channels)
        arguments = {
            "grad": grad, "weight": kernel_weight, "grad_x": grad_x, "channel_units": shape.in_channels // unit,
            "UNIT": unit, **_geometry(shape, tiling),
        }  # fmt: skip
        _launch(_grad_input_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), x.device)
    if need_grad_weight:
        group = min(shape.taps, _TAP_GROUP)
        per_thread = _elements_per_thread(shape, group)
        tiling = _tap_tiling(shape, shape.channels, shape.height, shape.width, shape.rate, 128 * per_thread)
        partials = torch.empty((tiling.slices, shape.taps, shape.channels), dtype=torch.float32, device=x.device)
        unit = _unit(shape.channels)
        arguments = {
            "grad": grad, "x": x, "weight": kernel_weight, "grad_x": grad_x if together else None, "partials": partials,
            "channel_units": shape.channels // unit, "UNIT": unit, "in_channels": shape.in_channels, "GROUP": group,
            **_geometry(shape, tiling),
        }  # fmt: skip
        grid = (tiling.programs, triton.cdiv(shape.taps, group))
        _launch(_grad_weight_kernel, grid, arguments, tiling.warps(per_thread), x.device)
        _sum_slices(partials[None], grad_weight)
    return grad_x, grad_weight


# The operators.


def atrous_depthwise_conv2d(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    if not _served(x, weight):
        return reference.atrous_depthwise_conv2d(x, weight, stride, padding, dilation)
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    y = _output(x, shape)
    _forward(x, weight, shape, y)
    return y


def atrous_depthwise_conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    if not _served(x, weight):
        return reference.atrous_depthwise_conv2d_backward(
            grad_out, x, weight, stride, padding, dilation, need_grad_x, need_grad_weight
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    grad = grad_out.contiguous(memory_format=output_memory_format(x))
    return _backward(grad, x, weight, shape, need_grad_x, need_grad_weight)


def atrous_depthwise_bn_act_inference(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    if not _served(x, weight):
        return reference.atrous_depthwise_bn_act_inference(
            x, weight, gamma, beta, mean, var, eps, activation, stride, padding, dilation
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    out = _output(x, shape)
    _forward(
        x, weight, shape, out, mean=_vector(mean), var=_vector(var), gamma=_vector(gamma), beta=_vector(beta), eps=eps,
        activation=activation,
    )  # fmt: skip
    return out


def atrous_depthwise_bn_act_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    save_conv: bool,
    pre_activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if pre_activation or not _served(x, weight):
        return reference.atrous_depthwise_bn_act_training(
            x, weight, gamma, beta, eps, activation, stride, padding, dilation, save_conv, pre_activation
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    gamma, beta = _vector(gamma), _vector(beta)
    y = _output(x, shape) if save_conv else None
    statistics = _forward(x, weight, shape, y, statistics=True)
    assert statistics is not None
    mean, var = statistics
    out = _output(x, shape)
    if y is None:
        _forward(x, weight, shape, out, mean=mean, var=var, gamma=gamma, beta=beta, eps=eps, activation=activation)
        return out, x.new_empty(0), mean, var
    norm = {"mean": mean, "var": var, "gamma": gamma, "beta": beta, "eps": eps}
    _normalise_into(out, y, shape, norm, activation)
    return out, y, mean, var


def atrous_depthwise_bn_act_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    batch_statistics: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
    pre_activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if pre_activation or not _served(x, weight):
        return reference.atrous_depthwise_bn_act_backward(
            grad_out, x, weight, y, gamma, beta, mean, var, eps, activation, batch_statistics, stride, padding,
            dilation, need_grad_x, need_grad_weight, pre_activation,
        )  # fmt: skip
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    memory_format = output_memory_format(x)
    grad = grad_out.contiguous(memory_format=memory_format)
    if y.dim() == 4:
        conv = y.contiguous(memory_format=memory_format)
    else:  # in float32: the forward pass activated the unrounded sums, and its mask must be found again
        conv = _output(x, shape, torch.float32)
        _forward(x, weight, shape, conv)
    grad_beta, grad_gamma = _new_vector(x, shape), _new_vector(x, shape)
    norm = {"mean": _vector(mean), "var": _vector(var), "gamma": _vector(gamma), "beta": _vector(beta), "eps": eps}
    _sum_slices(_norm_sums(grad, conv, shape, norm, activation)[None], grad_beta, grad_gamma)
    if not (need_grad_x or need_grad_weight):
        return x.new_empty(0), weight.new_empty(0), grad_gamma, grad_beta
    grad_y = _conv_gradient(grad, conv, shape, norm, activation, batch_statistics, grad_beta, grad_gamma)
    grad_x, grad_weight = _backward(grad_y, x, weight, shape, need_grad_x, need_grad_weight)
    return grad_x, grad_weight, grad_gamma, grad_beta
