"""The 1x1 convolution of training, alone and with the batch normalisation that follows it.

On the CPU, float32 and float64, its three products are blocked matrix products of the maps as they lie
(csrc/cpu/pointwise/kernels.cpp). oneDNN, which torch calls, takes up to twice as long where channels are few in NCHW,
and a third longer for the gradient of large weights in channels_last. With many channels on both sides it is faster in
the other two products, and serves (benchmarks/NOTES_models.md).

Where the convolution's own kernel serves, the batch normalisation after it is part of the operator. In channels_last
its mean and variance are gathered while the product's results are in registers (csrc/cpu/pointwise/statistics.h), which
saves a pass over them; in NCHW it takes a channel at a time, which stays in the caches between its two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from . import _backends, _validation
from ._flops import register_flop_formula
from .atrous_depthwise import (
    _below_autograd,
    _call,
    _needs_autograd,
    _register_autograd,
    _transforms_active,
    _vector,
    update_running_statistics,
)
from .batch_norm_act import _statistic, batch_norm_act, check_norm, differentiable_gradients, norm_gradients

_ops = torch.ops.deeplab_kernels
_MANY_CHANNELS = 512  # on both sides


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight)`` of x (N, C, H, W) and weight (C', C, 1, 1)."""
    if not _serves(x, weight):
        return F.conv2d(x, weight)
    return _Pointwise.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
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
    """:func:`batch_norm_act` of :func:`pointwise_conv2d`, with their arguments, as one operator where
    :func:`is_one_operator`. The residual takes the product's dtype."""
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    count = size[0] * math.prod(size[2:])
    if not is_one_operator(x, weight) or count == 1:
        z = pointwise_conv2d(x, weight)
        if residual is not None:
            residual = residual.to(z.dtype)
        return batch_norm_act(
            z, gamma, beta, running_mean, running_var, momentum=momentum, eps=eps, activation=activation,
            residual=residual,
        )  # fmt: skip
    code = _validation.activation_code(activation)
    check_norm(weight, gamma, beta, running_mean, running_var, momentum, eps)
    if residual is not None:
        _validation.residual(residual, x, size)
        residual = residual.to(x.dtype)
    tensors = x, weight, residual, _vector(gamma, x.dtype), _vector(beta, x.dtype)
    out, _, mean, var = _call("pointwise_bn_act_training", tensors, eps, code, cast_arguments=3)
    update_running_statistics(running_mean, running_var, mean, var, count, momentum)
    return out  # type: ignore[no-any-return]


def is_one_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether product and batch normalisation are one operator: where the product is not better left to torch."""
    return _serves(x, weight) and not _torch_is_faster(weight)


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether own kernels may be the choice."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and weight.dtype == x.dtype
        and _needs_autograd(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _transforms_active()
    )


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _torch_is_faster(weight):
            return F.conv2d(x, weight)
        return _below_autograd(_ops.pointwise_conv2d.default, x, weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        grad_x: Tensor | None
        grad_weight: Tensor | None
        if torch.is_grad_enabled():  # create_graph=True: torch's own can be differentiated again
            grad_x, grad_weight = reference.pointwise_conv2d_backward(grad, x, weight, need_x, need_weight)
        else:
            grad_x, grad_weight = _gradients(grad, x, weight, need_x, need_weight)
        return grad_x if need_x else None, grad_weight if need_weight else None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    own_x = need_x and not _torch_is_faster(weight)
    own = _ops.pointwise_conv2d_backward.default
    grad_x, grad_weight = _below_autograd(own, grad, x, weight, own_x, need_weight)
    if need_x and not own_x:
        grad_x, _ = reference.pointwise_conv2d_backward(grad, x, weight, True, False)
    return grad_x, grad_weight


def _torch_is_faster(weight: Tensor) -> bool:
    """For the convolution and the gradient of x."""
    return weight.dtype == torch.float32 and min(weight.shape[:2]) >= _MANY_CHANNELS


@torch.library.register_fake("deeplab_kernels::pointwise_conv2d")
def _(x, weight):  # type: ignore[no-untyped-def]
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=output_memory_format(x))


@torch.library.register_fake("deeplab_kernels::pointwise_conv2d_backward")
def _(grad_out, x, weight, need_grad_x, need_grad_weight):  # type: ignore[no-untyped-def]
    grad_x = torch.empty_like(x, memory_format=output_memory_format(x)) if need_grad_x else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape if need_grad_weight else 0)


@torch.library.register_fake("deeplab_kernels::pointwise_bn_act_training")
def _(x, weight, *args):  # type: ignore[no-untyped-def]
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=output_memory_format(x))
    return out, torch.empty_like(out), _statistic(out), _statistic(out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, gamma, beta, ctx.eps, ctx.activation = inputs
    out, z, mean, var = output
    told = out if residual is not None and ctx.activation else None
    ctx.save_for_backward(x, weight, z, gamma, beta, told, mean, var)
    ctx.mark_non_differentiable(z, mean, var)
    ctx.set_materialize_grads(False)  # no zeros for these, of which z is large


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, z, gamma, beta, out, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[Tensor | None]
    if torch.is_grad_enabled():
        definition = reference.pointwise_bn_act_training
        grads = differentiable_gradients(ctx, definition, (x, weight), gamma, beta, out, grad)
    else:
        grad_z, *others = norm_gradients(ctx, grad, z, out, gamma, beta, mean, var)
        grads = [*_gradients(grad_z, x, weight, needs[0], needs[1]), *others]
    return (*(g if need else None for g, need in zip(grads, needs, strict=False)), None, None)


_register_autograd("pointwise_bn_act_training", _backward, _setup)
_backends.register_autocast("pointwise_bn_act_training", cast_arguments=3)


@register_flop_formula(_ops.pointwise_bn_act_training)
@register_flop_formula(_ops.pointwise_conv2d)
def _(x_shape, w_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _flops(x_shape, w_shape)


@register_flop_formula(_ops.pointwise_conv2d_backward)
def _(grad_shape, x_shape, w_shape, need_grad_x, need_grad_weight, **kwargs):  # type: ignore[no-untyped-def]
    return _flops(x_shape, w_shape) * (need_grad_x + need_grad_weight)


def _flops(x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    return 2 * math.prod(x_shape) * w_shape[0]
