"""The 1x1 convolution, by torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight)


def pointwise_conv2d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_grad_x: bool, need_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    arguments = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [need_grad_x, need_grad_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad_out, x, weight, *arguments)
    return grad_x if need_grad_x else x.new_empty(0), grad_weight if need_grad_weight else weight.new_empty(0)
