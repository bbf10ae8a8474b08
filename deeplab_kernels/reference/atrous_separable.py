"""Atrous separable convolution as one operator, in plain torch; the signature of csrc/torch/schema.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import output_memory_format
from .atrous_depthwise import _activate, _affine, _channel, _conv_accumulated, accumulation_dtype


def _norm(
    z: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    if mean is not None:
        z = z - _channel(mean)
    if var is not None:
        z = z * _channel(torch.rsqrt(var + eps))
    return _affine(z, gamma, beta)


def _pointwise(y: Tensor, weight: Tensor) -> Tensor:
    if y.numel() == 0:  # torch's convolution refuses zero channels
        return torch.einsum("nchw,oc->nohw", y, weight[:, :, 0, 0])
    return F.conv2d(y, weight)


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    residual: Tensor | None,
    depthwise_gamma: Tensor | None,
    depthwise_beta: Tensor | None,
    depthwise_mean: Tensor | None,
    depthwise_var: Tensor | None,
    pointwise_gamma: Tensor | None,
    pointwise_beta: Tensor | None,
    pointwise_mean: Tensor | None,
    pointwise_var: Tensor | None,
    depthwise_eps: float,
    pointwise_eps: float,
    pre_activation: int,
    depthwise_activation: int,
    pointwise_activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    y = _conv_accumulated(_activate(x, pre_activation), depthwise_weight, stride, padding, dilation)
    y = _norm(y, depthwise_gamma, depthwise_beta, depthwise_mean, depthwise_var, depthwise_eps)
    z = _pointwise(_activate(y, depthwise_activation), pointwise_weight.to(acc))
    z = _norm(z, pointwise_gamma, pointwise_beta, pointwise_mean, pointwise_var, pointwise_eps)
    if residual is not None:
        z = z + residual.to(acc)
    return _activate(z, pointwise_activation).to(x.dtype).contiguous(memory_format=output_memory_format(x))
