"""Atrous separable convolution as one operator.

    y   = depthwise_activation(depthwise_norm(conv(pre_activation(x), depthwise_weight)))
    out = pointwise_activation(pointwise_norm(sum_c pointwise_weight[., c] y_c) + residual)

The block of DeepLab v3+ (Chen et al., arXiv:1802.02611, section 3.1). Executed in one of two ways:

- "whole": one kernel makes y tile by tile, in the caches or in registers, and multiplies it there; y is never written
  to memory. Inference only.
- "two_kernels": the fused depthwise operator and torch's 1x1 convolution, one after the other; differentiable.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from .._layout import is_channels_last_only, output_memory_format
from ..reference.atrous_depthwise import _activate, accumulation_dtype
from . import _backends, _validation
from ._flops import register_flop_formula
from ._pointwise import pointwise_bn_act, pointwise_conv2d
from .atrous_depthwise import (
    _below_autograd,
    _conv_flops,
    _needs_autograd,
    _output_size,
    _transforms_active,
    _vector,
    atrous_depthwise_bn_act,
    atrous_depthwise_conv2d,
)
from .batch_norm_act import batch_norm_act

_ops = torch.ops.deeplab_kernels

EXECUTIONS = ("auto", "whole", "two_kernels")
# Instruction sets whose matrix product keeps up with torch's.
_WHOLE_ON_CPU = _library.cpu_instruction_set() in ("avx2", "avx512")
# From here on two kernels are faster on the CPU: so many results; NCHW also so many channels, or so many more than
# results.
_MANY_RESULTS = 1536
_MANY_CHANNELS = 1024
_FEW_RESULTS = 256
# CUDA: results that one program of the Triton kernel computes; beyond, the depthwise half is computed again.
_ONE_COLUMN = 256
EXECUTION_VARIABLE = "DEEPLAB_KERNELS_SEPARABLE_EXECUTION"


class BatchNorm(NamedTuple):
    """Batch normalisation ``gamma (z - mean) / sqrt(var + eps) + beta``; vectors with one value a channel.

    mean and var are running statistics: they normalise in inference and are updated in training, where they may be
    None. gamma and beta may be None for 1 and 0.
    """

    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1


def default_execution() -> str:
    """What ``execution="auto"`` is told by the environment: "auto" unless the variable says otherwise."""
    value = os.environ.get(EXECUTION_VARIABLE, "auto")
    if value not in EXECUTIONS:
        raise ValueError(f"{EXECUTION_VARIABLE} must be one of {', '.join(EXECUTIONS)}, got {value!r}")
    return value


def picks_whole(
    execution: str,
    x: Tensor,
    depthwise_weight: Tensor,
    out_channels: int,
    tensors: Sequence[Tensor | None],
    training: bool = False,
) -> bool:
    """Whether one kernel computes the block under this ``execution``; ``tensors``: all that could need gradients."""
    if execution == "auto":
        execution = default_execution()
    if execution == "two_kernels" or _obstacle(x, depthwise_weight, tensors, training):
        return False
    return execution == "whole" or _prefers_whole(x, out_channels)


def _obstacle(x: Tensor, depthwise_weight: Tensor, tensors: Sequence[Tensor | None], training: bool) -> str:
    """Why one kernel cannot serve, or an empty string."""
    if training:
        return "training"
    if _needs_autograd(*tensors):
        return "where gradients are needed"
    if _transforms_active():
        return "under torch.func's transforms or forward-mode differentiation"
    if depthwise_weight.shape[0] != x.shape[1]:
        return f"{depthwise_weight.shape[0]} depthwise filters on {x.shape[1]} channels"
    return ""


def _prefers_whole(x: Tensor, out_channels: int) -> bool:
    """Whether one kernel is expected to be faster, where it serves.

    On the CPU it saves writing and reading y, and up to three passes over the output, and its matrix product keeps up
    with oneDNN's where it was written for the instruction set; the portable version does not. float16 and bfloat16
    would be converted to float32 and back, while torch multiplies them as they are. With many channels the product is
    nearly all of the work, and oneDNN's is better at sharing large weights between threads; where many NCHW channels
    make few results (ASPP), copying rows behind zeros, tile by tile, outweighs what is saved
    (benchmarks/NOTES_atrous_separable.md).

    On CUDA devices, by reasoning and not yet measured: in 16 bits, where one program computes all results of its
    pixels. With more, the depthwise half is computed again for each column of results; in float32 the product decides,
    and torch's is the better one.
    """
    if x.device.type == "cuda":
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return (
            _backends.on_triton("atrous_separable_conv2d")
            and x.dtype != torch.float64
            and dtype in (torch.float16, torch.bfloat16)
            and out_channels <= _ONE_COLUMN
        )
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not _WHOLE_ON_CPU or x.dtype not in (torch.float32, torch.float64):
        return False
    channels = x.shape[1]
    few = is_channels_last_only(x) or (channels < _MANY_CHANNELS and channels <= out_channels + _FEW_RESULTS)
    return few and out_channels < _MANY_RESULTS


def describe_execution() -> dict[str, str]:
    """How a block runs in inference on each device under execution="auto"; on the CPU, one in float32."""
    if (forced := default_execution()) != "auto":
        return dict.fromkeys(("cpu", "cuda"), f"{forced} ({EXECUTION_VARIABLE})")
    on_cpu = (
        f"whole; two_kernels from {_MANY_RESULTS} results on, and for NCHW with {_MANY_CHANNELS} channels and more, or "
        f"over {_FEW_RESULTS} more than results"
    )
    on_cuda = f"two_kernels; whole in 16 bits with up to {_ONE_COLUMN} results"
    return {
        "cpu": on_cpu if _WHOLE_ON_CPU else "two_kernels",
        "cuda": on_cuda if _backends.on_triton("atrous_separable_conv2d") else "two_kernels",
    }


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    depthwise_norm: BatchNorm | None = None,
    pointwise_norm: BatchNorm | None = None,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    pre_activation: str | None = None,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    execution: str = "auto",
    save_conv: bool | None = None,
) -> Tensor:
    """Depthwise convolution [+ norm] [+ activation], then 1x1 convolution [+ norm] [+ residual] [+ activation].

    Args:
        x, depthwise_weight, stride, padding, dilation: as in :func:`atrous_depthwise_conv2d`, weight (C*m, 1, kh, kw).
        pointwise_weight: (C', C*m, 1, 1), dtype of ``x``.
        depthwise_norm, pointwise_norm: :class:`BatchNorm` after the convolution, or None.
        depthwise_bias, pointwise_bias: (C*m,) and (C',), added before the norm, or None.
        pre_activation, depthwise_activation, pointwise_activation: "relu", "relu6", or None / "none".
        residual: (N, C', H', W') in x's dtype, added before the last activation, or None.
        training: the batch's own statistics normalise, and the running ones are updated.
        execution: "auto" picks by cost; "whole" or "two_kernels" (see the module) insist. The environment variable
            DEEPLAB_KERNELS_SEPARABLE_EXECUTION changes what "auto" means.
        save_conv: what training keeps of the depthwise half, as in :func:`atrous_depthwise_bn_act`.

    Returns:
        (N, C', H', W') in x's dtype and memory format. Differentiable (by "two_kernels").

    Raises:
        ValueError, TypeError: an argument is not as above, or execution="whole" where one kernel does not serve: in
            training, where gradients are needed, under torch.func's transforms, with a multiplier m > 1.
    """
    g = _validation.depthwise(x, depthwise_weight, stride, padding, dilation)
    _validation.pointwise(pointwise_weight, depthwise_weight)
    _validation.same_dtype(x, depthwise_weight, "depthwise_weight")
    _validation.same_dtype(x, pointwise_weight, "pointwise_weight")
    activations = [_validation.activation_code(a) for a in (pre_activation, depthwise_activation, pointwise_activation)]
    vectors: list[Tensor | None] = []
    for half, weight, norm, bias in (
        ("depthwise", depthwise_weight, depthwise_norm, depthwise_bias),
        ("pointwise", pointwise_weight, pointwise_norm, pointwise_bias),
    ):
        _validation.channel_vector(bias, f"{half}_bias", weight)
        vectors.append(bias)
        if norm is not None:
            if not isinstance(norm, BatchNorm):
                raise TypeError(f"{half}_norm must be an ops.BatchNorm or None, got {type(norm).__name__}")
            _validation.channel_vector(norm.gamma, f"{half}_norm.gamma", weight)
            _validation.channel_vector(norm.beta, f"{half}_norm.beta", weight)
            _validation.running_statistics(norm.mean, norm.var, weight, training)
            _validation.normalisation_constants(training, norm.momentum, norm.eps)
            vectors += [norm.gamma, norm.beta]
    height, width = _output_size(x, depthwise_weight, g.stride, g.padding, g.dilation)
    out_size = (x.shape[0], pointwise_weight.shape[0], height, width)
    if residual is not None:
        _validation.residual(residual, x, out_size)
        _validation.same_dtype(x, residual, "residual")
    _validation.optional_bool(save_conv, "save_conv")
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
    tensors = [x, depthwise_weight, pointwise_weight, residual, *vectors]
    if execution == "whole" and (obstacle := _obstacle(x, depthwise_weight, tensors, training)):
        raise ValueError(f'execution="whole" does not serve {obstacle}: use "auto" or "two_kernels"')
    if picks_whole(execution, x, depthwise_weight, pointwise_weight.shape[0], tensors, training):
        return _whole(
            x, depthwise_weight, pointwise_weight, residual, (depthwise_norm, depthwise_bias),
            (pointwise_norm, pointwise_bias), activations, g,
        )  # fmt: skip
    return _two_kernels(
        x, depthwise_weight, pointwise_weight, residual, (depthwise_norm, depthwise_bias),
        (pointwise_norm, pointwise_bias), activations, g, training, save_conv,
    )  # fmt: skip


_Half = tuple[BatchNorm | None, Tensor | None]


def _norm_vectors(half: _Half, acc: torch.dtype) -> tuple[list[Tensor | None], float]:
    """([gamma, beta, mean, var], eps), with the bias as part of the mean, or as beta where nothing is normalised."""
    norm, bias = half
    if norm is None:
        return [None, _vector(bias, acc), None, None], 0.0
    mean = norm.mean
    if bias is not None and mean is not None:
        mean = mean.to(acc) - bias.to(acc)
    return [_vector(v, acc) for v in (norm.gamma, norm.beta, mean, norm.var)], norm.eps


def _whole(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    residual: Tensor | None,
    depthwise: _Half,
    pointwise: _Half,
    activations: Sequence[int],
    g: _validation.Geometry,
) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    (first, first_eps), (second, second_eps) = _norm_vectors(depthwise, acc), _norm_vectors(pointwise, acc)
    args = (
        x, depthwise_weight, pointwise_weight, residual, *first, *second, first_eps, second_eps, *activations,
        g.stride, g.padding, g.dilation,
    )  # fmt: skip
    operator = _ops.atrous_separable_conv2d.default
    # Below autograd's Python key, which costs more than a small convolution; the compiler wants the operator itself.
    return operator(*args) if torch.compiler.is_compiling() else _below_autograd(operator, *args)


def _two_kernels(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    residual: Tensor | None,
    depthwise: _Half,
    pointwise: _Half,
    activations: Sequence[int],
    g: _validation.Geometry,
    training: bool,
    save_conv: bool | None,
) -> Tensor:
    pre, between, after = activations
    geometry: dict[str, Any] = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
    norm, bias = depthwise
    if norm is not None and bias is None:
        name = _validation.ACTIVATION_NAMES[between]
        y = atrous_depthwise_bn_act(
            x, depthwise_weight, norm.gamma, norm.beta, norm.mean, norm.var, training=training,
            momentum=norm.momentum, eps=norm.eps, activation=name, save_conv=save_conv,
            pre_activation=_validation.ACTIVATION_NAMES[pre], **geometry,
        )  # fmt: skip
    else:
        y = atrous_depthwise_conv2d(_activate(x, pre), depthwise_weight, **geometry)
        y = _activate(_batch_norm(y, depthwise, training), between)
    norm, bias = pointwise
    if norm is not None and training and y.device.type == "cpu":
        vectors = norm.gamma, norm.beta, norm.mean, norm.var
        constants: dict[str, Any] = {
            "momentum": norm.momentum,
            "eps": norm.eps,
            "activation": _validation.ACTIVATION_NAMES[after],
        }
        if bias is None:
            return pointwise_bn_act(y, pointwise_weight, *vectors, residual=residual, **constants)
        z = pointwise_conv2d(y, pointwise_weight)
        z = z + bias.to(z.dtype).view(1, -1, 1, 1)
        return batch_norm_act(z, *vectors, residual=None if residual is None else residual.to(z.dtype), **constants)
    z = pointwise_conv2d(y, pointwise_weight)
    if residual is not None:
        residual = residual.to(z.dtype)
    z = _batch_norm(z, pointwise, training)
    return _activate(z if residual is None else z + residual, after)


def _batch_norm(z: Tensor, half: _Half, training: bool) -> Tensor:
    norm, bias = half
    if bias is not None:
        z = z + bias.to(z.dtype).view(1, -1, 1, 1)
    if norm is None:
        return z
    return F.batch_norm(z, norm.mean, norm.var, norm.gamma, norm.beta, training, norm.momentum, norm.eps)


@torch.library.register_fake("deeplab_kernels::atrous_separable_conv2d")
def _(x, depthwise_weight, pointwise_weight, *args):  # type: ignore[no-untyped-def]
    size = (x.shape[0], pointwise_weight.shape[0], *_output_size(x, depthwise_weight, *args[-3:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=output_memory_format(x))


_backends.register_autocast("atrous_separable_conv2d", cast_arguments=4)


@register_flop_formula(_ops.atrous_separable_conv2d)
def _(x_shape, depthwise_shape, pointwise_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    batch, out_channels, height, width = out_shape
    depthwise = _conv_flops(x_shape, depthwise_shape, (batch, depthwise_shape[0], height, width))
    return depthwise + 2 * batch * out_channels * pointwise_shape[1] * height * width
