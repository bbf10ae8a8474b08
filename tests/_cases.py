"""Geometries of atrous depthwise convolutions, and what the tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_kernels.ops import _validation

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]  # of x: N, C, H, W
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, int] = 1
    multiplier: int = 1

    def __str__(self) -> str:
        def short(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        fields = zip("kspdm", (self.kernel, self.stride, self.padding, self.dilation, self.multiplier), strict=True)
        return "-".join([short(self.size), *(f"{name}{short(value)}" for name, value in fields)])

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    @property
    def out_channels(self) -> int:
        return self.size[1] * self.multiplier

    @property
    def normalised(self) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
        """(stride, (top, bottom, left, right), dilation), as the operators below the Python functions take them."""
        stride, dilation = _validation.pair(self.stride, "stride", 1), _validation.pair(self.dilation, "dilation", 1)
        return stride, _validation.sides(self.padding, self.kernel_size, stride, dilation), dilation

    @property
    def out_size(self) -> tuple[int, int, int, int]:
        stride, (top, bottom, left, right), dilation = self.normalised
        height, width = (
            (n + before + after - r * (k - 1) - 1) // s + 1
            for n, before, after, k, s, r in zip(
                self.size[2:], (top, left), (bottom, right), self.kernel_size, stride, dilation, strict=True
            )
        )
        return (self.size[0], self.out_channels, height, width)

    @property
    def values_per_channel(self) -> int:
        batch, _, height, width = self.out_size
        return batch * height * width


CASES = [
    Case((2, 3, 5, 5), padding=1),
    Case((1, 1, 1, 1), kernel=1),
    Case((2, 1, 5, 1), kernel=(3, 1), padding="same"),
    Case((1, 8, 33, 33), padding="same", dilation=6),
    Case((1, 8, 33, 33), padding="same", dilation=12),
    Case((2, 3, 33, 33), padding="same", dilation=18),
    Case((1, 8, 33, 33), padding="same", dilation=40),  # only the centre tap meets the image
    Case((1, 17, 33, 5), stride=2, padding=1),
    Case((1, 8, 33, 32), stride=2, padding="same", dilation=2),
    Case((1, 3, 127, 5), kernel=5, stride=3, padding=2),
    Case((1, 64, 9, 9), padding="same", dilation=2),
    Case((1, 65, 5, 33), padding="same", dilation=(2, 12)),
    Case((1, 3, 9, 17), kernel=(3, 5), padding=(1, 2)),
    Case((1, 9, 17, 11), kernel=7, padding=3),
    Case((1, 3, 9, 9), kernel=1, stride=2, dilation=3),
    Case((2, 3, 9, 7), padding=1, multiplier=2),
    Case((1, 5, 9, 7), kernel=5, stride=(2, 1), padding="same", multiplier=3),
    Case((1, 1, 9, 33), padding=1, multiplier=17),
    Case((1, 8, 9, 9), padding=(0, 2, 1, 3)),
    Case((1, 8, 13, 9), stride=(3, 1), padding=(2, 0, 0, 5), dilation=(1, 2)),
    Case((1, 3, 9, 9), stride=(1, 2)),
    Case((1, 8, 5, 5), dilation=2),  # one output pixel
    Case((1, 3, 5, 5), kernel=(2, 4), padding="same"),
    Case((2, 3, 5, 5), padding=7),  # outputs that see nothing but padding
    Case((1, 3, 3, 127), stride=5, padding="same", dilation=(1, 3)),
    Case((0, 3, 5, 5), padding=1),
    Case((2, 0, 5, 5), padding=1),
]

# One of each kind, for the checks that repeat the work several times.
FEW = [CASES[i] for i in (0, 3, 7, 10, 16, 19)]


def by_case(cases: Sequence[Case] = CASES) -> dict[str, Any]:
    return {"argvalues": cases, "ids": str}


def _inside(out: int, size: int, tap: int, stride: int, rate: int, pad: int) -> tuple[slice, slice]:
    """The outputs that read the image, not the padding, through one tap, and the inputs that they read."""
    outputs = [i for i in range(out) if 0 <= i * stride + tap * rate - pad < size]
    if not outputs:
        return slice(0, 0), slice(0, 0)
    first = outputs[0] * stride + tap * rate - pad
    return slice(outputs[0], outputs[-1] + 1), slice(first, first + (len(outputs) - 1) * stride + 1, stride)


def conv_by_definition(x: Tensor, weight: Tensor, case: Case) -> Tensor:
    """The sum of the definition, one shifted slice per tap; shares nothing with torch's convolution."""
    (s_h, s_w), (top, _, left, _), (r_h, r_w) = case.normalised
    _, _, height, width = case.out_size
    repeated = x.repeat_interleave(case.multiplier, 1)
    y = x.new_zeros(case.out_size)
    for u in range(weight.shape[2]):
        out_rows, in_rows = _inside(height, x.shape[2], u, s_h, r_h, top)
        for v in range(weight.shape[3]):
            out_columns, in_columns = _inside(width, x.shape[3], v, s_w, r_w, left)
            y[:, :, out_rows, out_columns] += repeated[:, :, in_rows, in_columns] * weight[:, 0, u, v].view(1, -1, 1, 1)
    return y


def conv_of_torch(x: Tensor, weight: Tensor, case: Case) -> Tensor:
    """What a user would write in plain torch, in x's dtype and layout."""
    stride, (top, bottom, left, right), dilation = case.normalised
    if x.shape[1] == 0:  # torch has no convolution of zero channels
        return conv_by_definition(x, weight, case)
    if top == bottom and left == right:
        return F.conv2d(x, weight, None, stride, (top, left), dilation, x.shape[1])
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, dilation, x.shape[1])


def activate(z: Tensor, activation: str | None) -> Tensor:
    return {"relu": F.relu, "relu6": F.relu6}.get(activation or "none", lambda t: t)(z)


def random_conv(
    case: Case, dtype: torch.dtype, layout: str = "nchw", device: str = "cpu", requires_grad: bool = True
) -> tuple[Tensor, Tensor]:
    x = torch.randn(case.size, dtype=torch.float64).to(device, dtype, memory_format=LAYOUTS[layout])
    weight = torch.randn(case.out_channels, 1, *case.kernel_size, dtype=torch.float64).to(device, dtype)
    return x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Independent copies with the same layout that collect their own gradients."""
    return [None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def weight_gradient_magnitude(x: Tensor, grad: Tensor, case: Case) -> float:
    """The largest sum of |gradient * input| over the outputs: what rounding errors of a weight gradient scale with."""
    weight = torch.zeros(
        case.out_channels, 1, *case.kernel_size, dtype=torch.float64, device=x.device, requires_grad=True
    )
    conv_by_definition(x.detach().double().abs(), weight, case).backward(grad.double().abs())
    return weight.grad.max().item() if weight.numel() else 0.0


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, what: str, magnitude: float = 0) -> None:
    """Our largest error is at most twice that of plain torch in the same dtype, plus rounding: 4 units in the last
    place of the largest result, or half a unit of ``magnitude``, the size of the terms where a long sum cancels."""
    assert ours.dtype == torchs.dtype, what
    assert ours.shape == exact.shape, what
    if exact.numel() == 0:
        return
    exact_units = 32 if ours.dtype == torch.float64 else 1  # "exact" is float64 too
    largest = max(exact.abs().max().item(), 1e-3)
    floor = exact_units * torch.finfo(ours.dtype).eps * max(4 * largest, 0.5 * magnitude)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, torchs))
    assert error <= 2 * allowed + floor, f"{what}: error {error:.3e}, plain torch {allowed:.3e}, floor {floor:.3e}"


def smaller(case: Case) -> Case:
    """For gradcheck, whose cost grows with the square of the number of elements."""
    batch, channels, height, width = case.size
    return replace(case, size=(batch, min(channels, 2), min(height, 9), min(width, 5)))
