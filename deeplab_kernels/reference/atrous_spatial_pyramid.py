"""All depthwise rates of an atrous spatial pyramid and the image's mean, in plain torch.

The functions have the signatures of the operators in csrc/torch/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._layout import output_memory_format
from .atrous_depthwise import (
    accumulation_dtype,
    atrous_depthwise_bn_act_backward,
    atrous_depthwise_bn_act_inference,
    atrous_depthwise_bn_act_training,
    atrous_depthwise_conv2d,
    atrous_depthwise_conv2d_backward,
)

Geometry = tuple[list[int], list[int], list[int]]


def branch_geometry(weight: Tensor, dilation: Sequence[int]) -> Iterator[Geometry]:
    """Stride, padding and dilation of each branch. The padding keeps the image's size; where it is odd, the larger part
    comes last."""
    for rates in zip(dilation[::2], dilation[1::2], strict=True):
        padding = []
        for rate, kernel in zip(rates, weight.shape[3:], strict=True):
            total = rate * (kernel - 1)
            padding += [total // 2, total - total // 2]
        yield [1, 1], padding, list(rates)


def _row(v: Tensor | None, branch: int) -> Tensor | None:
    return None if v is None else v[branch]


def image_mean(x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return x.new_empty(0)
    return x.to(accumulation_dtype(x.dtype)).mean((2, 3), keepdim=True).to(x.dtype).contiguous()


def atrous_spatial_pyramid(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    dilation: Sequence[int],
    pool: bool,
) -> tuple[list[Tensor], Tensor]:
    out = []
    for r, geometry in enumerate(branch_geometry(weight, dilation)):
        if mean is None or var is None:
            out.append(atrous_depthwise_conv2d(x, weight[r], *geometry))
        else:
            vectors = _row(gamma, r), _row(beta, r), mean[r], var[r]
            out.append(atrous_depthwise_bn_act_inference(x, weight[r], *vectors, eps, activation, *geometry))
    return out, image_mean(x, pool)


def atrous_spatial_pyramid_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    dilation: Sequence[int],
    pool: bool,
    save_conv: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    branches = [
        atrous_depthwise_bn_act_training(
            x, weight[r], _row(gamma, r), _row(beta, r), eps, activation, *geometry, save_conv
        )
        for r, geometry in enumerate(branch_geometry(weight, dilation))
    ]
    out, conv, mean, var = zip(*branches, strict=True)
    return list(out), list(conv) if save_conv else [], torch.stack(mean), torch.stack(var), image_mean(x, pool)


def atrous_spatial_pyramid_backward(
    grad_out: Sequence[Tensor],
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor,
    conv: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    batch_statistics: bool,
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # In the accumulation dtype throughout, so that the sum over the branches is rounded once.
    acc = accumulation_dtype(x.dtype)
    x_acc, grads = x.to(acc), []
    for r, geometry in enumerate(branch_geometry(weight, dilation)):
        tensors = grad_out[r].to(acc), x_acc, weight[r].to(acc)
        if mean is None or var is None:
            grads.append((*atrous_depthwise_conv2d_backward(*tensors, *geometry, need_grad_x, need_grad_weight), x, x))
        else:
            args: tuple[Any, ...] = conv[r] if conv else x.new_empty(0), _row(gamma, r), _row(beta, r), mean[r], var[r]
            args += eps, activation, batch_statistics, *geometry, need_grad_x, need_grad_weight
            grads.append(atrous_depthwise_bn_act_backward(*tensors, *args))
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_grad_x:
        total = torch.stack([g[0] for g in grads]).sum(0)
        if grad_pooled is not None:
            total = total + grad_pooled.to(acc) / max(x.shape[2] * x.shape[3], 1)
        grad_x = total.to(x.dtype).contiguous(memory_format=output_memory_format(x))
    if need_grad_weight:
        grad_weight = torch.stack([g[1] for g in grads]).to(weight.dtype)
    if mean is None:
        return grad_x, grad_weight, x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc)
    return grad_x, grad_weight, torch.stack([g[2] for g in grads]), torch.stack([g[3] for g in grads])
