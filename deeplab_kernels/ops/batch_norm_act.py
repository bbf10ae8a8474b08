"""Batch normalisation with the batch's own statistics, addition of a residual and activation, as one operator.

    out = act(gamma * (z - mean) / sqrt(var + eps) + beta + residual)

What follows the 1x1 convolution in a separable block, and every other convolution (Ioffe and Szegedy,
arXiv:1502.03167), in training. Kept for backward: z and, with a residual before an activation, out, which the next
layer keeps anyway; the activation's mask is recomputed from z otherwise. The C++ kernel's passes over memory are
counted in csrc/cpu/batch_norm_act/batch_norm_act.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from ..reference.atrous_depthwise import _masked, accumulation_dtype
from . import _validation
from .atrous_depthwise import (
    _below_autograd,
    _call,
    _register_autograd,
    _vector,
    update_running_statistics,
)

_ops = torch.ops.deeplab_kernels


def batch_norm_act(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(z) + residual)`` in training: the batch's mean and biased variance normalise.

    Args:
        z: (N, C, H, W), float32, float64, bfloat16 or float16 (on the CPU float16 is converted to float32 and back);
            contiguous or channels_last, any other layout is copied.
        gamma, beta: (C,) scale and shift of the normalisation, or None for 1 and 0.
        running_mean, running_var: (C,), updated in place if given (both or none), as ``torch.nn.BatchNorm2d`` does.
        momentum: in [0, 1]; weight of the batch in that update.
        eps: added to the variance; positive.
        activation: "relu", "relu6", or None / "none".
        residual: (N, C, H, W) in z's dtype, added before the activation, or None.

    Returns:
        (N, C, H, W) in z's dtype and memory format. Differentiable twice w.r.t. z, residual, gamma and beta.

    Raises:
        ValueError, TypeError: an argument is not as above, or there is one value per channel.
    """
    _validation.image(z, "z")
    code = _validation.activation_code(activation)
    per_channel = z.transpose(0, 1)  # channels first, as in the weights that the checks are written for
    check_norm(per_channel, gamma, beta, running_mean, running_var, momentum, eps)
    if residual is not None:
        _validation.residual(residual, z, tuple(z.shape), "z")
        if residual.dtype != z.dtype:
            raise TypeError(f"residual must have z's dtype {z.dtype}, got {residual.dtype}")
    count = z.shape[0] * z.shape[2] * z.shape[3]
    if count == 1:
        raise ValueError(f"training needs more than 1 value per channel, got z of shape {tuple(z.shape)}")
    acc = accumulation_dtype(z.dtype)
    tensors = (z, residual, _vector(gamma, acc), _vector(beta, acc))
    out, mean, var = _call("batch_norm_act_training", tensors, eps, code, cast_arguments=0)
    update_running_statistics(running_mean, running_var, mean, var, count, momentum)
    return out


def check_norm(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """Checks the arguments of a normalisation in training; ``weight`` (C, ...)."""
    _validation.channel_vector(gamma, "gamma", weight)
    _validation.channel_vector(beta, "beta", weight)
    _validation.running_statistics(running_mean, running_var, weight, training=True)
    _validation.normalisation_constants(True, momentum, eps)


def _statistic(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[1], dtype=accumulation_dtype(z.dtype))


@torch.library.register_fake("deeplab_kernels::batch_norm_act_training")
def _(z, residual, gamma, beta, eps, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(z, memory_format=output_memory_format(z)), _statistic(z), _statistic(z)


@torch.library.register_fake("deeplab_kernels::batch_norm_act_backward")
def _(grad_out, z, out, *args):  # type: ignore[no-untyped-def]
    grad = torch.empty_like(z, memory_format=output_memory_format(z))
    return grad, z.new_empty(0) if out is None else torch.empty_like(grad), _statistic(z), _statistic(z)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, residual, gamma, beta, ctx.eps, ctx.activation = inputs
    out, mean, var = output
    ctx.save_for_backward(z, gamma, beta, out if residual is not None and ctx.activation else None, mean, var)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)  # no zeros for these


def norm_gradients(
    ctx: Any,
    grad: Tensor,
    z: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> list[Tensor]:
    """Gradients of z, residual, gamma and beta."""
    arguments = grad, z, out, gamma, beta, mean, var, ctx.eps, ctx.activation
    grads = list(_below_autograd(_ops.batch_norm_act_backward.default, *arguments))
    if out is None:
        grads[1] = grad  # shared, not copied
    return grads


def differentiable_gradients(
    ctx: Any,
    definition: Callable[..., tuple[Tensor, ...]],
    maps: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    out: Tensor | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of maps, residual, gamma and beta, where they must be differentiable again (create_graph=True): those
    of the definition, by torch."""
    # Where out tells the mask, the residual is not needed to find it.
    masked = grad if out is None else _masked(grad, out.detach(), ctx.activation)
    inputs: list[Any] = [*maps, None, gamma, beta]
    results = definition(*inputs, ctx.eps, ctx.activation if out is None else 0)
    wanted = [i for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]]
    grads: list[Tensor | None] = [None] * len(inputs)
    grads[len(maps)] = masked
    found = torch.autograd.grad(results[0], [inputs[i] for i in wanted], masked, create_graph=True)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    z, gamma, beta, out, mean, var = ctx.saved_tensors
    grads: Sequence[Tensor | None]
    if torch.is_grad_enabled():
        grads = differentiable_gradients(ctx, reference.batch_norm_act_training, (z,), gamma, beta, out, grad)
    else:
        grads = norm_gradients(ctx, grad, z, out, gamma, beta, mean, var)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


_register_autograd("batch_norm_act_training", _backward, _setup)
