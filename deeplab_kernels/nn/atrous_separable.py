"""Atrous separable convolution: a depthwise convolution at some rate, then a 1x1 convolution, each with an optional
normalisation and activation (Chen et al., arXiv:1802.02611, section 3.1 and figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import _validation, atrous_separable_conv2d
from ..ops.atrous_separable import EXECUTIONS, picks_whole
from ._halves import activate, conv_act, conv_norm_act, convolve, fusable, norm_parameters
from ._separable_blocks import check_convolutions, check_norm, only_zeros, renamed, sort_modules, untouched
from .functional import pointwise_norm_act
from .init import truncated_normal_

Norm = bool | Callable[[int], nn.Module] | None
_Padding = _validation.Pair | _validation.Sides | str

# Standard deviations of the official DeepLab code's separable convolutions in ASPP and decoder (core/utils.py,
# split_separable_conv2d); its Xception backbone (core/xception.py) draws both from 0.09.
WEIGHT_STD = (0.33, 0.06)


def _normalise_padding(
    padding: int | str | Sequence[int],
    kernel: _validation.Pair,
    stride: _validation.Pair,
    dilation: _validation.Pair,
) -> _Padding:
    # "same" stays a word, so that it follows when the dilation of a built module is changed.
    top, bottom, left, right = _validation.sides(padding, kernel, stride, dilation)
    if padding == "same":
        return "same"
    return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)


def _positive(value: int, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


class AtrousDepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, ..., groups=in_channels)`` on :func:`ops.atrous_depthwise_conv2d`.

    Same parameters, state_dict and initialisation as ``nn.Conv2d``; ``padding`` may also be (top, bottom, left, right),
    and "same" is allowed with a stride (the papers' fixed padding).

    Args:
        in_channels: channels of the input.
        out_channels: a multiple of ``in_channels``; None for ``in_channels``.
        kernel_size, stride, padding, dilation, bias, device, dtype: as ``nn.Conv2d``; bias defaults to False.
    """

    # nn.Conv2d's own annotation has no room for four sides.
    padding: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _positive(in_channels, "in_channels")
        out_channels = in_channels if out_channels is None else _positive(out_channels, "out_channels")
        if out_channels % in_channels:
            raise ValueError(f"out_channels must be a multiple of in_channels={in_channels}, got {out_channels}")
        kernel = _validation.pair(kernel_size, "kernel_size", 1)
        stride_pair, dilation_pair = _validation.pair(stride, "stride", 1), _validation.pair(dilation, "dilation", 1)
        normalised = _normalise_padding(padding, kernel, stride_pair, dilation_pair)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride_pair,
            0,
            dilation_pair,
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.padding = normalised

    def check_input(self, x: Tensor) -> None:
        """Raises unless ``x`` is (N, in_channels, H, W); the operator would read another C as another multiplier."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        self.check_input(x)
        return convolve(self, x, self.padding)


def _activation(value: str | None, name: str) -> str | None:
    try:
        code = _validation.activation_code(value)
    except (ValueError, TypeError):
        raise ValueError(f'{name} must be "relu", "relu6", "none" or None, got {value!r}') from None
    return value if code else None


def _make_norm(
    norm: Norm, name: str, channels: int, eps: float, momentum: float | None, device: Any, dtype: torch.dtype | None
) -> nn.Module:
    if norm is None or norm is False:
        return nn.Identity()
    if norm is True:
        return nn.BatchNorm2d(channels, eps, momentum, device=device, dtype=dtype)
    if isinstance(norm, nn.Module) or not callable(norm):
        raise TypeError(f"{name} must be True, False, None or a function channels -> nn.Module, got {norm!r}")
    module = norm(channels)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must return an nn.Module, got {type(module).__name__}")
    return module.to(device=device, dtype=dtype)


class AtrousSeparableConv2d(nn.Module):
    """Atrous separable convolution, ``nn.Conv2d``'s place-holder in DeepLab v3+.

        y   = depthwise_activation(depthwise_norm(depthwise(pre_activation(x))))
        out = pointwise_activation(pointwise_norm(pointwise(y)))

    With the defaults every bracket is empty: the block is then linear, like the ``nn.Conv2d`` of the same arguments
    whose place it takes, with kernel_size^2 * in + in * out weights instead of kernel_size^2 * in * out. The papers'
    variants:

    - ASPP, decoder, Xception's exit flow: ``depthwise_norm=True, depthwise_activation="relu", pointwise_norm=True,
      pointwise_activation="relu"``;
    - Xception's entry and middle flow: ``pre_activation="relu", depthwise_norm=True, pointwise_norm=True``.

    In inference the block is one operator (:func:`ops.atrous_separable_conv2d`) where that is faster; otherwise its
    depthwise half is, wherever that is the same as calling its submodules: batch normalisation
    (``nn.BatchNorm2d`` in training and inference, ``nn.SyncBatchNorm`` in inference) or none. Hooks on a submodule or
    on all modules, parametrisations, another norm or a replaced submodule make the block call its submodules instead.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, dilation: int or (vertical, horizontal), of the depthwise convolution.
        padding: zeros around the image: int, (vertical, horizontal), (top, bottom, left, right), "valid", or "same"
            (keeps the size at stride 1; with a stride (effective kernel - 1) // 2 before and the rest after).
        bias: one bias, on the pointwise convolution (as in Keras' SeparableConv2D).
        padding_mode: "zeros" only.
        device, dtype: of parameters and buffers.
        channel_multiplier: depthwise filters per input channel.
        depthwise_norm, pointwise_norm: True for ``nn.BatchNorm2d(channels, eps, momentum)``, False or None for nothing,
            or a function from channels to a module, such as ``nn.InstanceNorm2d``.
        pre_activation, depthwise_activation, pointwise_activation: "relu", "relu6" or None.
        eps: of the batch normalisation; 1e-3 as the papers.
        momentum: of the batch normalisation, in torch's sense (weight of the new batch; None for the cumulative mean).
            The papers' decay of 0.9997 is ``momentum=3e-4``.
        depthwise_bias: a bias on the depthwise convolution too; no paper has one, some checkpoints do.
        weight_std: standard deviations of the truncated normal distributions (cut at two deviations) that depthwise and
            pointwise weights are drawn from. The default is that of the official ASPP and decoder; the official
            Xception uses (0.09, 0.09). Biases start at zero.
        execution: how inference runs, as in :func:`ops.atrous_separable_conv2d`: "auto" by cost, "whole" as one kernel
            wherever it serves, "two_kernels" never so. Gradients and training always take two.
        save_conv: what training keeps of the depthwise half for backward, as in :func:`ops.atrous_depthwise_bn_act`:
            False for less memory, True to compute the convolution only once, None by device.

    Attributes:
        depthwise: :class:`AtrousDepthwiseConv2d`; depthwise_norm: the norm or ``nn.Identity``;
        pointwise: ``nn.Conv2d`` of kernel size 1; pointwise_norm: the norm or ``nn.Identity``.
        kernel_size, stride, padding, dilation: of the depthwise convolution; the last three may be set.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W') with
    H' = (H + top + bottom - dilation * (k - 1) - 1) // stride + 1. Contiguous and channels_last inputs are computed as
    they are; the output has the input's format.

    state_dict: loads its own names, and those of ``nn.Sequential(depthwise, norm, activation, pointwise, norm)`` (also
    nested, as segmentation_models_pytorch has it), timm's (conv_dw, bn_dw, conv_pw, bn_pw, bn) and the first Xception
    ports' (conv1, bn, pointwise).

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        channel_multiplier: int = 1,
        depthwise_norm: Norm = False,
        depthwise_activation: str | None = None,
        pointwise_norm: Norm = False,
        pointwise_activation: str | None = None,
        pre_activation: str | None = None,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        depthwise_bias: bool = False,
        weight_std: tuple[float, float] = WEIGHT_STD,
        execution: str = "auto",
        save_conv: bool | None = None,
    ) -> None:
        super().__init__()
        only_zeros(padding_mode)
        self.execution = execution
        _validation.optional_bool(save_conv, "save_conv")
        self.save_conv = save_conv
        self.in_channels = _positive(in_channels, "in_channels")
        self.out_channels = _positive(out_channels, "out_channels")
        self.channel_multiplier = _positive(channel_multiplier, "channel_multiplier")
        self.pre_activation = _activation(pre_activation, "pre_activation")
        self.depthwise_activation = _activation(depthwise_activation, "depthwise_activation")
        self.pointwise_activation = _activation(pointwise_activation, "pointwise_activation")
        self.weight_std = (float(weight_std[0]), float(weight_std[1]))
        hidden = in_channels * channel_multiplier
        self.depthwise = AtrousDepthwiseConv2d(
            in_channels, hidden, kernel_size, stride, padding, dilation, depthwise_bias, device, dtype
        )
        self.depthwise_norm = _make_norm(depthwise_norm, "depthwise_norm", hidden, eps, momentum, device, dtype)
        self.pointwise = nn.Conv2d(hidden, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.pointwise_norm = _make_norm(pointwise_norm, "pointwise_norm", out_channels, eps, momentum, device, dtype)
        self._reset_convolutions()

    def reset_parameters(self) -> None:
        """Draws the weights anew and resets biases and norms."""
        self._reset_convolutions()
        for norm in (self.depthwise_norm, self.pointwise_norm):
            reset = getattr(norm, "reset_parameters", None)
            if reset is not None:
                reset()

    def _reset_convolutions(self) -> None:
        for conv, std in zip((self.depthwise, self.pointwise), self.weight_std, strict=True):
            truncated_normal_(conv.weight, std)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.depthwise.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        return self.depthwise.stride

    @stride.setter
    def stride(self, value: int | Sequence[int]) -> None:
        self.depthwise.stride = _validation.pair(value, "stride", 1)

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.depthwise.dilation

    @dilation.setter
    def dilation(self, value: int | Sequence[int]) -> None:
        self.depthwise.dilation = _validation.pair(value, "dilation", 1)

    @property
    def padding(self) -> _Padding:
        return self.depthwise.padding

    @padding.setter
    def padding(self, value: int | str | Sequence[int]) -> None:
        conv = self.depthwise
        conv.padding = _normalise_padding(value, conv.kernel_size, conv.stride, conv.dilation)  # type: ignore[arg-type]

    @property
    def execution(self) -> str:
        """Of inference: "auto", "whole" (one kernel) or "two_kernels"."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {value!r}")
        self._execution = value

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W'); ``residual``, of the output's shape, is added before the
        pointwise activation."""
        observed = _has_any_global_hook()
        if not observed and self.is_one_operator(x, residual):
            return self._whole(x, residual)
        return self._pointwise_half(self._depthwise_half(x, observed), observed, residual)

    def is_one_operator(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Whether one kernel computes the same as the submodules, and is the choice."""
        if torch.jit.is_tracing():  # the trace would be another with gradients than without
            return False
        tensors: list[Any] = [x, residual]
        halves: tuple[tuple[nn.Conv2d, nn.Module, type[nn.Conv2d]], ...] = (
            (self.depthwise, self.depthwise_norm, AtrousDepthwiseConv2d),
            (self.pointwise, self.pointwise_norm, nn.Conv2d),
        )
        for conv, norm, own_type in halves:
            if not untouched(conv, own_type):
                return False
            tensors += [conv.weight, conv.bias]
            if not untouched(norm, nn.Identity):
                if not untouched(norm, nn.BatchNorm2d, nn.SyncBatchNorm) or norm.training or norm.running_mean is None:
                    return False
                tensors += [norm.weight, norm.bias]
        return picks_whole(self.execution, x, self.depthwise.weight, self.out_channels, tensors)

    def _whole(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv = self.depthwise
        conv.check_input(x)
        return atrous_separable_conv2d(
            x,
            conv.weight,
            self.pointwise.weight,
            depthwise_norm=norm_parameters(self.depthwise_norm),
            pointwise_norm=norm_parameters(self.pointwise_norm),
            depthwise_bias=conv.bias,
            pointwise_bias=self.pointwise.bias,
            pre_activation=self.pre_activation,
            depthwise_activation=self.depthwise_activation,
            pointwise_activation=self.pointwise_activation,
            residual=residual,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            execution="whole",
        )

    def _depthwise_half(self, x: Tensor, observed: bool) -> Tensor:
        conv, norm, activation = self.depthwise, self.depthwise_norm, self.depthwise_activation
        if not observed and untouched(conv, AtrousDepthwiseConv2d):
            if untouched(norm, nn.Identity) and (activation is not None or conv.bias is not None):
                conv.check_input(x)
                return conv_act(conv, activation, activate(x, self.pre_activation), conv.padding)
            if untouched(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and fusable(norm, conv, x):
                conv.check_input(x)
                return conv_norm_act(conv, norm, activation, x, conv.padding, self.save_conv, self.pre_activation)
        x = activate(x, self.pre_activation)
        return activate(norm(conv(x)), activation)

    def after_depthwise(self, y: Tensor) -> Tensor:
        """The block's result from that of its depthwise half (convolution, norm and activation)."""
        return self._pointwise_half(y, _has_any_global_hook(), None)

    def _pointwise_half(self, y: Tensor, observed: bool, residual: Tensor | None) -> Tensor:
        conv, norm = self.pointwise, self.pointwise_norm
        # Where nobody else may hold the result, the activation overwrites it.
        plain = (
            not observed
            and untouched(conv, nn.Conv2d)
            and untouched(norm, nn.Identity, nn.BatchNorm2d, nn.SyncBatchNorm)
        )
        if plain:
            return pointwise_norm_act(conv, norm, self.pointwise_activation, y, residual, owned=True)
        out = norm(conv(y))
        return activate(out if residual is None else out + residual, self.pointwise_activation)

    @classmethod
    def from_modules(
        cls,
        *modules: nn.Module | None,
        pre_activation: str | None = None,
        depthwise_activation: str | None = None,
        pointwise_activation: str | None = None,
    ) -> AtrousSeparableConv2d:
        """Takes over an existing block: ``from_modules(depthwise, bn, pointwise, bn)``.

        Args:
            modules: in the order in which they run: [activation] depthwise [norm] [activation] pointwise [norm]
                [activation]. The convolutions are ``nn.Conv2d``; activations ``nn.ReLU`` or ``nn.ReLU6``; norms batch,
                group or instance norms. ``nn.Sequential`` is opened; None and ``nn.Identity`` are skipped.
            pre_activation, depthwise_activation, pointwise_activation: instead of activation modules.

        Returns:
            A block that shares the Parameters of the convolutions and holds the very norm modules.

        Raises:
            ValueError, TypeError: the modules are no such block; the message says which and why.
        """
        activations = {"pre": pre_activation, "depthwise": depthwise_activation, "pointwise": pointwise_activation}
        parts = sort_modules(modules, activations)
        depthwise, pointwise = parts["depthwise"], parts["pointwise"]
        check_convolutions(depthwise, pointwise, AtrousDepthwiseConv2d)
        for conv, name in ((depthwise, "depthwise"), (pointwise, "pointwise")):
            check_norm(parts.get(f"{name}_norm"), conv, name)
        block = cls(
            depthwise.in_channels,
            pointwise.out_channels,
            depthwise.kernel_size,
            depthwise.stride,
            depthwise.padding,
            depthwise.dilation,
            bias=False,
            device="meta",
            channel_multiplier=depthwise.out_channels // depthwise.in_channels,
            pre_activation=activations["pre"],
            depthwise_activation=activations["depthwise"],
            pointwise_activation=activations["pointwise"],
        )
        if type(depthwise) is AtrousDepthwiseConv2d:
            block.depthwise = depthwise
        else:
            block.depthwise.weight, block.depthwise.bias = depthwise.weight, depthwise.bias
            block.depthwise.training = depthwise.training
        block.pointwise = pointwise
        block.depthwise_norm = parts.get("depthwise_norm", block.depthwise_norm)
        block.pointwise_norm = parts.get("pointwise_norm", block.pointwise_norm)
        block.training = depthwise.training
        return block

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        own = {name for name, _ in (*self.named_parameters(), *self.named_buffers())}
        for old, new in renamed(given):
            # A name without a place here keeps its spelling, so that strict loading reports what the file has.
            if new in own and new not in given:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.channel_multiplier != 1:
            text += f", channel_multiplier={self.channel_multiplier}"
        for name in ("pre_activation", "depthwise_activation", "pointwise_activation"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text
