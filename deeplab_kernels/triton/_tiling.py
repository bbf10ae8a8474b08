"""How a call of the depthwise kernels is cut into tiles and programs, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .._layout import output_memory_format

# A program takes several tiles once there are this many programs (an H100 holds about 1000 at a time) ...
_ENOUGH_PROGRAMS = 2048
# ... but no more than this many tiles.
_MAX_STEPS = 64
# From this many elements on, offsets inside one image (C*H*W) are 64-bit; offsets of whole images always are.
_WIDE_FROM = 2**31


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


def _unit(size: int) -> int:
    """A power of two that divides ``size``. Triton itself only sees divisibility by 16, and 8 channels of 2 bytes are a
    16-byte access already."""
    return math.gcd(size, 16)


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


def _flat_block(shape: _Shape) -> int:
    """Elements of a program of the elementwise kernels: two 16-byte vectors for each of 128 threads."""
    return 128 * 2 * (16 // shape.element_size)
