"""Atrous depthwise convolution, alone and fused with batch normalisation and activation, in Triton.

    y[n, c*m + q, i, j] = sum_{u,v} x[n, c, s*i + r*u - p, s*j + r*v - p] w[c*m + q, 0, u, v]
    out = act(gamma * (y - mean) / sqrt(var + eps) + beta)

The functions have the signatures and results of :mod:`deeplab_kernels.reference.atrous_depthwise`; they take float32,
float16 and bfloat16 with float32 accumulation, and hand float64 and empty tensors to the reference.

How the work is cut. A tile is a few pixels times a few channels. In channels_last the channels are its fast axis and
its pixels are neighbours of one phase of the rate (rows i, i + r, i + 2r ...), so that the taps of a tile overlap; in
contiguous tensors its pixels are consecutive elements of a plane, across row ends. A program takes a run of tiles, down
the rows of a phase or along a plane: what the taps of one tile read, the next tile finds in the L1 cache.

Memory traffic in tensors of the activation's size (X input, Y output):
    inference                    read X, write Y
    training, convolution kept   read X, write Y with the statistics in its epilogue; read Y, write out
    training, recomputed         read X; read X, write out
    backward of the norm         read dout, Y; read dout, Y, write dY
    backward of the convolution  read dY, X, write dX: both gradients in one pass for kernels of up to 9 taps

Sums over pixels (statistics, gradients of weight, gamma and beta) are formed per program in registers, written as
[slices, ..., channels] in float32 and added up by a second kernel in a fixed order: no atomics, results repeat bit for
bit. Statistics are merged as (count, mean, M2) (Chan, Golub, LeVeque 1983), so a mean far from zero costs no digits.

Copies that are made: a tensor that is neither contiguous nor channels_last becomes contiguous, a gradient or saved
convolution in another layout than x takes x's, and channels_last transposes the weight to [taps][channels].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from ._tiling import (
    _elements_per_thread,
    _flat_block,
    _flat_tiling,
    _geometry,
    _Shape,
    _shape,
    _slice_block,
    _tap_tiling,
    _unit,
)
from .atrous_depthwise_kernels import (
    _forward_kernel,
    _grad_input_kernel,
    _grad_weight_kernel,
    _merge_statistics_kernel,
    _norm_grad_kernel,
    _norm_sums_kernel,
    _normalise_kernel,
    _sum_slices_kernel,
)

_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
# Weight gradients that one program accumulates in registers: all of a 3 x 3 kernel.
_TAP_GROUP = 9


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, device: torch.device
) -> None:
    """The only place that starts a kernel; benchmarks/triton_resources.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


def _elements(t: Tensor) -> dict[str, int]:
    unit = _unit(t.numel())
    return {"element_units": t.numel() // unit, "ELEMENT_UNIT": unit}


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve this call; float64, empty tensors and planes of 2^31 pixels go to plain torch."""
    if x.dtype not in (*_HALF_OR_SINGLE, torch.float64):
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    sizes_served = x.numel() > 0 and weight.numel() > 0 and x.shape[2] * x.shape[3] < 2**31
    return sizes_served and x.dtype != torch.float64


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=output_memory_format(x)) else x.contiguous()


def _kernel_weight(weight: Tensor, shape: _Shape) -> Tensor:
    """[taps][channels] in channels_last, so that a tap is read in vectors; [channels][taps] otherwise."""
    flat = weight.contiguous().view(shape.channels, shape.taps)
    return flat.t().contiguous() if shape.channels_last else flat


def _output(x: Tensor, shape: _Shape, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        (shape.batch, shape.channels, shape.rows, shape.cols), dtype=dtype or x.dtype, device=x.device,
        memory_format=torch.channels_last if shape.channels_last else torch.contiguous_format,
    )  # fmt: skip


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _new_vector(x: Tensor, shape: _Shape) -> Tensor:
    return torch.empty(shape.channels, dtype=torch.float32, device=x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    y: Tensor | None,
    *,
    statistics: bool = False,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """Writes ``y``; returns the batch's (mean, var) if ``statistics``."""
    per_thread = _elements_per_thread(shape, 3 if statistics else 1)
    # Outputs i and i + q read the same input rows, one tap apart, if s*q = r*(whole number).
    phases = (shape.rate[0] // math.gcd(shape.rate[0], shape.stride[0]),
              shape.rate[1] // math.gcd(shape.rate[1], shape.stride[1]))  # fmt: skip
    tiling = _tap_tiling(shape, shape.channels, shape.rows, shape.cols, phases, 128 * per_thread)
    partials = counts = None
    if statistics:
        partials = torch.empty((tiling.slices, 2, shape.channels), dtype=torch.float32, device=x.device)
        counts = torch.empty(tiling.slices, dtype=torch.float32, device=x.device)
    unit = _unit(shape.channels)
    arguments = {
        "x": x, "weight": _kernel_weight(weight, shape), "y": y, "mean": mean, "var": var, "gamma": gamma, "beta": beta,
        "partials": partials, "counts": counts, "eps": eps, "channel_units": shape.channels // unit, "UNIT": unit,
        "in_channels": shape.in_channels, "ACTIVATION": activation, **_geometry(shape, tiling),
    }  # fmt: skip
    _launch(_forward_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), x.device)
    if partials is None or counts is None:
        return None
    mean, var = _new_vector(x, shape), _new_vector(x, shape)
    _merge_statistics(partials[None], counts[None], mean, var, shape.batch * shape.rows * shape.cols)
    return mean, var


def _merge_statistics(partials: Tensor, counts: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
    """``partials`` (branches, slices, 2, channels) of ``count`` values a channel -> mean and biased var."""
    branches, slices, _, channels = partials.shape
    block_s, block_c = _slice_block(slices)
    arguments = {
        "partials": partials, "counts": counts, "mean": mean, "var": var, "count": float(count), "slices": slices,
        "channels": channels, "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    _launch(_merge_statistics_kernel, (triton.cdiv(channels, block_c), branches), arguments, 4, partials.device)


def _sum_slices(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first[b, c, r] = sum_s partials[b, s, r, c]; with ``second`` the two rows go to one vector each."""
    branches, slices, rows, channels = partials.shape
    block_s, block_c = _slice_block(slices)
    arguments = {
        "partials": partials, "first": first, "second": second, "slices": slices, "rows": rows, "channels": channels,
        "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    _launch(_sum_slices_kernel, (triton.cdiv(channels, block_c), rows, branches), arguments, 8, partials.device)


def _normalise_into(out: Tensor, y: Tensor, shape: _Shape, norm: dict[str, Any], activation: int) -> None:
    """out = act(norm(y)); ``norm``: mean, var, gamma, beta, eps."""
    unit, block = _unit(shape.channels), _flat_block(shape)
    arguments = {
        **norm, "y": y, "out": out, **_elements(y),
        "channel_units": shape.channels // unit, "UNIT": unit, "plane": shape.rows * shape.cols,
        "ACTIVATION": activation, "CHANNELS_LAST": shape.channels_last, "BLOCK": block,
    }  # fmt: skip
    _launch(_normalise_kernel, (triton.cdiv(y.numel(), block),), arguments, 4, y.device)


def _norm_sums(grad: Tensor, conv: Tensor, shape: _Shape, norm: dict[str, Any], activation: int) -> Tensor:
    """Sums of g and of g xhat in slices, (slices, 2, channels); ``grad``: of act(norm(conv))."""
    unit, pixels = _unit(shape.channels), shape.rows * shape.cols
    per_thread = _elements_per_thread(shape)
    tiling = _flat_tiling(shape, shape.channels, pixels, 128 * per_thread)
    partials = torch.empty((tiling.slices, 2, shape.channels), dtype=torch.float32, device=grad.device)
    arguments = {
        **norm, "grad": grad, "y": conv, "partials": partials, "channel_units": shape.channels // unit, "UNIT": unit,
        "ACTIVATION": activation, "CHANNELS_LAST": shape.channels_last, "items": tiling.items, "steps": tiling.steps,
        "channel_tiles": tiling.channel_tiles, "pixels": pixels, "tiles": tiling.row_tiles, "WIDE": shape.wide,
        "PIXELS": tiling.tile_w, "BLOCK_C": tiling.block_c,
    }  # fmt: skip
    _launch(_norm_sums_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), grad.device)
    return partials


def _conv_gradient(
    grad: Tensor,
    conv: Tensor,
    shape: _Shape,
    norm: dict[str, Any],
    activation: int,
    batch_statistics: bool,
    grad_beta: Tensor,
    grad_gamma: Tensor,
) -> Tensor:
    """The gradient of conv, from that of act(norm(conv))."""
    grad_y = torch.empty_like(grad)
    unit, block, pixels = _unit(shape.channels), _flat_block(shape), shape.rows * shape.cols
    arguments = {
        **norm, "grad": grad, "y": conv, "grad_y": grad_y, "sum_g": grad_beta, "sum_gx": grad_gamma,
        "channel_units": shape.channels // unit, "UNIT": unit, "ACTIVATION": activation,
        "CHANNELS_LAST": shape.channels_last, "count": float(shape.batch * pixels), **_elements(grad), "plane": pixels,
        "BATCH_STATISTICS": batch_statistics, "BLOCK": block,
    }  # fmt: skip
    _launch(_norm_grad_kernel, (triton.cdiv(grad.numel(), block),), arguments, 4, grad.device)
    return grad_y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, shape: _Shape, need_grad_x: bool, need_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution; ``grad`` has the layout of ``x``."""
    grad_x = torch.empty_like(x, memory_format=output_memory_format(x)) if need_grad_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else 0)
    kernel_weight = _kernel_weight(weight, shape)
    # Both gradients come from one kernel if its registers hold all taps and both have the same channels.
    together = need_grad_weight and need_grad_x and shape.taps <= _TAP_GROUP and shape.multiplier == 1
    if need_grad_x and not together:
        per_thread = _elements_per_thread(shape)
        tiling = _tap_tiling(shape, shape.in_channels, shape.height, shape.width, shape.rate, 128 * per_thread)
        unit = _unit(shape.in_channels)
        arguments = {
            "grad": grad, "weight": kernel_weight, "grad_x": grad_x, "channel_units": shape.in_channels // unit,
            "UNIT": unit, **_geometry(shape, tiling),
        }  # fmt: skip
        _launch(_grad_input_kernel, (tiling.programs,), arguments, tiling.warps(per_thread), x.device)
    if need_grad_weight:
        group = min(shape.taps, _TAP_GROUP)
        per_thread = _elements_per_thread(shape, group)
        tiling = _tap_tiling(shape, shape.channels, shape.height, shape.width, shape.rate, 128 * per_thread)
        partials = torch.empty((tiling.slices, shape.taps, shape.channels), dtype=torch.float32, device=x.device)
        unit = _unit(shape.channels)
        arguments = {
            "grad": grad, "x": x, "weight": kernel_weight, "grad_x": grad_x if together else None, "partials": partials,
            "channel_units": shape.channels // unit, "UNIT": unit, "in_channels": shape.in_channels, "GROUP": group,
            **_geometry(shape, tiling),
        }  # fmt: skip
        grid = (tiling.programs, triton.cdiv(shape.taps, group))
        _launch(_grad_weight_kernel, grid, arguments, tiling.warps(per_thread), x.device)
        _sum_slices(partials[None], grad_weight)
    return grad_x, grad_weight


# The operators.


def atrous_depthwise_conv2d(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    if not _served(x, weight):
        return reference.atrous_depthwise_conv2d(x, weight, stride, padding, dilation)
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    y = _output(x, shape)
    _forward(x, weight, shape, y)
    return y


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
    if not _served(x, weight):
        return reference.atrous_depthwise_conv2d_backward(
            grad_out, x, weight, stride, padding, dilation, need_grad_x, need_grad_weight
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    grad = grad_out.contiguous(memory_format=output_memory_format(x))
    return _backward(grad, x, weight, shape, need_grad_x, need_grad_weight)


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
    if not _served(x, weight):
        return reference.atrous_depthwise_bn_act_inference(
            x, weight, gamma, beta, mean, var, eps, activation, stride, padding, dilation
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    out = _output(x, shape)
    _forward(
        x, weight, shape, out, mean=_vector(mean), var=_vector(var), gamma=_vector(gamma), beta=_vector(beta), eps=eps,
        activation=activation,
    )  # fmt: skip
    return out


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
    if pre_activation or not _served(x, weight):
        return reference.atrous_depthwise_bn_act_training(
            x, weight, gamma, beta, eps, activation, stride, padding, dilation, save_conv, pre_activation
        )
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    gamma, beta = _vector(gamma), _vector(beta)
    y = _output(x, shape) if save_conv else None
    statistics = _forward(x, weight, shape, y, statistics=True)
    assert statistics is not None
    mean, var = statistics
    out = _output(x, shape)
    if y is None:
        _forward(x, weight, shape, out, mean=mean, var=var, gamma=gamma, beta=beta, eps=eps, activation=activation)
        return out, x.new_empty(0), mean, var
    norm = {"mean": mean, "var": var, "gamma": gamma, "beta": beta, "eps": eps}
    _normalise_into(out, y, shape, norm, activation)
    return out, y, mean, var


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
    if pre_activation or not _served(x, weight):
        return reference.atrous_depthwise_bn_act_backward(
            grad_out, x, weight, y, gamma, beta, mean, var, eps, activation, batch_statistics, stride, padding,
            dilation, need_grad_x, need_grad_weight, pre_activation,
        )  # fmt: skip
    x = _dense(x)
    shape = _shape(x, weight, stride, padding, dilation)
    memory_format = output_memory_format(x)
    grad = grad_out.contiguous(memory_format=memory_format)
    if y.dim() == 4:
        conv = y.contiguous(memory_format=memory_format)
    else:  # in float32: the forward pass activated the unrounded sums, and its mask must be found again
        conv = _output(x, shape, torch.float32)
        _forward(x, weight, shape, conv)
    grad_beta, grad_gamma = _new_vector(x, shape), _new_vector(x, shape)
    norm = {"mean": _vector(mean), "var": _vector(var), "gamma": _vector(gamma), "beta": _vector(beta), "eps": eps}
    _sum_slices(_norm_sums(grad, conv, shape, norm, activation)[None], grad_beta, grad_gamma)
    if not (need_grad_x or need_grad_weight):
        return x.new_empty(0), weight.new_empty(0), grad_gamma, grad_beta
    grad_y = _conv_gradient(grad, conv, shape, norm, activation, batch_statistics, grad_beta, grad_gamma)
    grad_x, grad_weight = _backward(grad_y, x, weight, shape, need_grad_x, need_grad_weight)
    return grad_x, grad_weight, grad_gamma, grad_beta
