"""The permutohedral lattice in plain torch: by sorting integer keys, on any device, for 1 to 16 feature dimensions.

Points are (image, position) pairs in one list of P = B N rows; values are (P, C). All images of a batch share one table
of vertices, but no vertex: the image is part of a vertex's key. Adams, Baek, Davis: Fast High-Dimensional Filtering
Using the Permutohedral Lattice, Eurographics 2010; csrc/core/permutohedral.h has the same geometry.

The functions without underscore that share their name with an operator have its signature in csrc/torch/schema.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DIMENSION = 16
NONE, BEFORE, AFTER, SYMMETRIC = range(4)

# Codes of vertices are below this, so that products of two column widths do not overflow int64.
_LARGEST_CODE = 2**62
# Coordinates of vertices are int32 in the compiled kernels, with room for a neighbour.
_LARGEST_COORDINATE = 2**31 - 64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a filter of such values computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def filter_scale(d: int) -> float:
    """Factor that makes the unnormalised filter approximate the sum of Gaussians.

    The taps [1/2, 1, 1/2] multiply the total by 2 in each of the d + 1 directions, and a vertex collects the points of
    one cell of the lattice, of volume (3/2)^(d/2) / sqrt(d + 1), while the Gaussian's integral is (2 pi)^(d/2).
    """
    return math.sqrt(d + 1) * (4 * math.pi / 3) ** (d / 2) / 2 ** (d + 1)


# Geometry: from features to the vertices around each point.


def axis_scales(d: int) -> list[float]:
    """Factors of the feature axes before the rotation into the hyperplane (lattice_scale in the core)."""
    return [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]


def _elevated(features: Tensor) -> Tensor:
    """(P, d) features on the hyperplane of R^(d+1) whose coordinates sum to 0: (P, d + 1)."""
    d = features.shape[1]
    position = features * torch.tensor(axis_scales(d), dtype=features.dtype, device=features.device)
    columns: list[Tensor] = []
    tail = torch.zeros_like(position[:, 0])
    for i in range(d, 0, -1):
        columns.append(tail - i * position[:, i - 1])
        tail = tail + position[:, i - 1]
    return torch.stack([tail, *columns[::-1]], dim=1)


class Simplex(NamedTuple):
    greedy: Tensor  # (P, d + 1) int64: the remainder-0 vertex
    rank: Tensor  # (P, d + 1) int64: order of the residuals, 0 the largest
    weights: Tensor  # (P, d + 1): barycentric weights, differentiable w.r.t. the features


def simplex(features: Tensor) -> Simplex:
    """The simplex around each of the (P, d) points."""
    d = features.shape[1]
    elevated = _elevated(features)
    with torch.no_grad():
        if elevated.numel():
            largest = elevated.abs().max().item()
            if not math.isfinite(largest):
                raise ValueError("features must be finite, got NaN or infinity")
            if largest > _LARGEST_COORDINATE - 2 * (d + 1):
                raise ValueError(
                    f"features must stay within the lattice's int32 coordinates: the largest is {largest:.3g} lattice "
                    "units, use larger standard deviations or shift the features towards 0"
                )
        below = torch.floor(elevated / (d + 1))
        up = (below + 1) * (d + 1) - elevated < elevated - below * (d + 1)
        nearest = below.long() + up
        greedy = nearest * (d + 1)
        order = torch.sort(elevated - greedy, dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(d + 1, device=order.device).expand_as(order))
        # The rounded point may lie off the hyperplane: move the coordinates with the largest (smallest) residuals.
        rank += nearest.sum(1, keepdim=True)
        wrapped = torch.where(rank < 0, d + 1, torch.where(rank > d, -(d + 1), 0))
        rank, greedy = rank + wrapped, greedy + wrapped
        order = torch.empty_like(rank)
        order.scatter_(1, rank, torch.arange(d + 1, device=rank.device).expand_as(rank))
    descending = ((elevated - greedy) / (d + 1)).gather(1, order)
    first = descending[:, d:] + (1 - descending[:, :1])
    return Simplex(greedy, rank, torch.cat([first, (descending[:, :-1] - descending[:, 1:]).flip(1)], dim=1))


def simplex_backward(grad_weights: Tensor, features: Tensor) -> Tensor:
    """Gradient of the (P, d) features from that of the barycentric weights (P, d + 1)."""
    d = features.shape[1]
    rank = simplex(features).rank
    # weights[d - rank] rises with the coordinate, weights[d + 1 - rank] falls; the last wraps round to weights[0].
    grad = (grad_weights.gather(1, d - rank) - grad_weights.gather(1, (d + 1 - rank) % (d + 1))) / (d + 1)
    before = grad.cumsum(1)
    steps = torch.arange(1, d + 1, device=grad.device, dtype=grad.dtype)
    scale = torch.tensor(axis_scales(d), dtype=grad.dtype, device=grad.device)
    return (before[:, :-1] - steps * grad[:, 1:]) * scale


class _Stage(NamedTuple):
    columns: list[int]
    low: list[int]
    size: list[int]
    codes: Tensor  # sorted


class _KeyTable:
    """Rows of integers -> their index among the distinct rows. Exact for any range: columns are packed into int64
    codes, which are replaced by their indices whenever the next column no longer fits."""

    def __init__(self, columns: Sequence[Tensor]) -> None:
        bounds = [[int(c.min()), int(c.max())] for c in columns]
        self.stages: list[_Stage] = []
        packed, span = columns[0] - bounds[0][0], bounds[0][1] - bounds[0][0] + 1
        used, low, size = [0], [bounds[0][0]], [span]
        for j in range(1, len(columns)):
            width = bounds[j][1] - bounds[j][0] + 1
            if span * width > _LARGEST_CODE:
                codes, packed = torch.unique(packed, return_inverse=True)
                self.stages.append(_Stage(used, low, size, codes))
                span, used, low, size = codes.numel(), [], [], []
            packed = packed * width + (columns[j] - bounds[j][0])
            span *= width
            used, low, size = [*used, j], [*low, bounds[j][0]], [*size, width]
        codes, self.index = torch.unique(packed, return_inverse=True)
        self.stages.append(_Stage(used, low, size, codes))
        self.rows = codes.numel()

    def find(self, columns: Sequence[Tensor]) -> Tensor:
        """Index of each row, ``self.rows`` for those that are not in the table."""
        index = torch.zeros_like(columns[0])
        present = torch.ones_like(index, dtype=torch.bool)
        for stage in self.stages:
            for j, low, size in zip(stage.columns, stage.low, stage.size, strict=True):
                offset = columns[j] - low
                present &= (offset >= 0) & (offset < size)
                index = index * size + offset
            place = torch.searchsorted(stage.codes, index).clamp_(max=stage.codes.numel() - 1)
            present &= stage.codes[place] == index
            index = torch.where(present, place, 0)
        return torch.where(present, index, self.rows)


class Lattice(NamedTuple):
    vertices: Tensor  # (P, d + 1) int64, rows of the value table
    weights: Tensor  # (P, d + 1), differentiable w.r.t. the features
    neighbours: Tensor  # (d + 1, 2, M) int64, M where a vertex has no neighbour

    @property
    def rows(self) -> int:
        return self.neighbours.shape[2]

    # What the filter is made of; a lattice with kernels of its own has other methods of these names.

    def splat(self, values: Tensor) -> Tensor:
        return _splat(self, values)

    def blur(self, table: Tensor, transpose: bool) -> Tensor:
        return _blur(self, table, transpose)

    def slice(self, table: Tensor) -> Tensor:
        return _slice(self, table)


def to_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, N) -> (B N, C)."""
    return values.to(dtype).transpose(1, 2).reshape(values.shape[0] * values.shape[2], values.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(B N, C) -> (B, C, N), contiguous, in the dtype of ``like`` (B, _, N)."""
    return rows.view(like.shape[0], like.shape[2], rows.shape[1]).transpose(1, 2).to(like.dtype).contiguous()


def build(features: Tensor) -> Lattice:
    """The lattice of features (B, d, N)."""
    batch, d, points = features.shape
    greedy, rank, weights = simplex(to_rows(features, features.dtype))
    if batch * points == 0:
        return Lattice(greedy, weights, greedy.new_zeros(d + 1, 2, 0))
    image = torch.arange(batch, device=features.device).repeat_interleave(points)
    # The last coordinate follows from the others. Rows of `columns`: (point, remainder).
    remainder = torch.arange(d + 1, device=features.device)
    columns = [image[:, None].expand(-1, d + 1).reshape(-1)]
    for i in range(d):
        wrap = torch.where(rank[:, i : i + 1] > d - remainder, d + 1, 0)
        columns.append((greedy[:, i : i + 1] + remainder - wrap).reshape(-1))
    table = _KeyTable(columns)
    first = torch.empty(table.rows, dtype=torch.long, device=features.device)
    first.scatter_(0, table.index, torch.arange(table.index.numel(), device=features.device))
    own = [c[first] for c in columns]
    neighbours = torch.full((d + 1, 2, table.rows), table.rows, dtype=torch.long, device=features.device)
    rows = torch.arange(table.rows, device=features.device)
    for j in range(d + 1):
        # One step along direction j: +1 in every coordinate, -d in coordinate j.
        found = table.find([own[0], *(c + (1 if i != j else -d) for i, c in enumerate(own[1:]))])
        neighbours[j, 0] = found
        present = found < table.rows
        neighbours[j, 1].index_put_((found[present],), rows[present])
    return Lattice(table.index.view(-1, d + 1), weights, neighbours)


def permutohedral_lattice(features: Tensor) -> Tensor:
    lattice = build(features)
    return torch.cat([lattice.vertices.flatten(), lattice.neighbours.flatten()]).view(torch.uint8)


def _unpacked(packed: Tensor, features: Tensor) -> Lattice:
    d = features.shape[1]
    count = features.shape[0] * features.shape[2] * (d + 1)
    numbers = packed.view(torch.long)
    weights = simplex(to_rows(features, features.dtype)).weights
    return Lattice(numbers[:count].view(-1, d + 1), weights, numbers[count:].view(d + 1, 2, -1))


def built_or_unpacked(features: Tensor, packed: Tensor | None) -> Lattice:
    return build(features) if packed is None or packed.numel() == 0 else _unpacked(packed, features)


Make = Callable[[Tensor, Tensor | None], Lattice]


# The filter and its derivative on (P, C) values.


def _splat(lattice: Lattice, values: Tensor) -> Tensor:
    """(M, C): sum over the points of weight * value."""
    table = values.new_zeros(lattice.rows + 1, values.shape[1])
    for k in range(lattice.vertices.shape[1]):
        index, terms = lattice.vertices[:, k], lattice.weights[:, k : k + 1] * values
        # index_put sorts on GPUs, where index_add is not deterministic; on the CPU both are, and index_add is faster.
        if values.device.type == "cpu":
            table = table.index_add(0, index, terms)
        else:
            table = table.index_put((index,), terms, accumulate=True)
    return table[:-1]


def _with_absent_row(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _blur(lattice: Lattice, table: Tensor, transpose: bool) -> Tensor:
    directions = range(lattice.neighbours.shape[0])
    for j in reversed(directions) if transpose else directions:
        padded = _with_absent_row(table)
        table = table + 0.5 * (padded[lattice.neighbours[j, 0]] + padded[lattice.neighbours[j, 1]])
    return table * filter_scale(lattice.neighbours.shape[0] - 1)


def _slice(lattice: Lattice, table: Tensor) -> Tensor:
    padded = _with_absent_row(table)
    result = table.new_zeros(lattice.vertices.shape[0], table.shape[1])
    for k in range(lattice.vertices.shape[1]):
        result = result + lattice.weights[:, k : k + 1] * padded[lattice.vertices[:, k]]
    return result


def plain_filter(lattice: Lattice, values: Tensor, transpose: bool = False) -> Tensor:
    """K v, or its transpose: slice(blur(splat(v)))."""
    return lattice.slice(lattice.blur(lattice.splat(values), transpose))


def plain_weights_gradient(lattice: Lattice, grad: Tensor, values: Tensor, transpose: bool) -> Tensor:
    """Gradient (P, d + 1) of the weights, from ``grad`` (P, C) of :func:`plain_filter`'s result."""
    blurred = _with_absent_row(lattice.blur(lattice.splat(values), transpose))
    blurred_grad = _with_absent_row(lattice.blur(lattice.splat(grad), not transpose))
    columns = [(grad * blurred[index] + values * blurred_grad[index]).sum(1) for index in lattice.vertices.unbind(1)]
    return torch.stack(columns, 1)


class NormalisedFilter(NamedTuple):
    """F = after K before, with factors that depend on n = K m; m is 1, or 0 where a point sends and receives
    nothing."""

    lattice: Lattice
    normalization: int
    present: Tensor  # m, (P, 1)
    sums: Tensor  # n, (P, 1)
    before: Tensor  # (P, 1)
    after: Tensor  # (P, 1)


def normalised(lattice: Lattice, normalization: int, mask: Tensor | None = None) -> NormalisedFilter:
    """``mask``: (B, N) bool or None."""
    if mask is None:
        present = lattice.weights.new_ones(lattice.weights.shape[0], 1)
    else:
        present = mask.reshape(-1, 1).to(lattice.weights.dtype)
    if normalization == NONE:
        return NormalisedFilter(lattice, normalization, present, present, present, present)
    sums = torch.where(present != 0, plain_filter(lattice, present), 1)
    if normalization == SYMMETRIC:
        root = present * sums.rsqrt()
        return NormalisedFilter(lattice, normalization, present, sums, root, root)
    inverse = present / sums
    before, after = (inverse, present) if normalization == BEFORE else (present, inverse)
    return NormalisedFilter(lattice, normalization, present, sums, before, after)


def apply(f: NormalisedFilter, values: Tensor, transpose: bool = False) -> Tensor:
    """F v or F^T v of (P, C) values."""
    before, after = (f.after, f.before) if transpose else (f.before, f.after)
    return after * plain_filter(f.lattice, before * values, transpose)


def apply_weights_gradient(f: NormalisedFilter, grad: Tensor, values: Tensor, transpose: bool = False) -> Tensor:
    """Gradient (P, d + 1) of the barycentric weights from that of :func:`apply`'s result, (P, C)."""
    before, after = (f.after, f.before) if transpose else (f.before, f.after)
    inner, inner_grad = before * values, after * grad
    result = plain_weights_gradient(f.lattice, inner_grad, inner, transpose)
    if f.normalization == NONE:
        return result
    # The factors depend on the weights as well, through n = K m: d(n^p) = p n^(p - 1) dn.
    power = -0.5 if f.normalization == SYMMETRIC else -1.0
    grad_sums = torch.zeros_like(f.sums)
    if f.normalization == SYMMETRIC or (f.normalization == AFTER) != transpose:
        grad_sums = grad_sums + (inner_grad * plain_filter(f.lattice, inner, transpose)).sum(1, keepdim=True)
    if f.normalization == SYMMETRIC or (f.normalization == BEFORE) != transpose:
        grad_sums = grad_sums + (inner * plain_filter(f.lattice, inner_grad, not transpose)).sum(1, keepdim=True)
    grad_sums = power * grad_sums / f.sums
    return result + plain_weights_gradient(f.lattice, grad_sums, f.present, False)


# The operators.


# ``make`` builds or unpacks the lattice: backends with passes of their own have another.


def permutohedral_filter(
    values: Tensor,
    features: Tensor,
    lattice: Tensor | None,
    normalization: int,
    transpose: bool,
    make: Make = built_or_unpacked,
) -> Tensor:
    f = normalised(make(features, lattice), normalization)
    return from_rows(apply(f, to_rows(values, features.dtype), transpose), values)


def permutohedral_filter_backward(
    grad_out: Tensor,
    values: Tensor,
    features: Tensor,
    lattice: Tensor | None,
    normalization: int,
    transpose: bool,
    need_grad_values: bool,
    need_grad_features: bool,
    make: Make = built_or_unpacked,
) -> tuple[Tensor, Tensor]:
    f = normalised(make(features, lattice), normalization)
    grad, v = to_rows(grad_out, features.dtype), to_rows(values, features.dtype)
    grad_values, grad_features = values.new_empty(0), features.new_empty(0)
    if need_grad_values:
        grad_values = from_rows(apply(f, grad, not transpose), values)
    if need_grad_features:
        grad_weights = apply_weights_gradient(f, grad, v, transpose)
        grad_features = from_rows(simplex_backward(grad_weights, to_rows(features, features.dtype)), features)
    return grad_values, grad_features
