"""Checks of user input. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

ACTIVATIONS = {None: 0, "none": 0, "relu": 1, "relu6": 2}
ACTIVATION_NAMES = (None, "relu", "relu6")  # by code
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMALIZATIONS = {"none": 0, "before": 1, "after": 2, "symmetric": 3}  # of the Gaussian filters

# Bound of stride, padding and dilation: index arithmetic in 64 bits then cannot overflow (csrc/torch/tensors.h).
LARGEST = 2**31 - 1


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _in_range(values: Sequence[int], name: str, minimum: int, given: object) -> None:
    if min(values) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {given!r}")
    if max(values) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {given!r}")


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """``value`` as (vertical, horizontal), each at least ``minimum``."""
    if _is_int(value):
        result: Pair = (value, value)  # type: ignore[assignment]
    elif isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_int, value)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an int or (vertical, horizontal), got {value!r}")
        result = (value[0], value[1])
    else:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    _in_range(result, name, minimum, value)
    return result


def sides(padding: int | str | Sequence[int], kernel: Pair, stride: Pair, dilation: Pair) -> Sides:
    """Padding as (top, bottom, left, right).

    "same" keeps the size at stride 1. With a stride it is the papers' 'fixed' padding, (effective kernel - 1) // 2
    before and the rest after, which does not depend on the input size (unlike TensorFlow's SAME).
    """
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f'padding must be ints, "same" or "valid", got {padding!r}')
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    allowed = 'an int, (vertical, horizontal), (top, bottom, left, right), "same" or "valid"'
    if _is_int(padding):
        values: list[int] = [padding, padding]  # type: ignore[list-item]
    elif isinstance(padding, Sequence) and all(map(_is_int, padding)):
        values = [*padding]  # type: ignore[list-item]
    else:
        raise TypeError(f"padding must be {allowed}, got {padding!r}")
    if len(values) not in (2, 4):
        raise ValueError(f"padding must be {allowed}, got {padding!r}")
    _in_range(values, "padding", 0, padding)
    top, bottom, left, right = (values[0], values[0], values[1], values[1]) if len(values) == 2 else values
    return (top, bottom, left, right)


def optional_bool(value: bool | None, name: str) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")


def activation_code(activation: str | None) -> int:
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f'activation must be "relu", "relu6", "none" or None, got {activation!r}')
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "relu", "relu6", "none" or None, got {activation!r}')
    return ACTIVATIONS[activation]


@dataclass(frozen=True)
class Geometry:
    """Normalised arguments of an atrous depthwise convolution."""

    stride: Pair
    padding: Sides
    dilation: Pair


def normalization_code(normalization: str) -> int:
    allowed = ", ".join(f'"{name}"' for name in NORMALIZATIONS)
    if not isinstance(normalization, str):
        raise TypeError(f"normalization must be one of {allowed}, got {normalization!r}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {allowed}, got {normalization!r}")
    return NORMALIZATIONS[normalization]


def floating(tensor: Tensor, name: str, shape: str = "") -> None:
    """``tensor`` is a dense floating-point tensor, with as many dimensions as ``shape``, such as "(B, C, N)", names."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        given = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {given}")
    if shape and tensor.dim() != len(shape.split(",")):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def image(x: Tensor, name: str = "x") -> None:
    """Checks a tensor of shape (N, C, H, W)."""
    floating(x, name, "(N, C, H, W)")


def residual(residual: Tensor, x: Tensor, out_size: tuple[int, ...], name: str = "x") -> None:
    """Checks what is added to an output of size ``out_size``; ``name`` is that of x."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor or None, got {type(residual).__name__}")
    if residual.shape != out_size:
        raise ValueError(f"residual must have the output's shape {out_size}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual must be on {name}'s device {x.device}, got {residual.device}")


def depthwise(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    name: str = "weight",
) -> Geometry:
    """Checks the arguments of an atrous depthwise convolution and normalises its geometry; ``name`` is the weight's."""
    floating(x, "x")
    floating(weight, name)
    image(x)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"{name} must have shape (C * multiplier, 1, kh, kw), got {tuple(weight.shape)}")
    channels, out_channels = x.shape[1], weight.shape[0]
    if (out_channels % channels != 0 or out_channels == 0) if channels else out_channels != 0:
        raise ValueError(
            f"{name} must have a multiple of x's {channels} channels as its first size, "
            f"got {out_channels} ({name} {tuple(weight.shape)}, x {tuple(x.shape)})"
        )
    if x.device != weight.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {weight.device}")
    kernel = (weight.shape[2], weight.shape[3])
    if min(kernel) < 1:
        raise ValueError(f"{name} must have a kernel of at least 1 x 1, got {kernel[0]} x {kernel[1]}")
    geometry_stride, geometry_dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    geometry = Geometry(geometry_stride, sides(padding, kernel, geometry_stride, geometry_dilation), geometry_dilation)
    top, bottom, left, right = geometry.padding
    for axis, size, before, after, k, rate in (
        ("height", x.shape[2], top, bottom, kernel[0], geometry.dilation[0]),
        ("width", x.shape[3], left, right, kernel[1], geometry.dilation[1]),
    ):
        if size < 1:
            raise ValueError(f"x must have a {axis} of at least 1, got shape {tuple(x.shape)}")
        if size + before + after < rate * (k - 1) + 1:
            raise ValueError(
                f"the kernel is larger than the padded input: {axis} {size} + padding {before} + {after} "
                f"< {rate * (k - 1) + 1} (kernel {k}, dilation {rate})"
            )
    return geometry


def pointwise(weight: Tensor, depthwise_weight: Tensor) -> None:
    """Checks the weight of a 1x1 convolution that follows the depthwise one."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"pointwise_weight must be a torch.Tensor, got {type(weight).__name__}")
    channels = depthwise_weight.shape[0]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 1, 1):
        raise ValueError(
            f"pointwise_weight must have shape (out_channels, {channels}, 1, 1), got {tuple(weight.shape)}"
        )
    if weight.device != depthwise_weight.device:
        raise ValueError(f"pointwise_weight must be on x's device {depthwise_weight.device}, got {weight.device}")


def same_dtype(x: Tensor, weight: Tensor, name: str = "weight") -> None:
    if x.dtype == weight.dtype:
        return
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Autocast casts every dtype but float64.
        if torch.float64 not in (x.dtype, weight.dtype):
            return
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {weight.dtype} (autocast leaves float64 as it is)")
    raise TypeError(f"{name} must have x's dtype {x.dtype}, got {weight.dtype}")


def channel_vector(v: Tensor | None, name: str, weight: Tensor) -> None:
    """Checks a per-output-channel vector such as gamma or running_mean."""
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(v).__name__}")
    if v.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {v.dtype}")
    if v.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {v.layout}")
    if v.shape != weight.shape[:1]:
        raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(v.shape)}")
    if v.device != weight.device:
        raise ValueError(f"{name} must be on x's device {weight.device}, got {v.device}")


def running_statistics(mean: Tensor | None, var: Tensor | None, weight: Tensor, training: bool) -> None:
    for name, v in (("running_mean", mean), ("running_var", var)):
        channel_vector(v, name, weight)
        if v is None and not training:
            raise ValueError(f"{name} must be given when training=False, got None")
        if v is not None and v.requires_grad:
            raise ValueError(f"{name} must not require a gradient (there is none): pass {name}.detach()")
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"running_mean and running_var must both be given or both be None, got {missing}=None")


def normalisation_constants(training: bool, momentum: float, eps: float) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {training!r}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float, torch.SymFloat)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a float, got {value!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")
    if not (eps > 0 or (eps == 0 and not training)):
        raise ValueError(f"eps must be positive{'' if training else ' or 0'} when training={training}, got {eps!r}")
