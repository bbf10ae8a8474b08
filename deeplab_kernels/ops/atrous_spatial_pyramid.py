"""The depthwise halves of an atrous spatial pyramid and the image's mean, in one pass over the input.

    y_r[n, c, i, j] = act(norm_r(sum_{u,v} x[n, c, i + rate_r*(u - 1), j + rate_r*(v - 1)] w_r[c, 0, u, v]))
    pooled[n, c]    = mean_{i,j} x[n, c, i, j]

The stage that DeepLab v3 and v3+ end their encoder with (Chen et al., arXiv:1706.05587, section 3.3; with separable
convolutions arXiv:1802.02611). Branch by branch x is read R + 1 times and, in training, R + 1 gradients of its size are
written and added; here it is read once and its gradient written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from ..reference.atrous_depthwise import accumulation_dtype
from . import _backends, _validation
from ._flops import register_flop_formula
from .atrous_depthwise import (
    _below_autograd,
    _call,
    _conv_flops,
    _transforms_active,
    save_conv_default,
    update_running_statistics,
)
from .atrous_separable import BatchNorm

_ops = torch.ops.deeplab_kernels

_Vectors = list[Tensor | None]

# Elsewhere plain torch serves, branch by branch.
_KERNELS_ON = frozenset(d for d, by in _backends.serving("atrous_spatial_pyramid").items() if by != "reference")


def atrous_spatial_pyramid(
    x: Tensor,
    weights: Sequence[Tensor] | Tensor,
    dilations: Sequence[int | Sequence[int]],
    norms: Sequence[BatchNorm] | None = None,
    *,
    activation: str | None = None,
    training: bool = False,
    pool: bool = True,
    save_conv: bool | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """``act(norm_r(atrous_depthwise_conv2d(x, weights[r], padding="same", dilation=dilations[r])))`` for every branch r
    and ``x.mean((2, 3), keepdim=True)``, together.

    Args:
        x: (N, C, H, W); float32, float64, bfloat16 or float16 (on the CPU float16 is converted to float32 and back);
            contiguous or channels_last, any other layout is copied.
        weights: R tensors (C, 1, kh, kw), all of one size, or one tensor (R, C, 1, kh, kw); dtype of ``x`` (under
            autocast both take the autocast dtype).
        dilations: R rates, each an int or (vertical, horizontal).
        norms: R :class:`BatchNorm`, all with the same ``eps``, or None.
        activation: "relu", "relu6", or None / "none".
        training: the batch's own statistics normalise, and the running ones given are updated in place, as in
            :func:`atrous_depthwise_bn_act`.
        pool: whether to return the mean.
        save_conv: what training keeps for backward, as in :func:`atrous_depthwise_bn_act`. On the CPU True runs branch
            by branch.

    Returns:
        (y, pooled): R tensors (N, C, H, W) in x's dtype and memory format, and the mean (N, C, 1, 1) in x's dtype (None
        without ``pool``). Sums are formed in float32 (float64 for float64). Differentiable w.r.t. x, weights, gamma and
        beta; x is kept for backward.

    Raises:
        ValueError, TypeError: an argument is not as above, or training on one value per channel.
    """
    branches = _branches(weights, dilations, norms)
    rates: list[int] = []
    for r, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        name = f"weights[{r}]"
        rates += _validation.depthwise(x, weight, 1, "same", dilation, name).dilation
        _validation.same_dtype(x, weight, name)
        if weight.shape[0] != x.shape[1] or weight.shape != weights[0].shape:
            raise ValueError(
                f"{name} must have shape {(x.shape[1], *weights[0].shape[1:])}, one filter a channel and all of one "
                f"size, got {tuple(weight.shape)}"
            )
    code = _validation.activation_code(activation)
    _validation.optional_bool(save_conv, "save_conv")
    vectors, eps = _norm_vectors(x, weights, norms, training, code)
    weight = weights if isinstance(weights, Tensor) else torch.stack(tuple(weights))
    if not training or norms is None:
        y, pooled = _call("atrous_spatial_pyramid", (x, weight, *vectors), eps, code, rates, pool)
        return y, pooled if pool else None
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 1:
        raise ValueError(f"training needs more than 1 value per channel, got x of shape {tuple(x.shape)}")
    save_conv = save_conv_default(x) if save_conv is None else save_conv
    y, _, mean, var, pooled = _call(
        "atrous_spatial_pyramid_training", (x, weight, *vectors[:2]), eps, code, rates, pool, save_conv
    )
    for r in range(branches):
        norm = norms[r]
        update_running_statistics(norm.mean, norm.var, mean[r], var[r], count, norm.momentum)
    return y, pooled if pool else None


def serves_in_one_pass(x: Tensor) -> bool:
    """Whether the operator is more than a composition of other operators, on x's device and under what is active."""
    return x.device.type in _KERNELS_ON and not _transforms_active()


def describe_execution() -> dict[str, str]:
    """How :class:`nn.AtrousSpatialPyramid` runs its separable branches on each device."""
    one_pass = "one pass over x; in inference branch by branch where the blocks run whole"
    return {device: one_pass if device in _KERNELS_ON else "branch by branch" for device in ("cpu", "cuda")}


def _branches(weights: Any, dilations: Any, norms: Any) -> int:
    """The number of branches, after a check that all arguments have one entry for each."""
    if not isinstance(weights, Tensor) and not (isinstance(weights, Sequence) and not isinstance(weights, str)):
        raise TypeError(f"weights must be a sequence of tensors or one tensor, got {type(weights).__name__}")
    if isinstance(weights, Tensor) and weights.dim() != 5:
        raise ValueError(f"weights must have shape (R, C, 1, kh, kw), got {tuple(weights.shape)}")
    branches = len(weights)
    if branches == 0:
        raise ValueError("weights must have at least one branch, got none")
    for name, given in (("dilations", dilations), ("norms", norms)):
        if name == "norms" and given is None:
            continue
        if not isinstance(given, Sequence) or isinstance(given, (str, BatchNorm)):
            raise TypeError(f"{name} must be a sequence with one entry for each branch, got {given!r}")
        if len(given) != branches:
            raise ValueError(f"{name} must have one entry for each of the {branches} weights, got {len(given)}")
    return branches


def _norm_vectors(
    x: Tensor, weights: Sequence[Tensor] | Tensor, norms: Sequence[BatchNorm] | None, training: bool, activation: int
) -> tuple[_Vectors, float]:
    """([gamma, beta, mean, var], eps), each vector (R, C) or None."""
    acc = accumulation_dtype(x.dtype)
    if norms is None:
        if training:
            raise ValueError("training=True needs norms, got None")
        if activation == 0:
            return [None] * 4, 0.0
        # Statistics of mean 0 and variance 1 with eps 0 make the normalisation exactly the identity.
        size = (len(weights), x.shape[1])
        return [None, None, x.new_zeros(size, dtype=acc), x.new_ones(size, dtype=acc)], 0.0
    for r, (norm, weight) in enumerate(zip(norms, weights, strict=True)):
        if not isinstance(norm, BatchNorm):
            raise TypeError(f"norms[{r}] must be an ops.BatchNorm, got {type(norm).__name__}")
        _validation.channel_vector(norm.gamma, f"norms[{r}].gamma", weight)
        _validation.channel_vector(norm.beta, f"norms[{r}].beta", weight)
        _validation.running_statistics(norm.mean, norm.var, weight, training)
        _validation.normalisation_constants(training, norm.momentum, norm.eps)
        if norm.eps != norms[0].eps:
            raise ValueError(f"norms must have one eps, got {norms[0].eps!r} and {norm.eps!r}")
    running = (None, None) if training else ([n.mean for n in norms], [n.var for n in norms])
    columns = [n.gamma for n in norms], [n.beta for n in norms], *running
    vectors = [_stacked(column, fill, weights, acc) for column, fill in zip(columns, (1, 0, 0, 1), strict=True)]
    return vectors, norms[0].eps


def _stacked(
    column: list[Tensor | None] | None, fill: float, weights: Sequence[Tensor] | Tensor, acc: torch.dtype
) -> Tensor | None:
    """The branches' vectors as the rows of one tensor; ``fill`` stands for one that is missing."""
    if column is None or all(v is None for v in column):
        return None
    like = weights[0]
    rows = [like.new_full(like.shape[:1], fill, dtype=acc) if v is None else v.to(acc) for v in column]
    return torch.stack(rows)


# Fake kernels: shapes, dtypes and layouts without data.


def _fake_branches(x: Tensor, weight: Tensor) -> list[Tensor]:
    memory_format = output_memory_format(x)
    return [torch.empty_like(x, memory_format=memory_format) for _ in range(weight.shape[0])]


def _fake_pooled(x: Tensor, pool: bool) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1) if pool else 0)


def _fake_vectors(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(weight.shape[:2], dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("deeplab_kernels::atrous_spatial_pyramid")
def _(x, weight, gamma, beta, mean, var, eps, activation, dilation, pool):  # type: ignore[no-untyped-def]
    return _fake_branches(x, weight), _fake_pooled(x, pool)


@torch.library.register_fake("deeplab_kernels::atrous_spatial_pyramid_training")
def _(x, weight, gamma, beta, eps, activation, dilation, pool, save_conv):  # type: ignore[no-untyped-def]
    conv = _fake_branches(x, weight) if save_conv else []
    return _fake_branches(x, weight), conv, _fake_vectors(x, weight), _fake_vectors(x, weight), _fake_pooled(x, pool)


@torch.library.register_fake("deeplab_kernels::atrous_spatial_pyramid_backward")
def _(grad_out, grad_pooled, x, weight, conv, gamma, beta, mean, *args):  # type: ignore[no-untyped-def]
    need_grad_x, need_grad_weight = args[-2:]
    grad_x = torch.empty_like(x, memory_format=output_memory_format(x)) if need_grad_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else 0)
    if mean is None:
        none = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
        return grad_x, grad_weight, none, none.clone()
    return grad_x, grad_weight, _fake_vectors(x, weight), _fake_vectors(x, weight)


# Autograd.


def _inference_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    *tensors, ctx.eps, ctx.activation, ctx.dilation, ctx.pool = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if not ctx.pool:
        ctx.mark_non_differentiable(output[1])


def _training_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, gamma, beta, ctx.eps, ctx.activation, ctx.dilation, ctx.pool, _ = inputs
    _, conv, mean, var, pooled = output
    ctx.save_for_backward(x, weight, gamma, beta, mean, var, *conv)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*conv, mean, var, *(() if ctx.pool else (pooled,)))


def _backward(
    ctx: Any, tensors: Sequence[Any], conv: Sequence[Tensor], grads: Any, grad_pooled: Any, batch_statistics: bool
) -> list[Tensor | None]:
    """Gradients w.r.t. x, weight, gamma and beta; ``tensors``: these, mean and var."""
    x, weight = tensors[:2]
    needs = ctx.needs_input_grad[:4]
    grad_out = [g if g is not None else torch.zeros_like(x) for g in grads]
    if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, which torch can differentiate again
        return _differentiable_backward(ctx, tensors, grad_out, grad_pooled, batch_statistics)
    result = _below_autograd(
        _ops.atrous_spatial_pyramid_backward.default,
        grad_out, grad_pooled, x, weight, list(conv), *tensors[2:], ctx.eps, ctx.activation, batch_statistics,
        ctx.dilation, needs[0], needs[1],
    )  # fmt: skip
    return [g if need else None for g, need in zip(result, needs, strict=True)]


def _differentiable_backward(
    ctx: Any, tensors: Sequence[Any], grad_out: list[Tensor], grad_pooled: Tensor | None, batch_statistics: bool
) -> list[Tensor | None]:
    settings = ctx.eps, ctx.activation, ctx.dilation, grad_pooled is not None
    definition: Any
    if batch_statistics:
        definition = reference.atrous_spatial_pyramid_training
        out, _, _, _, pooled = definition(*tensors[:4], *settings, False)
    else:
        definition = reference.atrous_spatial_pyramid
        out, pooled = definition(*tensors, *settings)
    outputs, grads = (out, grad_out) if grad_pooled is None else ([*out, pooled], [*grad_out, grad_pooled])
    wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(outputs, [tensors[i] for i in wanted], grads, create_graph=True)
    result: list[Tensor | None] = [None] * 4
    for i, g in zip(wanted, found, strict=True):
        result[i] = g
    return result


def _inference_backward(ctx: Any, grads: list[Tensor | None], grad_pooled: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        raise RuntimeError("running_mean and running_var have no gradient: call .detach() on them")
    tensors = ctx.saved_tensors
    return (*_backward(ctx, tensors, [], grads, grad_pooled, batch_statistics=False), *(None,) * 6)


def _training_backward(
    ctx: Any, grads: list[Tensor | None], _conv: Any, _mean: Any, _var: Any, grad_pooled: Tensor | None
) -> tuple[Any, ...]:
    x, weight, gamma, beta, mean, var, *conv = ctx.saved_tensors
    tensors = x, weight, gamma, beta, mean, var
    return (*_backward(ctx, tensors, conv, grads, grad_pooled, batch_statistics=True), *(None,) * 5)


for _name, _formula, _setup in (
    ("atrous_spatial_pyramid", _inference_backward, _inference_setup),
    ("atrous_spatial_pyramid_training", _training_backward, _training_setup),
):
    torch.library.register_autograd(f"deeplab_kernels::{_name}", _formula, setup_context=_setup)
    _backends.register_autocast(_name, cast_arguments=2)


# FLOP formulas: two per multiply-add, convolutions only, as torch counts its own.


def _pyramid_flops(x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    return w_shape[0] * _conv_flops(x_shape, w_shape[1:], x_shape)


@register_flop_formula(_ops.atrous_spatial_pyramid)
def _(x_shape, w_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _pyramid_flops(x_shape, w_shape)


@register_flop_formula(_ops.atrous_spatial_pyramid_training)
def _(x_shape, w_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _pyramid_flops(x_shape, w_shape)


@register_flop_formula(_ops.atrous_spatial_pyramid_backward)
def _(grad_shapes, pooled_shape, x_shape, w_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return (int(args[-2]) + int(args[-1])) * _pyramid_flops(x_shape, w_shape)
