"""A few depthwise layers of DeepLab v3+ against PyTorch on this machine; benchmarks/ measures all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..timing import interleaved

_EPS = 1e-3


@dataclass(frozen=True)
class Layer:
    """3 x 3 depthwise convolution + batch normalisation + ReLU on (1, channels, size, size), padding = rate."""

    name: str
    channels: int
    size: int
    rate: int


LAYERS = (
    Layer("ASPP, rate 6", 2048, 33, 6),
    Layer("ASPP, rate 12", 2048, 33, 12),
    Layer("ASPP, rate 18", 2048, 33, 18),
    Layer("middle flow, output stride 8", 728, 65, 2),
    Layer("decoder", 304, 129, 1),
)
QUICK_LAYERS = (Layer("ASPP, rate 12, an eighth of the channels", 256, 33, 12),)


@dataclass(frozen=True)
class SpeedRow:
    """Medians in milliseconds. layout: NCHW or NHWC (channels_last). task: inference or training."""

    layer: Layer
    layout: str
    task: str
    ours_ms: float
    torch_ms: float
    error: float  # difference from PyTorch's results, relative, in the Euclidean norm

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.ours_ms


def measure(
    layers: tuple[Layer, ...] = LAYERS, *, rounds: int = 9, on_row: Callable[[], object] = lambda: None
) -> list[SpeedRow]:
    """Times ours and PyTorch's in turn, for each layer in both layouts.

    inference: PyTorch gets the normalisation folded into the convolution. training: forward with batch statistics, and
    backward.
    """
    keep_freed_memory()
    rows = []
    for layer in layers:
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for task, prepare in (("inference", _inference), ("training", _training)):
                ours, theirs, error = prepare(layer, memory_format)
                times = interleaved({"ours": ours, "torch": theirs}, rounds=rounds, candidate_seconds=0.7)
                rows.append(SpeedRow(layer, layout, task, times["ours"].median, times["torch"].median, error))
                on_row()
    return rows


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks for the next allocation. By default it gives them back to the system, and
    the page faults of getting them anew cost more than the arithmetic, in PyTorch's operators and in ours alike."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


_Case = tuple[Callable[[], object], Callable[[], object], float]


def _tensors(layer: Layer, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    c = layer.channels
    x = torch.randn(1, c, layer.size, layer.size, generator=generator).contiguous(memory_format=memory_format)
    weight = torch.randn(c, 1, 3, 3, generator=generator) / 3
    gamma, beta, mean = (torch.randn(c, generator=generator) for _ in range(3))
    return x, weight, gamma, beta, mean, torch.rand(c, generator=generator) + 0.5


def _inference(layer: Layer, memory_format: torch.memory_format) -> _Case:
    x, weight, gamma, beta, mean, var = _tensors(layer, memory_format)
    geometry: dict[str, Any] = {"padding": layer.rate, "dilation": layer.rate}
    scale = gamma / (var + _EPS).sqrt()
    folded, bias = weight * scale[:, None, None, None], beta - mean * scale

    @torch.inference_mode()
    def ours() -> Tensor:
        return ops.atrous_depthwise_bn_act(x, weight, gamma, beta, mean, var, training=False, eps=_EPS, **geometry)

    @torch.inference_mode()
    def theirs() -> Tensor:
        return F.relu_(F.conv2d(x, folded, bias, groups=layer.channels, **geometry))

    return ours, theirs, _difference([ours()], [theirs()])


def _training(layer: Layer, memory_format: torch.memory_format) -> _Case:
    x, weight, gamma, beta, *_ = (t.requires_grad_() for t in _tensors(layer, memory_format))
    inputs = (x, weight, gamma, beta)
    geometry: dict[str, Any] = {"padding": layer.rate, "dilation": layer.rate}
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)

    def ours() -> tuple[Tensor, ...]:
        y = ops.atrous_depthwise_bn_act(x, weight, gamma, beta, None, None, training=True, eps=_EPS, **geometry)
        return torch.autograd.grad(y, inputs, grad)

    def theirs() -> tuple[Tensor, ...]:
        y = F.conv2d(x, weight, groups=layer.channels, **geometry)
        y = F.relu_(F.batch_norm(y, None, None, gamma, beta, training=True, eps=_EPS))
        return torch.autograd.grad(y, inputs, grad)

    return ours, theirs, _difference(ours(), theirs())


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference between two lists of tensors in the Euclidean norm, relative to PyTorch's.

    (Not of single elements: where a value before the ReLU is 0 but for rounding, its gradient may pass or not.)

    Raises:
        AssertionError: they differ so much that their times mean nothing.
    """
    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True))
    if not worst < 1e-2:
        raise AssertionError(f"the operator's result differs from PyTorch's by {worst:.1e}; it is not timed")
    return worst
