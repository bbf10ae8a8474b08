"""A hand-written model that fuse finds chains in, and what its tests compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _models import randomise
from torch import Tensor, nn


def output(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # of dropout and stochastic depth
    out = model(x)
    return out["out"] if isinstance(out, dict) else out


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Same output, gradients of input and parameters, and buffers afterwards."""
    results = []
    for model in (fused, plain):
        model.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = output(model, leaf)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        assert leaf.grad is not None
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), "x": leaf.grad, **grads, **dict(model.named_buffers())})
    actual, expected = results
    assert list(actual) == list(expected)
    for name, value in expected.items():
        scale = max(value.double().abs().max().item(), 1e-3)  # gradients that are 0 but for rounding
        error = (actual[name].double() - value.double()).abs().max().item() / scale
        assert error < tolerance, f"{name}: {error}"


class Block(nn.Module):
    """The usual block: activations as one shared module and as a function, a helper, an argument with a default."""

    def __init__(self, channels: int = 6, rate: int = 2, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False)
        self.norm1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(channels, 2 * channels, (3, 5), 2, (0, 2), groups=channels, bias=True)
        self.norm2 = norm(2 * channels)
        self.gate = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.calls = 0
        self.use_norm = True

    def _first(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.relu(self.norm1(x) if self.use_norm else x)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        self.calls += 1
        y = self._first(x) + x
        y = F.relu6(self.norm2(self.second(self.relu(y))))
        return scale * self.relu(self.gate(y)) + self.second.out_channels


def block(**kwargs: Any) -> Block:
    return randomise(Block(**kwargs)).double()


X = torch.randn(3, 6, 13, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def operators(model: nn.Module, *inputs: Any, learns: bool = False) -> list[str]:
    """Names of this package's operators that one call runs; learns: with gradients."""
    names: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "deeplab_kernels":
                names.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Record(), torch.set_grad_enabled(learns):
        model(*inputs)
    return names


INFERENCE, TRAINING, ALONE, WHOLE = (
    "atrous_depthwise_bn_act_inference",
    "atrous_depthwise_bn_act_training",
    "atrous_depthwise_conv2d",
    "atrous_separable_conv2d",
)
