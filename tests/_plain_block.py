"""nn.AtrousSeparableConv2d and the same block in PyTorch's own layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.ops import _validation

VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "biased": {"bias": True},
    "both biases": {"bias": True, "depthwise_bias": True, "depthwise_activation": "relu"},
    "activation between": {
        "depthwise_norm": True,
        "depthwise_activation": "relu",
        "pointwise_norm": True,
        "pointwise_activation": "relu",
    },
    "activation before": {"pre_activation": "relu", "depthwise_norm": True, "pointwise_norm": True},
    "relu6": {
        "pre_activation": "relu6",
        "depthwise_norm": True,
        "depthwise_activation": "relu6",
        "pointwise_activation": "relu6",
        "bias": True,
    },
    "pointwise norm only": {"pointwise_norm": True, "pointwise_activation": "relu", "bias": True},
    "activations without norms": {"depthwise_activation": "relu", "pointwise_activation": "relu6"},
    "bias before norm": {"depthwise_norm": True, "depthwise_bias": True, "depthwise_activation": "relu"},
    "multiplier 3": {"channel_multiplier": 3, "depthwise_norm": True, "depthwise_activation": "relu"},
    "group norm": {"depthwise_norm": lambda n: nn.GroupNorm(2, n), "depthwise_activation": "relu"},
}
FULL = VARIANTS["activation between"]


class Stack(nn.Module):
    """The definition: the modules of ``block`` copied into plain torch layers, called one after the other."""

    def __init__(self, block: AtrousSeparableConv2d) -> None:
        super().__init__()
        conv = block.depthwise
        self.sides = _validation.sides(conv.padding, conv.kernel_size, conv.stride, conv.dilation)
        self.depthwise = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            0,
            conv.dilation,
            conv.in_channels,
            conv.bias is not None,
        )
        self.depthwise_norm = copy.deepcopy(block.depthwise_norm)
        self.pointwise = copy.deepcopy(block.pointwise)
        self.pointwise_norm = copy.deepcopy(block.pointwise_norm)
        self.activations = [block.pre_activation, block.depthwise_activation, block.pointwise_activation]
        self.to(conv.weight.dtype).load_state_dict(block.state_dict())
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        pre, between, after = ({None: nn.Identity(), "relu": F.relu, "relu6": F.relu6}[a] for a in self.activations)
        top, bottom, left, right = self.sides
        y = self.depthwise(F.pad(pre(x), (left, right, top, bottom)))
        return after(self.pointwise_norm(self.pointwise(between(self.depthwise_norm(y)))))


def randomise(module: nn.Module) -> nn.Module:
    """Gives norms and biases values that a forgotten one would show in."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        with torch.no_grad():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("norm.weight"):
                value.uniform_(-1.5, 1.5)
            elif value.is_floating_point() and value.dim() == 1:
                value.normal_()
    return module


def make(*args: Any, **kwargs: Any) -> AtrousSeparableConv2d:
    torch.manual_seed(0)
    return randomise(AtrousSeparableConv2d(*args, **{"dtype": torch.float64, **kwargs}))


def assert_same(block: nn.Module, stack: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    """Same output, same gradients of input and parameters, same buffers afterwards."""
    results = []
    for module in (block, stack):
        module.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(leaf)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad, dict(module.named_parameters()), dict(module.named_buffers())))
    (out, grad, parameters, buffers), (ref_out, ref_grad, ref_parameters, ref_buffers) = results
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, ref_out, **close)
    torch.testing.assert_close(grad, ref_grad, **close)
    assert parameters.keys() == ref_parameters.keys()
    for name, parameter in parameters.items():
        assert (parameter.grad is None) == (ref_parameters[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, ref_parameters[name].grad, **close, msg=lambda m, n=name: n + m)
    assert buffers.keys() == ref_buffers.keys()
    for name, value in buffers.items():
        torch.testing.assert_close(value, ref_buffers[name], **close, msg=lambda m, n=name: n + m)


X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
