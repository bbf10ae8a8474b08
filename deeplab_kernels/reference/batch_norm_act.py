"""Batch normalisation + residual + activation, in plain torch; the signatures of csrc/torch/schema.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import output_memory_format
from .atrous_depthwise import _activate, _affine, _masked, _norm_backward, _normalise, accumulation_dtype


def batch_norm_act_training(
    z: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = z.to(accumulation_dtype(z.dtype))
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    out = _affine(_normalise(y, mean, var, eps), gamma, beta)
    if residual is not None:
        out = out + residual.to(out.dtype)
    return _activate(out, activation).to(z.dtype).contiguous(memory_format=output_memory_format(z)), mean, var


def batch_norm_act_backward(
    grad_out: Tensor,
    z: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, memory_format = accumulation_dtype(z.dtype), output_memory_format(z)
    xhat = _normalise(z.to(acc), mean, var, eps)
    told = _affine(xhat, gamma, beta) if out is None else out
    grad = _masked(grad_out.to(acc), told, activation)
    grad_z, grad_gamma, grad_beta = _norm_backward(grad, xhat, gamma, var, eps, True)
    grad_residual = z.new_empty(0) if out is None else grad.to(z.dtype).contiguous(memory_format=memory_format)
    return grad_z.to(z.dtype).contiguous(memory_format=memory_format), grad_residual, grad_gamma, grad_beta
