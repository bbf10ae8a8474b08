"""Checks of user input. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

ACTIVATIONS = {None: 0, "none": 0, "relu": 1, "relu6": 2}


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """``value`` as (vertical, horizontal), each at least ``minimum``."""
    if isinstance(value, int) and not isinstance(value, bool):
        result: Pair = (value, value)
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        result = (value[0], value[1])
    else:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if any(not isinstance(v, int) or isinstance(v, bool) for v in result):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(result) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return result


def sides(padding: int | str | Sequence[int], kernel: Pair, stride: Pair, dilation: Pair) -> Sides:
    """Padding as (top, bottom, left, right).

    "same" keeps the size at stride 1. With a stride it is the papers' 'fixed' padding, (effective kernel - 1) // 2 before
    and the rest after, which does not depend on the input size (unlike TensorFlow's SAME).
    """
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f'padding must be ints, "same" or "valid", got {padding!r}')
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    if isinstance(padding, Sequence) and len(padding) == 4:
        top_bottom, left_right = pair(padding[:2], "padding", 0), pair(padding[2:], "padding", 0)
        return (*top_bottom, *left_right)
    if isinstance(padding, Sequence) and len(padding) != 2:
        raise ValueError(
            f'padding must be an int, (vertical, horizontal), (top, bottom, left, right), "same" or "valid", got {padding!r}'
        )
    vertical, horizontal = pair(padding, "padding", 0)
    return (vertical, vertical, horizontal, horizontal)


def activation_code(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "relu", "relu6", "none" or None, got {activation!r}')
    return ACTIVATIONS[activation]


@dataclass(frozen=True)
class Geometry:
    """Normalised arguments of an atrous depthwise convolution."""

    stride: Pair
    padding: Sides
    dilation: Pair


def depthwise(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Geometry:
    """Checks the arguments of an atrous depthwise convolution and normalises its geometry."""
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"weight must have shape (C * multiplier, 1, kh, kw), got {tuple(weight.shape)}")
    channels, out_channels = x.shape[1], weight.shape[0]
    if (out_channels % channels != 0 or out_channels == 0) if channels else out_channels != 0:
        raise ValueError(
            f"weight must have a multiple of x's {channels} channels as its first size, "
            f"got {out_channels} (weight {tuple(weight.shape)}, x {tuple(x.shape)})"
        )
    if x.device != weight.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    kernel = (weight.shape[2], weight.shape[3])
    if min(kernel) < 1:
        raise ValueError(f"weight must have a kernel of at least 1 x 1, got {kernel[0]} x {kernel[1]}")
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


def same_dtype(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")


def channel_vector(v: Tensor | None, name: str, weight: Tensor, required: bool = False) -> None:
    """Checks a per-output-channel vector such as gamma or running_mean."""
    if v is None:
        if required:
            raise ValueError(f"{name} must be given when training=False, got None")
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(v).__name__}")
    if v.shape != weight.shape[:1]:
        raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(v.shape)}")
    if not v.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {v.dtype}")
    if v.device != weight.device:
        raise ValueError(f"{name} must be on x's device {weight.device}, got {v.device}")
