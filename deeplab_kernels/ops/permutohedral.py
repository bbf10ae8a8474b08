"""Gaussian filter of points with features, approximated on the permutohedral lattice.

    out_i ~ sum_j exp(-|f_i - f_j|^2 / 2) v_j        (j = i included)

Splat each point on the d + 1 lattice vertices around it, blur along the d + 1 lattice directions, slice with the same
weights: time and memory linear in the number of points (Adams, Baek, Davis: Fast High-Dimensional Filtering Using the
Permutohedral Lattice, Eurographics 2010).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.permutohedral import MAX_DIMENSION
from . import _backends, _validation
from ._backends import transforms_active
from ._flops import register_flop_formula

_ops = torch.ops.deeplab_kernels


def check_dimension(features: Tensor, name: str = "features") -> None:
    if not 1 <= features.shape[1] <= MAX_DIMENSION:
        raise ValueError(
            f"{name} must have 1 to {MAX_DIMENSION} feature dimensions (axis 1), got shape {tuple(features.shape)}"
        )


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def call(name: str, *args: Any) -> Any:
    """The operator on checked arguments. What its kernels find wrong with the numbers comes back as ValueError."""
    operator = getattr(_ops, name).default
    if torch.compiler.is_compiling():
        return operator(*args)
    if transforms_active():  # the operator has no rules for them and would drop tangents silently; its definition has
        return _backends.without_autocast(getattr(reference, name), cast_arguments=0)(*args)
    try:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            return operator(*args)
        # Without gradients the Python autograd key is skipped, which costs more than a small filter.
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    except RuntimeError as error:
        if found := re.search(r"bad argument: ([^\n]*)", str(error)):
            raise ValueError(found[1]) from None
        raise


def _compute_dtype(values: Tensor) -> torch.dtype:
    return reference.permutohedral.compute_dtype(values.dtype)


def permutohedral_filter(values: Tensor, features: Tensor, normalization: str = "none") -> Tensor:
    """Approximates ``K values`` with ``K_ij = exp(-|f_i - f_j|^2 / 2)`` on the permutohedral lattice.

    Args:
        values: (B, C, N), float32, float64, float16 or bfloat16. Any B, C and N, also 0.
        features: (B, d, N), d from 1 to 16, any of those dtypes, in units of the kernel's standard deviation (a
            position divided by its sigma, for instance); finite.
        normalization: with n = K 1, "none": K v; "before": K (v / n); "after": (K v) / n; "symmetric":
            n^-1/2 K (n^-1/2 v).

    Returns:
        (B, C, N) in the dtype of ``values``; computed in float32 (float64 for float64 values), also under autocast.
        "none" is scaled so that it approximates the exact sum (:func:`gaussian_filter`) where points lie densely.
        Deterministic. Differentiable w.r.t. ``values`` and ``features``: the gradients are those of the approximation,
        which has jumps where a point passes from one cell of the lattice to the next. Differentiating twice, and
        ``torch.func``'s transforms other than vmap, use the plain torch definition.

    Raises:
        ValueError, TypeError: an argument is not as above, or features are so large that a lattice coordinate exceeds
            int32; the message names it.
    """
    _validation.floating(values, "values", "(B, C, N)")
    _validation.floating(features, "features", "(B, d, N)")
    check_dimension(features)
    _check_matching(values, features.shape[0], features.shape[2], features.device)
    return call(
        "permutohedral_filter",
        values, features.to(_compute_dtype(values)), None, _validation.normalization_code(normalization), False,
    )  # fmt: skip


def _check_matching(values: Tensor, batch: int, points: int, device: torch.device) -> None:
    if (values.shape[0], values.shape[2]) != (batch, points):
        raise ValueError(
            f"values and features must have the same B and N, got values {tuple(values.shape)} and features of "
            f"B = {batch}, N = {points}"
        )
    if values.device != device:
        raise ValueError(f"values must be on the device of features, {device}, got {values.device}")


class PermutohedralLattice:
    """The lattice of some features, built once and used for any number of filters.

        lattice = PermutohedralLattice(features)        # (B, d, N)
        smooth = lattice(values, "symmetric")           # as permutohedral_filter(values, features, "symmetric")

    Gradients w.r.t. ``features`` flow through every call. The lattice does not notice features changed in place.

    Args:
        features: as for :func:`permutohedral_filter`. The filter computes in float64 if they are float64, otherwise in
            float32.
    """

    def __init__(self, features: Tensor) -> None:
        _validation.floating(features, "features", "(B, d, N)")
        check_dimension(features)
        self.features = features.to(_compute_dtype(features))
        self.packed: Tensor = call("permutohedral_lattice", self.features.detach())

    @property
    def batch(self) -> int:
        return self.features.shape[0]

    @property
    def dimension(self) -> int:
        return self.features.shape[1]

    @property
    def points(self) -> int:
        return self.features.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of the lattice, without the features."""
        return self.packed.numel()

    def __call__(self, values: Tensor, normalization: str = "none") -> Tensor:
        """``values`` (B, C, N), filtered as by :func:`permutohedral_filter`, in their dtype."""
        _validation.floating(values, "values", "(B, C, N)")
        _check_matching(values, self.batch, self.points, self.features.device)
        if values.dtype == torch.float64 and self.features.dtype != torch.float64:
            raise TypeError("values are float64: build the lattice from float64 features, got float32")
        code = _validation.normalization_code(normalization)
        return call("permutohedral_filter", values, self.features, self.packed, code, False)

    def __repr__(self) -> str:
        return (
            f"PermutohedralLattice(batch={self.batch}, dimension={self.dimension}, points={self.points}, "
            f"dtype={self.features.dtype}, device={self.features.device})"
        )


# Fake kernels: shapes and dtypes without data.


@torch.library.register_fake("deeplab_kernels::permutohedral_lattice")
def _(features):  # type: ignore[no-untyped-def]
    size = torch.library.get_ctx().new_dynamic_size()
    return features.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("deeplab_kernels::permutohedral_filter")
def _(values, features, lattice, normalization, transpose):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape)


@torch.library.register_fake("deeplab_kernels::permutohedral_filter_backward")
def _(grad_out, values, features, lattice, normalization, transpose, need_grad_values, need_grad_features):  # type: ignore[no-untyped-def]
    return (
        values.new_empty(values.shape if need_grad_values else 0),
        features.new_empty(features.shape if need_grad_features else 0),
    )


# Autograd.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, features, lattice, ctx.normalization, ctx.transpose = inputs
    # Without gradients of the features the filter is linear in values, and only the features are needed.
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, features, lattice)


def differentiate(function: Any, inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through ``function``, the definition in plain torch."""
    chosen = [t for t, w in zip(inputs, wanted, strict=True) if w]
    grads = iter(torch.autograd.grad(function(*inputs), chosen, grad, create_graph=True, materialize_grads=True))
    return [next(grads) if w else None for w in wanted]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, features, lattice = ctx.saved_tensors
    need_values, need_features = ctx.needs_input_grad[:2]
    options = (ctx.normalization, ctx.transpose)
    if not need_features:
        grad_values = _ops.permutohedral_filter(grad, features, lattice, ctx.normalization, not ctx.transpose)
        return grad_values, None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True
        grad_values, grad_features = differentiate(
            lambda v, f: reference.permutohedral_filter(v, f, None, *options),
            (values, features), (need_values, True), grad,
        )  # fmt: skip
    else:
        grad_values, grad_features = _ops.permutohedral_filter_backward(
            grad, values, features, lattice, *options, need_values, True
        )
    return grad_values if need_values else None, grad_features, None, None, None


torch.library.register_autograd("deeplab_kernels::permutohedral_filter", _backward, setup_context=_setup)

_backends.register_autocast("permutohedral_filter", cast_arguments=0)


# FLOP formulas: two per multiply-add of splat and slice. The blur's depend on the number of vertices, which the shapes
# do not tell; they are at most as many per direction.


def _splat_flops(v_shape: Sequence[int], f_shape: Sequence[int]) -> int:
    batch, channels, points = v_shape
    return 2 * batch * channels * points * (f_shape[1] + 1)


@register_flop_formula(_ops.permutohedral_filter)
def _(v_shape, f_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * _splat_flops(v_shape, f_shape)


@register_flop_formula(_ops.permutohedral_filter_backward)
def _(g_shape, v_shape, f_shape, lattice, normalization, transpose, need_values, need_features, **kwargs):  # type: ignore[no-untyped-def]
    # The weights' gradient splats both and takes two products a vertex.
    return (2 * int(bool(need_values)) + 4 * int(bool(need_features))) * _splat_flops(v_shape, f_shape)
