"""Tiles of pixels and channels on the device: where they lie, what their taps read, activations."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

import triton
import triton.language as tl


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
