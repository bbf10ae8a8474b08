"""Gaussian filter on the permutohedral lattice, in Triton: for GPUs without the CUDA library.

The functions have the signatures and results of :mod:`deeplab_kernels.reference.permutohedral`, which builds the
lattice (by sorting keys) and does everything of one pass over the points; the kernels here are the filter's passes:

    splat    vertex <- sum of weight * value over its points, gathered from lists sorted once: no atomics, a fixed order
    blur     vertex <- vertex + (one neighbour + the other) / 2, along one direction
    slice    point <- sum of weight * vertex

The host waits for the device while a lattice is built; the CUDA library does not need that.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device code takes pointers and blocks, which have no Python types)

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import permutohedral as reference

# Points or vertices of a program, entries of a list that it reads at a time, and most channels that it takes.
_BLOCK_ROWS, _BLOCK_ENTRIES, _MAX_CHANNELS = 16, 16, 64


@triton.jit
def _splat_kernel(start, point, weight, values, out, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    vertex = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(start + vertex), tl.load(start + vertex + 1)
    total = tl.zeros((BLOCK, BLOCK_C), values.dtype.element_ty)
    for first in range(begin, end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        row = tl.load(point + entry, mask=entry < end, other=0).to(tl.int64)
        factor = tl.load(weight + entry, mask=entry < end, other=0.0)
        inside = (entry < end)[:, None] & (column < channels)[None, :]
        total += factor[:, None] * tl.load(values + row[:, None] * channels + column[None, :], mask=inside, other=0.0)
    tl.store(out + vertex * channels + column, tl.sum(total, 0), mask=column < channels)


@triton.jit
def _blur_kernel(neighbour, table, out, rows, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    vertex = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = vertex < rows
    one = tl.load(neighbour + vertex, mask=here, other=rows).to(tl.int64)
    other = tl.load(neighbour + rows + vertex, mask=here, other=rows).to(tl.int64)
    inside = (column < channels)[None, :]
    at = table + column[None, :]
    total = tl.load(at + vertex[:, None] * channels, mask=here[:, None] & inside, other=0.0)
    sides = tl.load(at + one[:, None] * channels, mask=(one < rows)[:, None] & inside, other=0.0)
    sides += tl.load(at + other[:, None] * channels, mask=(other < rows)[:, None] & inside, other=0.0)
    total += sides * 0.5
    tl.store(out + vertex[:, None] * channels + column[None, :], total, mask=here[:, None] & inside)


@triton.jit
def _slice_kernel(
    vertex, weight, table, out, points, channels, CORNERS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = point < points
    inside = here[:, None] & (column < channels)[None, :]
    total = tl.zeros((BLOCK, BLOCK_C), table.dtype.element_ty)
    for k in range(CORNERS):
        row = tl.load(vertex + point * CORNERS + k, mask=here, other=0).to(tl.int64)
        factor = tl.load(weight + point * CORNERS + k, mask=here, other=0.0)
        total += factor[:, None] * tl.load(table + row[:, None] * channels + column[None, :], mask=inside, other=0.0)
    tl.store(out + point[:, None] * channels + column[None, :], total, mask=inside)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


class Lattice(reference.Lattice):
    """The reference's lattice with the passes above."""

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        vertex, order = torch.sort(self.vertices.flatten(), stable=True)
        start = torch.searchsorted(vertex, torch.arange(self.rows + 1, device=vertex.device))
        point = torch.div(order, self.vertices.shape[1], rounding_mode="floor")
        return start, point.int(), self.weights.flatten()[order]

    def splat(self, values: Tensor) -> Tensor:
        table = values.new_empty(self.rows, values.shape[1])
        if table.numel() == 0:
            return table
        start, point, weight = self.lists
        arguments = {
            "start": start, "point": point, "weight": weight, "values": values.contiguous(), "out": table,
            "channels": values.shape[1], "BLOCK": _BLOCK_ENTRIES,
        }  # fmt: skip
        self._start(_splat_kernel, self.rows, arguments)
        return table

    def blur(self, table: Tensor, transpose: bool) -> Tensor:
        directions = range(self.neighbours.shape[0])
        if table.numel() == 0:
            return table
        for j in reversed(directions) if transpose else directions:
            out = torch.empty_like(table)
            arguments = {
                "neighbour": self.neighbours[j], "table": table, "out": out, "rows": self.rows,
                "channels": table.shape[1], "BLOCK": _BLOCK_ROWS,
            }  # fmt: skip
            self._start(_blur_kernel, triton.cdiv(self.rows, _BLOCK_ROWS), arguments)
            table = out
        return table.mul_(reference.filter_scale(len(directions) - 1))

    def slice(self, table: Tensor) -> Tensor:
        points, corners = self.vertices.shape
        out = table.new_empty(points, table.shape[1])
        if out.numel() == 0:
            return out
        arguments = {
            "vertex": self.vertices, "weight": self.weights, "table": table, "out": out, "points": points,
            "channels": table.shape[1], "CORNERS": corners, "BLOCK": _BLOCK_ROWS,
        }  # fmt: skip
        self._start(_slice_kernel, triton.cdiv(points, _BLOCK_ROWS), arguments)
        return out

    def _start(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        channels = arguments["channels"]
        block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
        grid = (programs, triton.cdiv(channels, block))
        _launch(kernel, grid, arguments | {"BLOCK_C": block}, 1, arguments["out"].device)


def make(features: Tensor, packed: Tensor | None) -> Lattice:
    return Lattice(*reference.built_or_unpacked(features, packed))


permutohedral_lattice = reference.permutohedral_lattice


def permutohedral_filter(
    values: Tensor, features: Tensor, lattice: Tensor | None, normalization: int, transpose: bool
) -> Tensor:
    return reference.permutohedral_filter(values, features, lattice, normalization, transpose, make)


def permutohedral_filter_backward(
    grad_out: Tensor,
    values: Tensor,
    features: Tensor,
    lattice: Tensor | None,
    normalization: int,
    transpose: bool,
    need_grad_values: bool,
    need_grad_features: bool,
) -> tuple[Tensor, Tensor]:
    return reference.permutohedral_filter_backward(
        grad_out, values, features, lattice, normalization, transpose, need_grad_values, need_grad_features, make
    )
