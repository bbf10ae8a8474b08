"""The 1x1 convolution of training.

On the CPU, float32 and float64, its three products are blocked matrix products of the maps as they lie
(csrc/cpu/pointwise_kernels.h). oneDNN, which torch calls, takes up to twice as long where channels are few in NCHW, and
a third longer for the gradient of large weights in channels_last. With many channels on both sides it is faster in the
other two products, and serves (benchmarks/NOTES_models.md).
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
from ._flops import register_flop_formula
from .atrous_depthwise import _below_autograd, _needs_autograd, _transforms_active

_ops = torch.ops.deeplab_kernels
_MANY_CHANNELS = 512  # on both sides


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight)`` of x (N, C, H, W) and weight (C', C, 1, 1)."""
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or weight.dtype != x.dtype
        or not _needs_autograd(x, weight)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _transforms_active()
    ):
        return F.conv2d(x, weight)
    return _Pointwise.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


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
        by_torch = reference.pointwise_conv2d_backward
        if torch.is_grad_enabled():  # create_graph=True: torch's own can be differentiated again
            grad_x, grad_weight = by_torch(grad, x, weight, need_x, need_weight)
        else:
            own_x = need_x and not _torch_is_faster(weight)
            own = _ops.pointwise_conv2d_backward.default
            grad_x, grad_weight = _below_autograd(own, grad, x, weight, own_x, need_weight)
            if need_x and not own_x:
                grad_x, _ = by_torch(grad, x, weight, True, False)
        return grad_x if need_x else None, grad_weight if need_weight else None


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


@register_flop_formula(_ops.pointwise_conv2d)
def _(x_shape, w_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _flops(x_shape, w_shape)


@register_flop_formula(_ops.pointwise_conv2d_backward)
def _(grad_shape, x_shape, w_shape, need_grad_x, need_grad_weight, **kwargs):  # type: ignore[no-untyped-def]
    return _flops(x_shape, w_shape) * (need_grad_x + need_grad_weight)


def _flops(x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    return 2 * math.prod(x_shape) * w_shape[0]
