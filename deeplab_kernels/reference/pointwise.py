"""The 1x1 convolution, alone and with the batch normalisation that follows it, by torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import output_memory_format
from .batch_norm_act import batch_norm_act_training


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight)


def pointwise_conv2d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_grad_x: bool, need_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    arguments = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [need_grad_x, need_grad_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad_out, x, weight, *arguments)
    return grad_x if need_grad_x else x.new_empty(0), grad_weight if need_grad_weight else weight.new_empty(0)


def pointwise_bn_act_training(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = F.conv2d(x, weight)
    out, mean, var = batch_norm_act_training(z, residual, gamma, beta, eps, activation)
    out, z = (t.contiguous(memory_format=output_memory_format(x)) for t in (out, z))
    return out, z, mean, var
