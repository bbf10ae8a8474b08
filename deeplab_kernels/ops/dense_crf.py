"""Mean-field inference of the fully connected CRF.

    E(x) = sum_i U_i(x_i) + sum_{i<j} sum_m mu_m(x_i, x_j) k_m(f_i, f_j),    k_m = exp(-|f_i - f_j|^2 / 2), normalised
    Q_0 = softmax(-U)      E_t = -U - sum_m C_m F_m Q_{t-1}      Q_t = softmax(E_t)

Kraehenbuehl, Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials (arXiv:1210.5644);
trained through the unrolled iterations as in Zheng et al., Conditional Random Fields as Recurrent Neural Networks
(arXiv:1502.03240). DeepLab v1 and v2 refine their score maps with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import reference
from . import _backends, _validation
from ._backends import transforms_active
from ._flops import register_flop_formula
from .gaussian_filter import gaussian_filter
from .local_gaussian_filter import local_gaussian_filter
from .permutohedral import (
    PermutohedralLattice,
    call,
    check_dimension,
    differentiate,
)

_ops = torch.ops.deeplab_kernels

FILTERS = ("permutohedral", "exact", "local")
Features = Tensor | PermutohedralLattice
Compatibility = Tensor | float


def dense_crf_mean_field(
    unary: Tensor,
    features: Features | Sequence[Features],
    compatibility: Compatibility | Sequence[Compatibility],
    *,
    iterations: int = 10,
    normalization: str | Sequence[str] = "symmetric",
    filter: str = "permutohedral",
    mask: Tensor | None = None,
    window: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """Logits of the CRF's marginals after ``iterations`` mean-field updates; ``softmax(1)`` of them is Q.

    Args:
        unary: (B, L, N) or an image (B, L, H, W) or (B, L, D, H, W): energies, that is ``-log`` of probabilities or
            minus logits. float32, float64, float16 or bfloat16; finite, or +infinity where a label is forbidden.
        features: one (B, d, N) or (B, d, *image) tensor per kernel, d from 1 to 16, in units of the kernel's standard
            deviations: positions divided by their sigma, colours by theirs. For ``filter="permutohedral"`` also a
            :class:`PermutohedralLattice`, which is then not built again.
        compatibility: per kernel, a number or tensor of shape (), (L,) or (L, L), multiplied by the kernel's weight.
            A number w is the Potts model, which favours equal labels where w > 0: C = -w I. (L,): the same per label,
            C = -diag(w). (L, L): the costs mu(x_i, x_j) themselves, C = mu, which need not be symmetric.
        iterations: T >= 0; with 0 the result is ``-unary``.
        normalization: of the kernels, or one for each: "none", "before", "after" or "symmetric"
            (:func:`permutohedral_filter`).
        filter: "permutohedral": linear in N. "exact": :func:`gaussian_filter`, quadratic in N. "local": the exact sum
            over a window of (2 * window + 1)^2 pixels (:func:`local_gaussian_filter`), for (B, L, H, W): a short-range
            CRF.
        mask: (B, N) or (B, *image), bool: pixels where it is False send and receive nothing, and their logits are
            ``-unary``.
        window: radius in pixels of ``filter="local"``, at least 1.
        recompute: what is kept for backward. False: Q of each iteration, T * B * N * L numbers, L rounded up to a
            multiple of 8 (of float32; float64 for float64). True: only the inputs; backward then runs the iterations
            again, and holds the same amount while it does with "permutohedral", one iteration's with the others.

    Returns:
        Logits in the shape and dtype of ``unary``; computed in float32 (float64 for float64), also under autocast.
        Differentiable w.r.t. ``unary``, ``features`` and ``compatibility``. Deterministic.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it. In a compiled function NaN and
            such raise RuntimeError.
    """
    _validation.floating(unary, "unary")
    if unary.dim() not in (3, 4, 5):
        raise ValueError(f"unary must have shape (B, L, N), (B, L, H, W) or (B, L, D, H, W), got {tuple(unary.shape)}")
    if unary.shape[1] < 1:
        raise ValueError(f"unary must have at least 1 label (axis 1), got shape {tuple(unary.shape)}")
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations must be an int, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {recompute!r}")
    check_filter(filter)
    _check_window(window, filter, unary)
    dtype = reference.permutohedral.compute_dtype(unary.dtype)
    feature_list = _check_features(features, unary, filter, dtype)
    matrices = _check_compatibility(compatibility, len(feature_list), unary, dtype)
    codes = _check_normalization(normalization, len(feature_list))
    _check_mask(mask, unary)
    if filter != "permutohedral":
        tensors = [f for f in feature_list if isinstance(f, Tensor)]
        return _composed(unary, tensors, matrices, mask, codes, iterations, filter, window, recompute)
    if not feature_list:
        _check_energies(unary)
        return -unary
    lattices = [f.packed if isinstance(f, PermutohedralLattice) else unary.new_empty(0) for f in feature_list]
    points = [(f.features if isinstance(f, PermutohedralLattice) else f.flatten(2)) for f in feature_list]
    flat_mask = None if mask is None else mask.reshape(unary.shape[0], -1)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (unary, *points, *matrices))
    logits, _ = call(
        "dense_crf_mean_field",
        unary.flatten(2), points, lattices, matrices, flat_mask, codes, iterations, needs_grad and not recompute,
    )  # fmt: skip
    return logits.view(unary.shape)


def check_filter(filter: str) -> None:
    allowed = ", ".join(f'"{name}"' for name in FILTERS)
    if not isinstance(filter, str):
        raise TypeError(f"filter must be one of {allowed}, got {filter!r}")
    if filter not in FILTERS:
        raise ValueError(f"filter must be one of {allowed}, got {filter!r}")


def _check_window(window: int | None, filter: str, unary: Tensor) -> None:
    if filter != "local":
        if window is not None:
            raise ValueError(f'window is for filter="local", got window={window!r} with filter="{filter}"')
        return
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f'window must be an int for filter="local", got {window!r}')
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if unary.dim() != 4:
        raise ValueError(f'unary must have shape (B, L, H, W) for filter="local", got {tuple(unary.shape)}')


def _as_list(value: Any, single: type | tuple[type, ...], name: str, what: str) -> list[Any]:
    if isinstance(value, single):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    raise TypeError(f"{name} must be {what} or a sequence of them, got {type(value).__name__}")


def _check_features(
    features: Features | Sequence[Features], unary: Tensor, filter: str, dtype: torch.dtype
) -> list[Features]:
    result: list[Features] = []
    what = "a tensor or PermutohedralLattice"
    points = math.prod(unary.shape[2:])
    for m, f in enumerate(_as_list(features, (Tensor, PermutohedralLattice), "features", what)):
        name = f"features[{m}]"
        if isinstance(f, PermutohedralLattice):
            if filter != "permutohedral":
                raise TypeError(f'{name} must be a tensor for filter="{filter}", got a PermutohedralLattice')
            if (f.batch, f.points) != (unary.shape[0], points):
                raise ValueError(
                    f"{name} must be a lattice of {unary.shape[0]} x {points} points as unary {tuple(unary.shape)}, "
                    f"got {f.batch} x {f.points}"
                )
            if f.features.dtype != dtype:
                raise TypeError(f"{name} must be a lattice of {dtype} features, got {f.features.dtype}")
            device = f.features.device
        else:
            _validation.floating(f, name)
            if f.dim() < 3 or f.shape[0] != unary.shape[0] or f.shape[2:] not in (unary.shape[2:], (points,)):
                raise ValueError(
                    f"{name} must have unary's batch and size, ({unary.shape[0]}, d, "
                    f"{', '.join(map(str, unary.shape[2:]))}), got {tuple(f.shape)}"
                )
            check_dimension(f, name)
            device, f = f.device, f.to(dtype)
        if device != unary.device:
            raise ValueError(f"{name} must be on unary's device {unary.device}, got {device}")
        result.append(f)
    return result


def _check_compatibility(
    compatibility: Compatibility | Sequence[Compatibility], kernels: int, unary: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The matrices C_m, (L, L)."""
    labels = unary.shape[1]
    given = _as_list(compatibility, (Tensor, int, float), "compatibility", "a number or tensor")
    if len(given) != kernels:
        raise ValueError(
            f"compatibility must have one entry for each of the {kernels} kernels in features, got {len(given)}"
        )
    matrices = []
    for m, c in enumerate(given):
        name = f"compatibility[{m}]"
        if isinstance(c, (int, float)) and not isinstance(c, bool):
            if not math.isfinite(c):
                raise ValueError(f"{name} must be finite, got {c}")
            matrices.append(torch.eye(labels, dtype=dtype, device=unary.device) * -c)
            continue
        _validation.floating(c, name)
        if c.shape not in ((), (labels,), (labels, labels)):
            raise ValueError(f"{name} must have shape (), ({labels},) or ({labels}, {labels}), got {tuple(c.shape)}")
        if c.device != unary.device:
            raise ValueError(f"{name} must be on unary's device {unary.device}, got {c.device}")
        if c.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(c).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        c = c.to(dtype)
        matrices.append(c if c.dim() == 2 else -c.expand(labels).diag())
    return matrices


def _check_normalization(normalization: str | Sequence[str], kernels: int) -> list[int]:
    if isinstance(normalization, str):
        return [_validation.normalization_code(normalization)] * kernels
    codes = [_validation.normalization_code(n) for n in _as_list(normalization, str, "normalization", "a string")]
    if len(codes) != kernels:
        raise ValueError(f"normalization must be one string or one for each of the {kernels} kernels, got {len(codes)}")
    return codes


def _check_mask(mask: Tensor | None, unary: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True: the pixel takes part), got {mask.dtype}")
    batch, points = unary.shape[0], math.prod(unary.shape[2:])
    if tuple(mask.shape) not in ((batch, *unary.shape[2:]), (batch, points)):
        raise ValueError(f"mask must have shape {(batch, *unary.shape[2:])}, got {tuple(mask.shape)}")
    if mask.device != unary.device:
        raise ValueError(f"mask must be on unary's device {unary.device}, got {mask.device}")


def _check_energies(unary: Tensor) -> None:
    """For the paths without the operator, where looking costs no more than reading."""
    if unary.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active():
        reference.dense_crf.check_energies(unary)


# The exact and the local filter: the same iterations, composed of the filters' operators.


def _composed(
    unary: Tensor,
    features: Sequence[Tensor],
    matrices: Sequence[Tensor],
    mask: Tensor | None,
    codes: Sequence[int],
    iterations: int,
    filter: str,
    window: int | None,
    recompute: bool,
) -> Tensor:
    _check_energies(unary)
    with torch.autocast(unary.device.type, enabled=False):
        size = unary.shape[2:] if filter == "local" else (math.prod(unary.shape[2:]),)
        energy = unary.to(matrices[0].dtype if matrices else reference.permutohedral.compute_dtype(unary.dtype))
        energy = energy.reshape(*unary.shape[:2], *size)
        shaped = [f.reshape(*f.shape[:2], *size) for f in features]
        present = None if mask is None else mask.reshape(unary.shape[0], 1, *size).to(energy.dtype)
        filters = [
            _normalised(_kernel(filter, f, window), n, energy, present) for f, n in zip(shaped, codes, strict=True)
        ]

        def update(logits: Tensor) -> Tensor:
            q = logits.softmax(1)
            logits = -energy
            for f, matrix in zip(filters, matrices, strict=True):
                logits = logits - torch.einsum("lk,bk...->bl...", matrix, f(q))
            return logits

        logits = -energy
        for _ in range(iterations):
            logits = checkpoint(update, logits, use_reentrant=False) if recompute else update(logits)
        return logits.view(unary.shape).to(unary.dtype)


def _kernel(filter: str, features: Tensor, window: int | None) -> Callable[[Tensor], Tensor]:
    if filter == "exact":
        return lambda values: gaussian_filter(values, features)
    assert window is not None
    return lambda values: local_gaussian_filter(values, features, window)


def _normalised(
    kernel: Callable[[Tensor], Tensor], code: int, like: Tensor, present: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """F of K, with n = K m and no message to or from points where ``present`` is 0."""
    m = like.new_ones(like.shape[0], 1, *like.shape[2:]) if present is None else present
    if code == _validation.NORMALIZATIONS["none"]:
        before = after = None if present is None else m
    else:
        sums = torch.where(m != 0, kernel(m), 1)
        if code == _validation.NORMALIZATIONS["symmetric"]:
            before = after = m * sums.rsqrt()
        else:
            inverse = m / sums
            before, after = (inverse, m) if code == _validation.NORMALIZATIONS["before"] else (m, inverse)

    def apply(values: Tensor) -> Tensor:
        out = kernel(values if before is None else before * values)
        return out if after is None else after * out

    return apply


# Fake kernels: shapes and dtypes without data.


@torch.library.register_fake("deeplab_kernels::dense_crf_mean_field")
def _(unary, features, lattices, compatibility, mask, normalization, iterations, save):  # type: ignore[no-untyped-def]
    return unary.new_empty(unary.shape), reference.dense_crf.saved_like(unary, iterations, save)


@torch.library.register_fake("deeplab_kernels::dense_crf_mean_field_backward")
def _(grad_out, saved, unary, features, lattices, compatibility, *args):  # type: ignore[no-untyped-def]
    need_grad_features, need_grad_compatibility = args[-2:]
    return (
        unary.new_empty(unary.shape),
        [f.new_empty(f.shape if need_grad_features else 0) for f in features],
        [c.new_empty(c.shape if need_grad_compatibility else 0) for c in compatibility],
    )


# Autograd.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    unary, features, lattices, compatibility, mask, ctx.normalization, ctx.iterations, _ = inputs
    ctx.kernels = len(features)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(unary, mask, output[1], *features, *lattices, *compatibility)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    unary, mask, saved, *rest = ctx.saved_tensors
    k = ctx.kernels
    features, lattices, compatibility = rest[:k], rest[k:-k] if k else [], rest[-k:] if k else []
    no_lattices = [None] * len(lattices)
    needs = ctx.needs_input_grad
    need_features, need_compatibility = list(needs[1]), list(needs[3])
    options = (ctx.normalization, ctx.iterations)
    if torch.is_grad_enabled():  # create_graph=True

        def definition(u: Tensor, *parameters: Tensor) -> Tensor:
            return reference.dense_crf_mean_field(u, parameters[:k], [], parameters[k:], mask, *options, False)[0]

        grads = differentiate(
            definition, (unary, *features, *compatibility), (needs[0], *need_features, *need_compatibility), grad
        )
        return grads[0], grads[1 : 1 + k], no_lattices, grads[1 + k :], None, None, None, None
    grad_unary, grad_features, grad_compatibility = _ops.dense_crf_mean_field_backward(
        grad, saved, unary, features, lattices, compatibility, mask, *options,
        any(need_features), any(need_compatibility),
    )  # fmt: skip
    return (
        grad_unary,
        [g if need else None for g, need in zip(grad_features, need_features, strict=True)],
        no_lattices,
        [g if need else None for g, need in zip(grad_compatibility, need_compatibility, strict=True)],
        None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("deeplab_kernels::dense_crf_mean_field", _backward, setup_context=_setup)

_backends.register_autocast("dense_crf_mean_field", cast_arguments=0)


# FLOP formulas: the filters' splats and slices and the product with C; see ops/permutohedral.py.


def _iteration_flops(u_shape: Sequence[int], f_shapes: Sequence[Sequence[int]]) -> int:
    batch, labels, points = u_shape
    return sum(2 * batch * labels * points * (2 * (f[1] + 1) + labels) for f in f_shapes)


@register_flop_formula(_ops.dense_crf_mean_field)
def _(u_shape, f_shapes, lattices, compatibility, mask, normalization, iterations, save, **kwargs):  # type: ignore[no-untyped-def]
    return iterations * _iteration_flops(u_shape, f_shapes)


@register_flop_formula(_ops.dense_crf_mean_field_backward)
def _(g_shape, s_shape, u_shape, f_shapes, lattices, compatibility, mask, normalization, *args, **kwargs):  # type: ignore[no-untyped-def]
    iterations, need_features, need_compatibility = args
    passes = 1 + int(bool(need_compatibility)) + 2 * int(bool(need_features)) + int(len(s_shape) != 4)
    return passes * iterations * _iteration_flops(u_shape, f_shapes)
