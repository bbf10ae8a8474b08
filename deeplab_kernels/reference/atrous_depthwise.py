"""Atrous depthwise convolution, alone and fused with batch normalisation and activation, in plain torch.

The functions have the signatures of the operators in csrc/torch/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import output_memory_format


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed and per-channel vectors are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


def _conv(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    if x.numel() == 0:  # torch's convolution refuses zero channels
        top, bottom, left, right = padding
        size = [
            (n + before + after - r * (k - 1) - 1) // s + 1
            for n, before, after, k, s, r in zip(
                x.shape[2:], (top, left), (bottom, right), weight.shape[2:], stride, dilation, strict=True
            )
        ]
        return x.new_zeros((x.shape[0], weight.shape[0], *size))
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return F.conv2d(x, weight, None, list(stride), [top, left], list(dilation), x.shape[1])
    return F.conv2d(_pad(x, padding), weight, None, list(stride), 0, list(dilation), x.shape[1])


def _conv_accumulated(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    return _conv(x.to(acc), weight.to(acc), stride, padding, dilation)


def _activate(z: Tensor, activation: int) -> Tensor:
    return F.relu6(z) if activation == 2 else F.relu(z) if activation == 1 else z


def _channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def atrous_depthwise_conv2d(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    y = _conv_accumulated(x, weight, stride, padding, dilation)
    return y.to(x.dtype).contiguous(memory_format=output_memory_format(x))


def atrous_depthwise_conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if x.numel() == 0 or weight.numel() == 0:
        grads = (torch.zeros_like(x), torch.zeros_like(weight))
    else:
        top, _, left, _ = padding
        padded = _pad(x.to(acc), padding)
        grads = torch.ops.aten.convolution_backward(
            grad_out.to(acc),
            padded,
            weight.to(acc),
            None,
            list(stride),
            [0, 0],
            list(dilation),
            False,
            [0, 0],
            x.shape[1],
            [need_grad_x, need_grad_weight, False],
        )[:2]
        if need_grad_x:
            grads = (grads[0][:, :, top : top + x.shape[2], left : left + x.shape[3]], grads[1])
    if need_grad_x:
        grad_x = grads[0].to(x.dtype).contiguous(memory_format=output_memory_format(x))
    if need_grad_weight:
        grad_weight = grads[1].to(weight.dtype).contiguous()
    return grad_x, grad_weight


def _normalise(y: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (y - _channel(mean)) * _channel(torch.rsqrt(var + eps))


def _affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    z = xhat if gamma is None else xhat * _channel(gamma)
    return z if beta is None else z + _channel(beta)


def _masked(grad: Tensor, z: Tensor, activation: int) -> Tensor:
    """The gradient before the activation of ``z``; the activated values tell the same."""
    if activation == 0:
        return grad
    return torch.where((z <= 0) | (z >= 6) if activation == 2 else z <= 0, 0, grad)


def _norm_backward(
    grad: Tensor, xhat: Tensor, gamma: Tensor | None, var: Tensor, eps: float, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the normalised tensor, of gamma and of beta."""
    grad_beta, grad_gamma = grad.sum((0, 2, 3)), (grad * xhat).sum((0, 2, 3))
    if batch_statistics:
        count = max(grad.shape[0] * grad.shape[2] * grad.shape[3], 1)
        grad = grad - _channel(grad_beta / count) - xhat * _channel(grad_gamma / count)
    scale = torch.rsqrt(var + eps)
    return grad * _channel(scale if gamma is None else scale * gamma), grad_gamma, grad_beta


def atrous_depthwise_bn_act_inference(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    y = _conv_accumulated(x, weight, stride, padding, dilation)
    out = _activate(_affine(_normalise(y, mean, var, eps), gamma, beta), activation)
    return out.to(x.dtype).contiguous(memory_format=output_memory_format(x))


def atrous_depthwise_bn_act_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    save_conv: bool,
    pre_activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memory_format = output_memory_format(x)
    y = _conv_accumulated(_activate(x, pre_activation), weight, stride, padding, dilation)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    out = _activate(_affine(_normalise(y, mean, var, eps), gamma, beta), activation)
    kept = y.to(x.dtype).contiguous(memory_format=memory_format) if save_conv else x.new_empty(0)
    return out.to(x.dtype).contiguous(memory_format=memory_format), kept, mean, var


def atrous_depthwise_bn_act_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    batch_statistics: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
    pre_activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, before = accumulation_dtype(x.dtype), x
    x = _activate(x, pre_activation)
    conv = y.to(acc) if y.dim() == 4 else _conv_accumulated(x, weight, stride, padding, dilation)
    xhat = _normalise(conv, mean, var, eps)
    grad = _masked(grad_out.to(acc), _affine(xhat, gamma, beta), activation)
    grad_y, grad_gamma, grad_beta = _norm_backward(grad, xhat, gamma, var, eps, batch_statistics)
    grad_x, grad_weight = atrous_depthwise_conv2d_backward(
        grad_y, x.to(acc), weight.to(acc), stride, padding, dilation, need_grad_x, need_grad_weight
    )
    if need_grad_x:
        grad_x = _masked(grad_x, before, pre_activation).contiguous(memory_format=output_memory_format(x))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_gamma, grad_beta
