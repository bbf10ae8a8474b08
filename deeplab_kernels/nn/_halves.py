"""The halves of a separable convolution, as functions of the modules that hold their parameters: what
:class:`AtrousSeparableConv2d` and :func:`deeplab_kernels.fuse` run where that is the same as calling the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import atrous_depthwise_bn_act, atrous_depthwise_conv2d
from ..ops.atrous_depthwise import _transforms_active

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
Padding = int | str | Sequence[int]


def convolve(conv: nn.Conv2d, x: Tensor, padding: Padding) -> Tensor:
    """``conv(x)`` for a depthwise ``conv``; ``padding`` stands for the module's own, as in all functions here."""
    if conv.bias is not None:
        return conv_act(conv, None, x, padding)
    return atrous_depthwise_conv2d(x, conv.weight, conv.stride, padding, conv.dilation)


def conv_act(conv: nn.Conv2d, activation: str | None, x: Tensor, padding: Padding) -> Tensor:
    """``act(conv(x))``, with the convolution's bias if it has one."""
    # Statistics of mean 0 and variance 1 with eps 0 make the normalisation exactly the identity.
    channels, dtype = conv.out_channels, torch.float64 if x.dtype == torch.float64 else torch.float32
    return atrous_depthwise_bn_act(
        x,
        conv.weight,
        None,
        conv.bias,
        x.new_zeros(channels, dtype=dtype),
        x.new_ones(channels, dtype=dtype),
        training=False,
        eps=0.0,
        activation=activation,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def norm_parameters(norm: nn.Module | None) -> ops.BatchNorm | None:
    """What a batch norm does in inference, for :func:`ops.atrous_separable_conv2d`; None for any other module."""
    if not isinstance(norm, BatchNorm):
        return None
    return ops.BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def fusable(norm: nn.Module, conv: nn.Conv2d, x: Tensor) -> TypeGuard[BatchNorm]:
    """Whether :func:`conv_norm_act` computes ``norm(conv(x))`` in the state that the batch norm is in."""
    if not isinstance(norm, BatchNorm) or (norm.running_mean is None) != (norm.running_var is None):
        return False
    batch_statistics = norm.training or norm.running_mean is None
    if isinstance(norm, nn.SyncBatchNorm) and batch_statistics:
        return False
    # A bias before the norm moves the running mean; only inference makes it part of the mean.
    return conv.bias is None or not (batch_statistics or _needs_grad(x, conv.weight, conv.bias, norm.weight, norm.bias))


def running(norm: BatchNorm) -> tuple[Tensor | None, Tensor | None, float, bool]:
    """(mean, var, momentum, whether a batch is counted): what the norm's next call uses and updates."""
    counted = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and not norm.track_running_stats:
        return None, None, momentum, counted
    if counted and norm.momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked + 1)  # type: ignore[operator]
    return norm.running_mean, norm.running_var, momentum, counted


def conv_norm_act(
    conv: nn.Conv2d,
    norm: BatchNorm,
    activation: str | None,
    x: Tensor,
    padding: Padding,
    save_conv: bool | None = None,
    pre_activation: str | None = None,
) -> Tensor:
    """``act(norm(conv(pre_activation(x))))`` in one operator; updates the running statistics as the norm would."""
    mean, var, momentum, counted = running(norm)
    if conv.bias is not None and mean is not None:
        mean = mean - conv.bias
    out = atrous_depthwise_bn_act(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        mean,
        var,
        training=norm.training or mean is None,
        momentum=momentum,
        eps=norm.eps,
        activation=activation,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        save_conv=save_conv,
        pre_activation=pre_activation,
    )
    if counted:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return out


def norm_in_place(norm: nn.Module, out: Tensor) -> Tensor:
    """``norm(out)``; inference overwrites ``out``, which is as exact as F.batch_norm and needs no second tensor.

    (Folding the norm into the convolution's weights would double the rounding error.)
    """
    if not isinstance(norm, BatchNorm) or norm.training:
        return norm(out)
    mean, var = norm.running_mean, norm.running_var
    if (
        mean is None
        or var is None
        or out.dtype not in (torch.float32, torch.float64)
        or not out.dtype == mean.dtype == var.dtype
        or _needs_grad(out, norm.weight, norm.bias)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _transforms_active()
    ):
        return norm(out)
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    return out.mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))


def activate(x: Tensor, activation: str | None, inplace: bool = False) -> Tensor:
    if activation == "relu":
        return F.relu(x, inplace=inplace)
    if activation == "relu6":
        return F.relu6(x, inplace=inplace)
    return x
