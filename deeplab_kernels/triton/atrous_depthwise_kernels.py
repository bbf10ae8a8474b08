"""Device code of the atrous depthwise convolution and its batch normalisation; atrous_depthwise.py launches it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import (
    _activate,
    _by_channel,
    _by_pixel,
    _first_item,
    _load_gradient,
    _load_or,
    _load_tap,
    _load_weight,
    _load_weights,
    _mask,
    _offsets,
    _pixels,
    _sum_pixels,
    _through_activation,
    _zeros,
)

# The weights of so many taps are kept in registers and their loop is unrolled.
_KEPT_TAPS = tl.constexpr(9)


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
