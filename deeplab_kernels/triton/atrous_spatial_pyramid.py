"""All depthwise rates of an atrous spatial pyramid and the image's mean, in Triton.

    y_r[n, c, i, j] = sum_{u,v} x[n, c, i + rate_r*(u - 1), j + rate_r*(v - 1)] w_r[c, 0, u, v]
    out_r = act(gamma_r * (y_r - mean_r) / sqrt(var_r + eps) + beta_r),  pooled[n, c] = mean_{i,j} x[n, c, i, j]

The functions have the signatures and results of :mod:`deeplab_kernels.reference.atrous_spatial_pyramid`; they take
float32, float16 and bfloat16 with float32 accumulation, and hand float64 and empty tensors to the reference.

A program takes a run of tiles of one image through all branches, one after the other, as atrous_depthwise.py takes them
through one. The tiles are pixels of one phase of the rates' greatest common divisor (channels_last): what any tap of a
branch reads is in the same phase, 6 x 6 pixels of a 33 x 33 map at rates 6, 12, 18, and stays in the L1 cache.

Memory traffic in tensors of x's size (X; R branches), where the caches keep a phase of an image:
    inference                   read X, write R X
    training, convolution kept  read X, write R X with the statistics; read R X, write R X
    training, recomputed        read X; read X, write R X
    backward of the norms       R times: read dout, Y; read dout, Y, write dY
    backward of the branches    read R X (dY) and X, write X: all gradients in one kernel

Weight gradients are summed branch by branch in registers; the gradient of x is gathered from all branches in a second
loop over the same tiles and rounded once. Partial sums are merged in a fixed order: no atomics, results repeat bit for
bit. Padding is multiplied as a zero, as by torch's convolutions in general: an infinite weight gives NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from . import _tiling, atrous_depthwise
from ._tiling import (
    _elements_per_thread,
    _geometry,
    _Shape,
    _tap_tiling,
    _Tiling,
    _unit,
)
from .atrous_depthwise import (
    _TAP_GROUP,
    _conv_gradient,
    _dense,
    _merge_statistics,
    _norm_sums,
    _normalise_into,
    _served,
    _sum_slices,
    _vector,
)
from .atrous_spatial_pyramid_kernels import _pyramid_backward_kernel, _pyramid_forward_kernel


def _shape(x: Tensor, weight: Tensor, dilation: Sequence[int]) -> _Shape:
    """Of a branch; its rate is the greatest common divisor of all: the phases that the tiles lie in."""
    batch, channels, height, width = x.shape
    rates = math.gcd(*dilation[::2]), math.gcd(*dilation[1::2])
    return _Shape(
        batch, channels, channels, height, width, height, width, (weight.shape[3], weight.shape[4]), (1, 1), 0, 0,
        rates, output_memory_format(x) == torch.channels_last, x.element_size(),
    )  # fmt: skip


def _run_tiling(shape: _Shape, elements: int) -> _Tiling:
    """The tiles of one image; steps are chosen for the whole batch."""
    one = replace(shape, batch=1)
    tiling = _tap_tiling(one, shape.channels, shape.rows, shape.cols, shape.rate, elements)
    programs = shape.batch * tiling.items * tiling.channel_tiles
    steps = max(1, min(_tiling._MAX_STEPS, programs // _tiling._ENOUGH_PROGRAMS))
    return replace(tiling, steps=min(steps, tiling.items))


def _arguments(x: Tensor, weight: Tensor, shape: _Shape, tiling: _Tiling, dilation: Sequence[int]) -> dict[str, Any]:
    unit = _unit(shape.channels)
    geometry = _geometry(shape, tiling)
    for name in ("items", "rows", "cols", "pad_top", "pad_left", "rate_h", "rate_w", "MULTIPLIER", "SH", "SW",
                 "SAME_WIDTH"):  # fmt: skip
        del geometry[name]
    return {
        **geometry, "x": x, "weight": weight, "per_image": tiling.items,
        "parts": tiling.slices, "channel_units": shape.channels // unit, "UNIT": unit, "BRANCHES": len(dilation) // 2,
        "RATES_H": tuple(dilation[::2]), "RATES_W": tuple(dilation[1::2]),
    }  # fmt: skip


def _kernel_weight(weight: Tensor, shape: _Shape) -> Tensor:
    """[R][taps][channels] in channels_last, so that a tap is read in vectors; [R][channels][taps] otherwise."""
    flat = weight.contiguous().view(weight.shape[0], shape.channels, shape.taps)
    return flat.transpose(1, 2).contiguous() if shape.channels_last else flat


def _images(x: Tensor, count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    memory_format = output_memory_format(x)
    return [torch.empty_like(x, dtype=dtype, memory_format=memory_format) for _ in range(count)]


def _vectors(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(weight.shape[:2], dtype=torch.float32, device=x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    dilation: Sequence[int],
    ys: list[Tensor] | None,
    *,
    pool: bool,
    statistics: bool = False,
    norm: dict[str, Any] | None = None,
    activation: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes ``ys``; returns (pooled, mean, var), the last two with ``statistics``."""
    per_thread = _elements_per_thread(shape, 3 if statistics else 1)
    tiling = _run_tiling(shape, 128 * per_thread)
    branches, slices = weight.shape[0], shape.batch * tiling.slices
    partials = counts = sums = None
    if statistics:
        partials = torch.empty((branches, slices, 2, shape.channels), dtype=torch.float32, device=x.device)
        counts = torch.empty((branches, slices), dtype=torch.float32, device=x.device)
    if pool:
        sums = torch.empty((shape.batch, tiling.slices, 1, shape.channels), dtype=torch.float32, device=x.device)
    arguments = {
        **_arguments(x, _kernel_weight(weight, shape), shape, tiling, dilation),
        **(norm or dict.fromkeys(("mean", "var", "gamma", "beta")) | {"eps": 0.0}),
        "ys": None if ys is None else tuple(ys), "partials": partials, "counts": counts, "pool": sums,
        "ACTIVATION": activation,
    }  # fmt: skip
    programs = shape.batch * tiling.programs
    atrous_depthwise._launch(_pyramid_forward_kernel, (programs,), arguments, tiling.warps(per_thread), x.device)
    pooled = x.new_empty(0)
    if sums is not None:
        pooled = x.new_empty((shape.batch, shape.channels, 1, 1))
        _sum_slices(sums, pooled)
    if partials is None or counts is None:
        return pooled, None, None
    mean, var = _vectors(x, weight), _vectors(x, weight)
    _merge_statistics(partials, counts, mean, var, shape.batch * shape.rows * shape.cols)
    return pooled, mean, var


def _norm(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> dict[str, Any]:
    return {"mean": _vector(mean), "var": _vector(var), "gamma": _vector(gamma), "beta": _vector(beta), "eps": eps}


def _of_branch(norm: dict[str, Any], r: int) -> dict[str, Any]:
    return {name: v[r] if isinstance(v, Tensor) else v for name, v in norm.items()}


def _backward(
    grads: Sequence[Tensor],
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor,
    shape: _Shape,
    dilation: Sequence[int],
    need_grad_x: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """``grads``: of the convolutions, in the layout of ``x``."""
    grad_x = _images(x, 1)[0] if need_grad_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else 0)
    group = min(shape.taps, _TAP_GROUP)
    per_thread = _elements_per_thread(shape, group if need_grad_weight else 1)
    tiling = _run_tiling(shape, 128 * per_thread)
    partials = None
    if need_grad_weight:
        size = (weight.shape[0], shape.batch * tiling.slices, shape.taps, shape.channels)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
    arguments = {
        **_arguments(x, _kernel_weight(weight, shape), shape, tiling, dilation), "grads": tuple(grads),
        "pooled": _vector(grad_pooled), "grad_x": grad_x if need_grad_x else None, "partials": partials, "GROUP": group,
    }  # fmt: skip
    grid = (shape.batch * tiling.programs, triton.cdiv(shape.taps, group) if need_grad_weight else 1)
    atrous_depthwise._launch(_pyramid_backward_kernel, grid, arguments, tiling.warps(per_thread), x.device)
    if partials is not None:
        _sum_slices(partials, grad_weight)
    return grad_x, grad_weight


# The operators.


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
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid(x, weight, gamma, beta, mean, var, eps, activation, dilation, pool)
    x = _dense(x)
    out = _images(x, weight.shape[0])
    norm = None if mean is None else _norm(gamma, beta, mean, var, eps)
    pooled, _, _ = _forward(
        x, weight, _shape(x, weight, dilation), dilation, out, pool=pool, norm=norm, activation=activation
    )
    return out, pooled


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
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid_training(
            x, weight, gamma, beta, eps, activation, dilation, pool, save_conv
        )
    x = _dense(x)
    shape = _shape(x, weight, dilation)
    conv = _images(x, weight.shape[0]) if save_conv else []
    pooled, mean, var = _forward(x, weight, shape, dilation, conv or None, pool=pool, statistics=True)
    assert mean is not None
    assert var is not None
    norm, out = _norm(gamma, beta, mean, var, eps), _images(x, weight.shape[0])
    if not save_conv:
        _forward(x, weight, shape, dilation, out, pool=False, norm=norm, activation=activation)
    for r, y in enumerate(conv):
        _normalise_into(out[r], y, shape, _of_branch(norm, r), activation)
    return out, conv, mean, var, pooled


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
    if not _served(x, weight):
        return reference.atrous_spatial_pyramid_backward(
            grad_out, grad_pooled, x, weight, conv, gamma, beta, mean, var, eps, activation, batch_statistics, dilation,
            need_grad_x, need_grad_weight,
        )  # fmt: skip
    x = _dense(x)
    shape, memory_format = _shape(x, weight, dilation), output_memory_format(x)
    grads = [g.contiguous(memory_format=memory_format) for g in grad_out]
    grad_gamma = grad_beta = x.new_empty(0, dtype=torch.float32)
    if mean is not None:
        kept = [y.contiguous(memory_format=memory_format) for y in conv]
        if not kept:  # in float32: the forward pass activated the unrounded sums, and its mask must be found again
            kept = _images(x, len(grads), torch.float32)
            _forward(x, weight, shape, dilation, kept, pool=False)
        norm = _norm(gamma, beta, mean, var, eps)
        grad_gamma, grad_beta = _vectors(x, weight), _vectors(x, weight)
        sums = [_norm_sums(g, y, shape, _of_branch(norm, r), activation)
                for r, (g, y) in enumerate(zip(grads, kept, strict=True))]  # fmt: skip
        _sum_slices(torch.stack(sums), grad_beta, grad_gamma)
        if need_grad_x or need_grad_weight:
            grads = [
                _conv_gradient(
                    g, y, shape, _of_branch(norm, r), activation, batch_statistics, grad_beta[r], grad_gamma[r]
                )
                for r, (g, y) in enumerate(zip(grads, kept, strict=True))
            ]
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_grad_x or need_grad_weight:
        grad_x, grad_weight = _backward(grads, grad_pooled, x, weight, shape, dilation, need_grad_x, need_grad_weight)
    return grad_x, grad_weight, grad_gamma, grad_beta if mean is not None else grad_beta.clone()
