"""The 1x1 convolution of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import is_channels_last_only
from .atrous_depthwise import _needs_autograd, _transforms_active

# With fewer channels than this on either side, the weights' gradient is a small matrix summed over many pixels, which
# the convolution cuts into better pieces for several threads.
_MANY_CHANNELS = 256


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight)`` of x (N, C, H, W) and weight (C', C, 1, 1).

    On the CPU, float32 in channels_last with many channels, the weights' gradient is one matrix product of the maps as
    they lie: oneDNN's takes up to 1.7 times as long there (benchmarks/NOTES_models.md).
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or min(weight.shape[:2]) < _MANY_CHANNELS
        or not is_channels_last_only(x)
        or not _needs_autograd(weight)
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
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            arguments = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight, *arguments)[0]
        if ctx.needs_input_grad[1]:
            grad_weight = (_pixels(grad).t() @ _pixels(x)).view(weight.shape)
        return grad_x, grad_weight


def _pixels(x: Tensor) -> Tensor:
    """(N * H * W, C); of a channels_last tensor, the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
