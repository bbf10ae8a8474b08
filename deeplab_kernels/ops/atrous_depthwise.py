"""Atrous depthwise convolution, alone and fused with batch normalisation and activation.

    y[n, c*m + q, i, j] = sum_{u,v} x[n, c, s*i + r*u - p, s*j + r*v - p] w[c*m + q, 0, u, v]
    out = act(gamma * (y - mean) / sqrt(var + eps) + beta)

The depthwise half of DeepLab v3+'s atrous separable convolution (Chen et al., arXiv:1802.02611, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import output_memory_format
from ..reference.atrous_depthwise import _activate, accumulation_dtype
from . import _backends, _validation
from ._backends import transforms_active as _transforms_active
from ._flops import register_flop_formula

_ops = torch.ops.deeplab_kernels


def _needs_autograd(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _call(name: str, tensors: Sequence[Tensor | None], *args: Any, cast_arguments: int = 2) -> Any:
    operator = getattr(_ops, name).default
    if _transforms_active():  # the operator has no rules for them and would drop tangents silently; its definition has
        return _backends.without_autocast(getattr(reference, name), cast_arguments)(*tensors, *args)
    if torch.compiler.is_compiling():
        return operator(*tensors, *args)
    # The Python autograd key is skipped: it costs more than a small convolution, with gradients or without.
    if _needs_autograd(*tensors):
        device = tensors[0].device.type  # type: ignore[union-attr]
        eager = name in _EAGER and device in ("cpu", "cuda")
        if not eager or torch.is_autocast_enabled(device) or torch.jit.is_tracing():
            return operator(*tensors, *args)
        return _EAGER[name].apply(*tensors, *args)  # type: ignore[no-untyped-call]
    return _below_autograd(operator, *tensors, *args)


def _below_autograd(operator: Callable[..., Any], *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if v is None or (v.dtype == dtype and v.is_contiguous()):
        return v
    return v.to(dtype).contiguous()


def atrous_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Atrous (dilated) depthwise convolution of ``x`` (N, C, H, W) with ``weight`` (C*m, 1, kh, kw).

    Output channel ``c*m + q`` filters input channel ``c``, as ``torch.nn.functional.conv2d(..., groups=C)`` does.

    Args:
        x: float32, float64, bfloat16 or float16 (on the CPU float16 is converted to float32 and back); contiguous or
            channels_last, any other layout is copied.
        weight: dtype of ``x`` (under autocast both take the autocast dtype, as in torch's convolutions).
        stride, dilation: positive int or (vertical, horizontal). The papers call dilation the rate.
        padding: zeros around the image: int, (vertical, horizontal), (top, bottom, left, right), "valid", or "same"
            (keeps the size at stride 1; with a stride (effective kernel - 1) // 2 before and the rest after).

    Returns:
        (N, C*m, H', W') in x's dtype and memory format; sums are formed in float32 (float64 for float64).
        Empty for an empty batch or no channels. Differentiable twice; under ``torch.func``'s transforms and
        forward-mode differentiation the plain torch definition serves.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """
    g = _validation.depthwise(x, weight, stride, padding, dilation)
    _validation.same_dtype(x, weight)
    return _call("atrous_depthwise_conv2d", (x, weight), g.stride, g.padding, g.dilation)


def atrous_depthwise_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    save_conv: bool | None = None,
    pre_activation: str | None = None,
) -> Tensor:
    """``act(batch_norm(atrous_depthwise_conv2d(x, weight)))`` in one operator.

    Args:
        x, weight, stride, padding, dilation: as in :func:`atrous_depthwise_conv2d`.
        gamma, beta: (C*m,) scale and shift of the normalisation, or None for 1 and 0.
        running_mean, running_var: (C*m,). With ``training=False`` they normalise and must be given. With
            ``training=True`` the batch's own mean and biased variance normalise, and those given are updated in place:
            ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance
            (``torch.nn.BatchNorm2d``).
        momentum: in [0, 1]; weight of the batch in that update.
        eps: added to the variance; positive (0 is allowed with ``training=False``).
        activation: "relu", "relu6", or None / "none".
        save_conv: what training keeps for backward: False for x and the per-channel statistics, the convolution being
            computed again; True for x and the convolution's result, a tensor of the output's size. None takes what is
            expected to be faster: on the CPU True for large maps in float32 and channels_last (3x3 kernels, rates up
            to 4, x over 16 MiB and 16384 pixels in the batch, or stride 2 and over 8 MiB), otherwise False; elsewhere
            True. Costs measured: docs/atrous_separable.md.
        pre_activation: of x, as ``activation``; in training, on the CPU, it is neither written nor kept.

    Returns:
        (N, C*m, H', W') in x's dtype and memory format. Differentiable w.r.t. x, weight, gamma and beta in both modes;
        without ``training`` x alone is kept for backward.

    Raises:
        ValueError, TypeError: an argument is not as above, or training on one value per channel.
    """
    g = _validation.depthwise(x, weight, stride, padding, dilation)
    _validation.same_dtype(x, weight)
    code, pre = _validation.activation_code(activation), _validation.activation_code(pre_activation)
    _validation.channel_vector(gamma, "gamma", weight)
    _validation.channel_vector(beta, "beta", weight)
    _validation.running_statistics(running_mean, running_var, weight, training)
    _validation.normalisation_constants(training, momentum, eps)
    _validation.optional_bool(save_conv, "save_conv")
    if not training or x.device.type != "cpu":
        x, pre = _activate(x, pre), 0
    acc = accumulation_dtype(x.dtype)
    gamma_acc, beta_acc = _vector(gamma, acc), _vector(beta, acc)
    if not training:
        return _call(
            "atrous_depthwise_bn_act_inference",
            (x, weight, gamma_acc, beta_acc, _vector(running_mean, acc), _vector(running_var, acc)),
            eps, code, g.stride, g.padding, g.dilation,
        )  # fmt: skip
    height, width = _output_size(x, weight, g.stride, g.padding, g.dilation)
    count = x.shape[0] * height * width
    if count == 1:
        raise ValueError(f"training needs more than 1 value per channel, got x of shape {tuple(x.shape)}")
    out, _, mean, var = _call(
        "atrous_depthwise_bn_act_training",
        (x, weight, gamma_acc, beta_acc),
        eps, code, g.stride, g.padding, g.dilation, _keeps_conv(x, weight, g) if save_conv is None else save_conv,
        pre,
    )  # fmt: skip
    update_running_statistics(running_mean, running_var, mean, var, count, momentum)
    return out


def update_running_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """In place, with a batch of ``count`` values per channel; its biased ``var`` becomes the unbiased one."""
    if count > 0 and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def save_conv_default(x: Tensor) -> bool:
    """Whether training keeps conv(x) for backward, or recomputes it from x, whichever is faster on x's device."""
    return x.device.type != "cpu"


def _keeps_conv(x: Tensor, weight: Tensor, g: _validation.Geometry) -> bool:
    """save_conv_default; on the CPU also where reading the convolution's result back was measured to be faster
    (benchmarks/NOTES.md): in channels_last where the maps exceed the caches."""
    if save_conv_default(x):
        return True
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if weight.shape[0] != x.shape[1] or x.shape[1] < 16 or tuple(weight.shape[2:]) != (3, 3):
        return False
    if max(g.stride) > 2 or max(g.dilation) > 4 or output_memory_format(x) != torch.channels_last:
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if max(g.stride) == 2:
        return pixels * x.shape[1] > 2 << 20
    return pixels > 1 << 14 and pixels * x.shape[1] > 4 << 20


def _output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    top, bottom, left, right = padding
    height = (x.shape[2] + top + bottom - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    width = (x.shape[3] + left + right - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    return height, width


# Fake kernels: shapes, dtypes and layouts without data.


def _fake_output(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    size = (x.shape[0], weight.shape[0], *_output_size(x, weight, stride, padding, dilation))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=output_memory_format(x))


@torch.library.register_fake("deeplab_kernels::atrous_depthwise_conv2d")
def _(x, weight, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return _fake_output(x, weight, stride, padding, dilation)


def _fake_grads(x: Tensor, weight: Tensor, need_grad_x: bool, need_grad_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=output_memory_format(x)) if need_grad_x else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape if need_grad_weight else 0)


@torch.library.register_fake("deeplab_kernels::atrous_depthwise_conv2d_backward")
def _(grad_out, x, weight, stride, padding, dilation, need_grad_x, need_grad_weight):  # type: ignore[no-untyped-def]
    return _fake_grads(x, weight, need_grad_x, need_grad_weight)


@torch.library.register_fake("deeplab_kernels::atrous_depthwise_bn_act_inference")
def _(x, weight, gamma, beta, mean, var, eps, activation, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return _fake_output(x, weight, stride, padding, dilation)


def _fake_vector(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0], dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("deeplab_kernels::atrous_depthwise_bn_act_training")
def _(x, weight, gamma, beta, eps, activation, stride, padding, dilation, save_conv, *_):  # type: ignore[no-untyped-def]
    out = _fake_output(x, weight, stride, padding, dilation)
    y = torch.empty_like(out) if save_conv else x.new_empty(0)
    return out, y, _fake_vector(x, weight), _fake_vector(x, weight)


@torch.library.register_fake("deeplab_kernels::atrous_depthwise_bn_act_backward")
def _(grad_out, x, weight, *args):  # type: ignore[no-untyped-def]
    need_grad_x, need_grad_weight = args[11:13]
    return (*_fake_grads(x, weight, need_grad_x, need_grad_weight), _fake_vector(x, weight), _fake_vector(x, weight))


# Autograd.


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _ops.atrous_depthwise_conv2d_backward(grad, x, weight, *ctx.geometry, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None


def _conv2d_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, weight, *ctx.geometry, ctx.need_x, ctx.need_weight = inputs
    ctx.save_for_backward(grad, x, weight)


def _conv2d_double_backward(ctx: Any, ggx: Tensor, ggw: Tensor) -> tuple[Any, ...]:
    # The gradients are bilinear in (grad, weight) and (grad, x), so their derivatives are the same three products.
    grad, x, weight = ctx.saved_tensors
    needs_grad, needs_x, needs_weight = ctx.needs_input_grad[:3]
    grad_grad = grad_x = grad_weight = None
    if ctx.need_x:
        if needs_grad:
            grad_grad = _ops.atrous_depthwise_conv2d(ggx, weight, *ctx.geometry)
        if needs_weight:
            grad_weight = _ops.atrous_depthwise_conv2d_backward(grad, ggx, weight, *ctx.geometry, False, True)[1]
    if ctx.need_weight:
        if needs_grad:
            term = _ops.atrous_depthwise_conv2d(x, ggw, *ctx.geometry)
            grad_grad = term if grad_grad is None else grad_grad + term
        if needs_x:
            grad_x = _ops.atrous_depthwise_conv2d_backward(grad, x, ggw, *ctx.geometry, True, False)[0]
    return grad_grad, grad_x, grad_weight, *(None,) * 5


# Each backward unpacks ctx.saved_tensors once: non-reentrant checkpointing recomputes then, and refuses a second time.


def _bn_act_backward(
    ctx: Any,
    inputs: Sequence[Tensor],
    grad: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batch_statistics: bool,
) -> tuple[Any, ...]:
    x, weight, gamma, beta = inputs
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph=True: differentiate the definition, which torch can differentiate again
        return _bn_act_differentiable_backward(ctx, inputs, grad, mean, var, batch_statistics)
    pre = ctx.pre_activation if batch_statistics else 0
    grad_x, grad_weight, grad_gamma, grad_beta = _below_autograd(
        _ops.atrous_depthwise_bn_act_backward.default,
        grad, x, weight, x.new_empty(0) if y is None else y, gamma, beta, mean, var, ctx.eps, ctx.activation,
        batch_statistics, *ctx.geometry, needs[0], needs[1], pre,
    )  # fmt: skip
    return (
        grad_x if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_gamma if needs[2] else None,
        grad_beta if needs[3] else None,
    )


def _bn_act_differentiable_backward(
    ctx: Any, inputs: Sequence[Tensor], grad: Tensor, mean: Tensor, var: Tensor, batch_statistics: bool
) -> tuple[Any, ...]:
    definition: Any
    if batch_statistics:
        definition = reference.atrous_depthwise_bn_act_training
        out = definition(*inputs, ctx.eps, ctx.activation, *ctx.geometry, False, ctx.pre_activation)[0]
    else:
        definition = reference.atrous_depthwise_bn_act_inference
        out = definition(*inputs, mean, var, ctx.eps, ctx.activation, *ctx.geometry)
    wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
    grads = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=True)
    result: list[Any] = [None] * 4
    for i, g in zip(wanted, grads, strict=True):
        result[i] = g
    return tuple(result)


def _inference_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, gamma, beta, mean, var, ctx.eps, ctx.activation, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, gamma, beta, mean, var)


def _inference_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *inputs, mean, var = ctx.saved_tensors
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        raise RuntimeError("running_mean and running_var have no gradient: call .detach() on them")
    return (*_bn_act_backward(ctx, inputs, grad, None, mean, var, batch_statistics=False), *(None,) * 7)


def _training_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gamma, beta, ctx.eps, ctx.activation, *ctx.geometry, _, ctx.pre_activation = inputs
    _, y, mean, var = output
    ctx.save_for_backward(x, weight, gamma, beta, y, mean, var)
    ctx.mark_non_differentiable(y, mean, var)
    ctx.set_materialize_grads(False)  # no zeros for these, of which y may be large


def _training_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *inputs, y, mean, var = ctx.saved_tensors
    return (*_bn_act_backward(ctx, inputs, grad, y, mean, var, batch_statistics=True), *(None,) * 7)


_EAGER: dict[str, type[torch.autograd.Function]] = {}


def _register_autograd(name: str, backward: Callable[..., tuple[Any, ...]], setup: Callable[..., None]) -> None:
    """The formula of an operator, for torch.compile and wherever the dispatcher meets it, and as the autograd function
    that eager calls use: it does the same in a third of the time."""
    operator = getattr(_ops, name).default

    def backward_of_some(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):  # where setup asked for no zeros
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    torch.library.register_autograd(f"deeplab_kernels::{name}", backward_of_some, setup_context=setup)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _below_autograd(operator, *inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_some)}
    _EAGER[name] = type(f"Eager_{name}", (torch.autograd.Function,), methods)


_register_autograd("atrous_depthwise_conv2d", _conv2d_backward, _conv2d_setup)
_register_autograd("atrous_depthwise_conv2d_backward", _conv2d_double_backward, _conv2d_backward_setup)
_register_autograd("atrous_depthwise_bn_act_inference", _inference_backward, _inference_setup)
_register_autograd("atrous_depthwise_bn_act_training", _training_backward, _training_setup)

for _operator in ("conv2d", "bn_act_inference", "bn_act_training"):
    _backends.register_autocast(f"atrous_depthwise_{_operator}", cast_arguments=2)


# FLOP formulas: two per multiply-add, convolutions only, as torch counts its own.


def _conv_flops(x_shape: Sequence[int], w_shape: Sequence[int], out_shape: Sequence[int]) -> int:
    batch, channels, height, width = out_shape
    return 2 * batch * channels * height * width * w_shape[2] * w_shape[3]


@register_flop_formula(_ops.atrous_depthwise_conv2d)
def _(x_shape, w_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _conv_flops(x_shape, w_shape, out_shape)


@register_flop_formula(_ops.atrous_depthwise_bn_act_inference)
def _(x_shape, w_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _conv_flops(x_shape, w_shape, out_shape)


@register_flop_formula(_ops.atrous_depthwise_bn_act_training)
def _(x_shape, w_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _conv_flops(x_shape, w_shape, out_shape[0])


@register_flop_formula(_ops.atrous_depthwise_conv2d_backward)
def _(grad_shape, x_shape, w_shape, stride, padding, dilation, need_x, need_weight, **kwargs):  # type: ignore[no-untyped-def]
    return (int(need_x) + int(need_weight)) * _conv_flops(x_shape, w_shape, grad_shape)


@register_flop_formula(_ops.atrous_depthwise_bn_act_backward)
def _(grad_shape, x_shape, w_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return (int(args[11]) + int(args[12])) * _conv_flops(x_shape, w_shape, grad_shape)


_backends.register_kernels()
