"""Exact Gaussian filter of points with features.

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j        (j = i included)

The message of a fully connected CRF (Kraehenbuehl and Koltun, arXiv:1210.5644, section 3.1) without the approximation
of a lattice. O(N^2) work in O(N) memory: the kernel matrix exists in tiles only, and tiles whose points are too far
apart to matter are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.atrous_depthwise import accumulation_dtype
from . import _backends, _validation
from ._backends import transforms_active
from ._flops import register_flop_formula

_ops = torch.ops.deeplab_kernels

MAX_DIMENSIONS = 16


def gaussian_filter(values: Tensor, features: Tensor, normalization: str = "none") -> Tensor:
    """``K values`` with ``K_ij = exp(-|f_i - f_j|^2 / 2)``, exactly, for all pairs of the N points of each image.

    Args:
        values: (B, C, N), float32, float64, float16 or bfloat16. Any B, C and N, also 0.
        features: (B, d, N), d from 1 to 16, in units of the kernel's standard deviation (a position divided by its
            sigma, for instance). dtype of ``values``; with float16 or bfloat16 values it may also be float32, which
            features of more than a few hundred units need.
        normalization: with n = K 1, "none": K v; "before": K (v / n); "after": (K v) / n; "symmetric":
            n^-1/2 K (n^-1/2 v).

    Returns:
        (B, C, N) in the dtype of ``values``. Kernel and sums are formed in float32 (float64 for float64); on CUDA
        the product with float32 values may use TF32 where ``torch.set_float32_matmul_precision`` allows it. Pairs with
        a kernel below 2^-24 / N (2^-53 / N in float64) may be left out: a channel's result changes by less than 2^-24
        (2^-53) times the mean of its |v|. Differentiable any number of times w.r.t. ``values`` and ``features``.
        Deterministic. Under autocast, as torch's exp and sum, computed and returned in float32.

    Raises:
        ValueError, TypeError: an argument is not as above, or ``features`` hold a NaN or an infinity. The latter is
            only looked for in eager mode on the CPU; elsewhere the result of that image is NaN. A NaN or infinity in
            ``values`` makes its channel NaN.
    """
    values, features = check_points(values, features)
    return normalised(lambda v: call("gaussian_filter", v, features), values, normalization)


def check_points(values: Tensor, features: Tensor, *, shape: str = "N") -> tuple[Tensor, Tensor]:
    """Checks the two tensors of a filter, (B, C, *shape) and (B, d, *shape); casts them as autocast wants."""
    _validation.floating(values, "values", f"(B, C, {shape})")
    _validation.floating(features, "features", f"(B, d, {shape})")
    if features.shape[0] != values.shape[0] or features.shape[2:] != values.shape[2:]:
        raise ValueError(
            f"features must have the B and {shape} of values {tuple(values.shape)}, got {tuple(features.shape)}"
        )
    if not 1 <= features.shape[1] <= MAX_DIMENSIONS:
        raise ValueError(
            f"features must have 1 to {MAX_DIMENSIONS} dimensions, got {features.shape[1]} ({tuple(features.shape)})"
        )
    if features.device != values.device:
        raise ValueError(f"features must be on the device of values, {values.device}, got {features.device}")
    values, features = _autocast(values), _autocast(features)
    acc = accumulation_dtype(values.dtype)
    if features.dtype not in (values.dtype, acc):
        allowed = f"{values.dtype}" + (f" or {acc}" if acc != values.dtype else "")
        raise TypeError(f"features must be {allowed} where values are {values.dtype}, got {features.dtype}")
    if _may_look(features) and not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite, got NaN or infinity")
    return values, features


def _autocast(t: Tensor) -> Tensor:
    device = t.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return t
    return t if t.dtype == torch.float64 else t.float()


def _may_look(t: Tensor) -> bool:
    """Whether the numbers of ``t`` can be looked at for the price of reading them: not on a GPU, nor while tracing."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def normalised(kernel: Callable[[Tensor], Tensor], values: Tensor, normalization: str) -> Tensor:
    """``values`` under ``kernel`` (linear, returns the accumulation dtype) normalised by what it makes of ones."""
    _validation.normalization_code(normalization)
    dtype = values.dtype
    ones = values.new_ones((values.shape[0], 1, *values.shape[2:]))
    if normalization == "none":
        out = kernel(values)
    elif normalization == "after":
        out = kernel(torch.cat((values, ones), 1))
        out = out[:, :-1] / out[:, -1:]
    elif normalization == "before":
        out = kernel((values / kernel(ones)).to(dtype))
    else:
        scale = kernel(ones).rsqrt()
        out = scale * kernel((scale * values).to(dtype))
    return out.to(dtype)


def call(name: str, values: Tensor, features: Tensor, *args: Any) -> Tensor:
    if transforms_active():  # the operator has no rules for them and would drop tangents silently; its definition has
        function: Callable[..., Tensor] = getattr(reference, name)
    else:
        function = getattr(_ops, name).default
    return function(values, features, *args)


# The operator around the kernels, for this filter and the one with a window, whose operators take more arguments after
# features.


def register_filter(name: str) -> None:
    """Fake kernels, autograd and autocast of operator ``name`` and its ``_backward``."""
    operator = getattr(_ops, name).default
    backward_operator = getattr(_ops, f"{name}_backward").default

    def fake(values: Tensor, features: Tensor, *args: Any) -> Tensor:
        return values.new_empty(values.shape, dtype=accumulation_dtype(values.dtype))

    def fake_backward(grad_out: Tensor, values: Tensor, features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        need_grad_values, need_grad_features = args[-2:]
        return (
            values.new_empty(values.shape if need_grad_values else 0),
            features.new_empty(features.shape if need_grad_features else 0),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, features, *ctx.args = inputs
        ctx.save_for_backward(values, features)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, features = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_gradients(lambda t: operator(t, features, *ctx.args), grad, values, features, needs)
        else:
            grads = backward_operator(grad, values, features, *ctx.args, *needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None for _ in ctx.args))

    torch.library.register_fake(f"{_backends.NAMESPACE}::{name}", fake)
    torch.library.register_fake(f"{_backends.NAMESPACE}::{name}_backward", fake_backward)
    torch.library.register_autograd(f"{_backends.NAMESPACE}::{name}", backward, setup_context=setup)
    _backends.register_autocast(name, cast_arguments=2, dtype=torch.float32)


def _differentiable_gradients(
    kernel: Callable[[Tensor], Tensor], grad: Tensor, values: Tensor, features: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients written with the filter itself, so that they can be differentiated again, to any order:

    grad f_i = sum_c g_ic ([K (v_c f)]_i - f_i [K v_c]_i) + v_ic ([K (g_c f)]_i - f_i [K g_c]_i)
    """
    grad_values = kernel(grad).to(values.dtype) if needs[0] else None
    if not needs[1]:
        return grad_values, None
    # Distances do not change when the origin moves, and products of smaller numbers lose fewer digits.
    points = tuple(range(2, features.dim()))
    f = (features - features.detach().mean(points, keepdim=True)).to(grad.dtype)
    total: Tensor | float = 0.0
    for here, there in ((grad, values.to(grad.dtype)), (values.to(grad.dtype), grad)):
        moved = (there.unsqueeze(2) * f.unsqueeze(1)).flatten(1, 2)
        with_features = kernel(moved).unflatten(1, (there.shape[1], f.shape[1]))
        alone = kernel(there).unsqueeze(2)
        total = total + (here.unsqueeze(2) * (with_features - f.unsqueeze(1) * alone)).sum(1)
    assert isinstance(total, Tensor)
    return grad_values, total.to(features.dtype)


register_filter("gaussian_filter")


# FLOP formulas: two per multiply-add of the squared distances and of the products with values and gradients, over all
# pairs, as if no tile were skipped.


def pair_flops(pairs: int, channels: int, dimensions: int) -> int:
    return 2 * pairs * (channels + dimensions)


def backward_pair_flops(pairs: int, channels: int, dimensions: int, need_values: bool, need_features: bool) -> int:
    by_values, by_features = channels if need_values else 0, 2 * channels + dimensions if need_features else 0
    return 2 * pairs * (dimensions + by_values + by_features) if need_values or need_features else 0


@register_flop_formula(_ops.gaussian_filter)
def _(values_shape, features_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    batch, channels, points = values_shape
    return pair_flops(batch * points * points, channels, features_shape[1])


@register_flop_formula(_ops.gaussian_filter_backward)
def _(grad_shape, values_shape, features_shape, need_values, need_features, **kwargs):  # type: ignore[no-untyped-def]
    batch, channels, points = values_shape
    return backward_pair_flops(batch * points * points, channels, features_shape[1], need_values, need_features)
