"""nn.AtrousSeparableConv2d against the same block written with nn.Conv2d and nn.BatchNorm2d."""

from __future__ import annotations

import copy
import io
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _peers import peer
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import deeplab_kernels
from deeplab_kernels.nn import AtrousDepthwiseConv2d, AtrousSeparableConv2d, _halves
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


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_plain_layers(variant: str, training: bool, channels_last: bool) -> None:
    block = make(4, 6, 3, padding=2, dilation=2, **VARIANTS[variant]).train(training)
    stack = Stack(block)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_same(block, stack, x)
    with torch.no_grad():
        out = block(x)
        torch.testing.assert_close(out, stack(x), rtol=1e-11, atol=1e-11)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((1, 1), {"padding": 1}),
        ((1, 5), {"padding": 18, "dilation": 18}),
        ((33, 5), {"padding": "same", "dilation": 12}),
        ((33, 33), {"padding": "same", "stride": 2}),
        ((32, 17), {"padding": "same", "stride": 2, "dilation": 2}),
        ((127, 1), {"padding": (1, 0), "kernel_size": (3, 1), "stride": (2, 1)}),
        ((9, 8), {"padding": (0, 3, 2, 1), "dilation": (1, 2)}),
        ((7, 7), {"kernel_size": 5, "padding": "valid"}),
        ((6, 6), {"kernel_size": 1}),
        ((5, 6), {"kernel_size": 4, "padding": "same"}),
        ((11, 10), {"kernel_size": 7, "padding": 3, "stride": 3}),
    ],
)
def test_odd_sizes(size: tuple[int, int], geometry: dict[str, Any]) -> None:
    block = make(3, 5, **geometry, **FULL)
    assert_same(block, Stack(block), torch.randn(3, 3, *size, dtype=torch.float64))


def test_gradcheck() -> None:
    block = make(2, 3, 3, padding=2, dilation=2, **FULL)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)

    for training in (True, False):
        block.train(training)
        assert torch.autograd.gradcheck(function, (x, *parameters))


def test_defaults_are_linear_and_shaped_as_conv2d() -> None:
    arguments = (8, 12, 3, 2, 6, 6)
    block, conv = AtrousSeparableConv2d(*arguments), nn.Conv2d(*arguments, bias=False)
    x, y = torch.randn(2, 8, 33, 31), torch.randn(2, 8, 33, 31)
    assert block(x).shape == conv(x).shape
    torch.testing.assert_close(block(2 * x - y), 2 * block(x) - block(y), rtol=1e-4, atol=1e-4)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(block, name) == getattr(conv, name)
    assert AtrousSeparableConv2d(3, 16)(torch.randn(1, 3, 8, 8)).shape == (1, 16, 6, 6)
    assert sum(p.numel() for p in AtrousSeparableConv2d(3, 16).parameters()) == 27 + 48  # the seeds' example
    assert [n for n, _ in AtrousSeparableConv2d(3, 16, bias=True).named_parameters() if "bias" in n] == [
        "pointwise.bias"
    ]
    assert deeplab_kernels.AtrousSeparableConv2d is AtrousSeparableConv2d


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = AtrousSeparableConv2d(512, 512, bias=True, **FULL)
    for weight, std in ((block.depthwise.weight, 0.33), (block.pointwise.weight, 0.06)):
        assert weight.abs().max() <= 2 * std
        # A normal distribution cut at two deviations has 0.8796 of its deviation.
        assert abs(weight.std().item() / (0.8796 * std) - 1) < 0.05
    assert block.pointwise.bias.abs().max() == 0
    assert block.depthwise_norm.eps == 1e-3
    block = AtrousSeparableConv2d(64, 64, weight_std=(0.09, 0.09))
    assert block.depthwise.weight.abs().max() <= 0.18
    randomise(AtrousSeparableConv2d(4, 4, **FULL)).reset_parameters()
    block = randomise(AtrousSeparableConv2d(4, 4, **FULL))
    block.reset_parameters()
    assert block.depthwise_norm.weight.eq(1).all()
    assert block.depthwise_norm.running_mean.eq(0).all()


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.BatchNorm2d(n, momentum=None),
        lambda n: nn.BatchNorm2d(n, affine=False),
        lambda n: nn.BatchNorm2d(n, track_running_stats=False),
        lambda n: nn.BatchNorm2d(n, momentum=0.3, eps=0.1),
    ],
    ids=["cumulative", "not affine", "no running statistics", "momentum"],
)
def test_batch_norm_semantics(norm: Callable[[int], nn.Module]) -> None:
    block = make(4, 5, padding=1, depthwise_norm=norm, depthwise_activation="relu", pointwise_norm=norm)
    stack = Stack(block)
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64) * (step + 1)
        assert_same(block, stack, x)
    block.eval(), stack.eval()
    assert_same(block, stack, x)
    if block.depthwise_norm.track_running_stats:
        assert block.depthwise_norm.num_batches_tracked == 4


def test_frozen_norm_in_a_training_block() -> None:
    block = make(4, 5, padding=1, **FULL)
    block.depthwise_norm.eval()
    for parameter in block.depthwise_norm.parameters():
        parameter.requires_grad_(False)
    stack = Stack(block)
    stack.depthwise_norm.eval()
    before = block.depthwise_norm.running_mean.clone()
    assert_same(block, stack, torch.randn(2, 4, 5, 6, dtype=torch.float64))
    assert torch.equal(before, block.depthwise_norm.running_mean)
    assert block.pointwise_norm.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "frozen", [("depthwise.weight",), ("pointwise.weight", "pointwise_norm.bias"), ("depthwise_norm.weight",)]
)
def test_requires_grad_on_some(frozen: tuple[str, ...], training: bool) -> None:
    block = make(3, 4, padding=1, **FULL).train(training)
    stack = Stack(block)
    for module in (block, stack):
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
    assert_same(block, stack, torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_two_backward_passes_and_checkpointing() -> None:
    block = make(3, 4, padding=1, **FULL)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(block(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(plain, again)


# Submodules that somebody else looks at, or has changed.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused operators that nn.AtrousSeparableConv2d calls."""
    module = _halves
    names: list[str] = []
    for name in ("atrous_depthwise_bn_act", "atrous_depthwise_conv2d"):

        def record(*args: Any, name: str, original: Callable[..., Tensor], **kwargs: Any) -> Tensor:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, partial(record, name=name, original=getattr(module, name)))
    return names


X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FUSED, UNFUSED = ["atrous_depthwise_bn_act"], ["atrous_depthwise_conv2d"]


def test_fused_where_untouched(calls: list[str]) -> None:
    block = make(4, 5, **FULL)
    block(X), block.eval()(X)
    assert calls == FUSED * 2


@pytest.mark.parametrize("name", ["depthwise", "depthwise_norm", "pointwise", "pointwise_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_hooks_run(name: str, training: bool, calls: list[str]) -> None:
    block = make(4, 5, padding=1, **FULL).train(training)
    stack = Stack(block)
    seen: list[Tensor] = []
    handles = [
        block.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o)),
        block.get_submodule(name).register_forward_pre_hook(lambda m, i: seen.append(i[0])),
        block.get_submodule(name).register_full_backward_hook(lambda m, i, o: seen.append(o[0])),
    ]
    expected: list[Tensor] = []
    stack.get_submodule(name).register_forward_hook(lambda m, i, o: expected.extend((i[0].clone(), o.clone())))
    assert_same(block, stack, X)
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], X if name == "depthwise" else expected[0])  # the stack pads before
    torch.testing.assert_close(seen[1], expected[1])  # not overwritten by an activation
    assert calls == (UNFUSED if name.startswith("depthwise") else FUSED)
    for handle in handles:
        handle.remove()
    block(X)
    assert calls[-1:] == FUSED


def test_global_hooks_see_every_submodule(calls: list[str]) -> None:
    block, seen = make(4, 5, **FULL), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        block(X)
    finally:
        handle.remove()
    assert seen == ["AtrousDepthwiseConv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "AtrousSeparableConv2d"]
    assert calls == UNFUSED


def test_replaced_and_rewritten_submodules(calls: list[str]) -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    expected = Stack(block)(X)
    block.depthwise_norm.forward = lambda y: torch.zeros_like(y)
    assert calls == []
    assert block(X).std((0, 2, 3)).abs().max() < 1e-12
    assert calls == UNFUSED
    del block.depthwise_norm.forward
    torch.testing.assert_close(block(X), expected)
    block.depthwise = Stack(block).depthwise
    torch.testing.assert_close(block(F.pad(X, (1, 1, 1, 1))), expected)
    block.pointwise, block.pointwise_norm = nn.Identity(), nn.Sigmoid()
    block(F.pad(X, (1, 1, 1, 1))).sum().backward()  # an activation in place would break sigmoid's backward


def test_parametrised_and_pruned(calls: list[str]) -> None:
    block = make(4, 5, padding=1, **FULL)
    expected = Stack(block)
    with torch.no_grad():
        expected.depthwise.weight.mul_(torch.tensor([0.0, 1, 1, 1], dtype=torch.float64).view(4, 1, 1, 1))
    parametrizations.weight_norm(block.pointwise)
    prune.custom_from_mask(
        block.depthwise, "weight", torch.tensor([0.0, 1, 1, 1]).view(4, 1, 1, 1).expand_as(block.depthwise.weight)
    )
    torch.testing.assert_close(block(X), expected(X))
    assert calls == UNFUSED
    block = make(4, 5, padding=1, **FULL).eval()
    expected = Stack(block)
    parametrizations.weight_norm(block.depthwise)
    with torch.no_grad():
        block.depthwise.parametrizations.weight.original0.mul_(3)  # the norms of the filters
        expected.depthwise.weight.mul_(3)
    torch.testing.assert_close(block(X), expected(X))
    assert calls == UNFUSED * 2


def test_torch_fusion_utilities() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    expected = Stack(block)(X)
    block.depthwise = fusion.fuse_conv_bn_eval(block.depthwise, block.depthwise_norm)
    block.depthwise_norm = nn.Identity()
    block.pointwise = fusion.fuse_conv_bn_eval(block.pointwise, block.pointwise_norm)
    block.pointwise_norm = nn.Identity()
    torch.testing.assert_close(block(X), expected)


def test_geometry_of_a_built_block_can_change() -> None:
    block = make(4, 5, 3, stride=2, padding="same", **FULL)
    block.stride, block.dilation = 1, 2
    other = make(4, 5, 3, padding=2, dilation=2, **FULL)
    torch.testing.assert_close(block(X), other(X))
    block.padding = (1, 2, 3, 4)
    assert block.padding == (1, 2, 3, 4)
    assert block(X).shape == (2, 5, 5, 8)
    for name in ("stride", "dilation"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            setattr(block, name, 0)


# Names and modules of such blocks elsewhere.


def sequential(block: AtrousSeparableConv2d, *, nested: bool = False) -> nn.Sequential:
    stack = Stack(block)
    assert stack.sides == (2, 2, 2, 2)
    stack.depthwise.padding = (2, 2)
    norms = [[] if type(n) is nn.Identity else [n] for n in (stack.depthwise_norm, stack.pointwise_norm)]
    between = [nn.ReLU()] if block.depthwise_activation else []
    after = [nn.ReLU()] if block.pointwise_activation else []
    if nested:
        return nn.Sequential(
            nn.Sequential(stack.depthwise, *norms[0], *between, stack.pointwise), *norms[1], *after
        ).double()
    return nn.Sequential(stack.depthwise, *norms[0], *between, stack.pointwise, *norms[1], *after).double()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("variant", ["linear", "biased", "both biases", "activation between", "pointwise norm only"])
def test_loads_sequential(variant: str, nested: bool) -> None:
    arguments = {"padding": 2, "dilation": 2, **VARIANTS[variant]}
    reference = sequential(make(4, 5, **arguments), nested=nested).eval()
    block = AtrousSeparableConv2d(4, 5, **arguments, dtype=torch.float64).eval()
    model = nn.ModuleDict({"aspp": block})
    result = model.load_state_dict({f"aspp.{name}": value for name, value in reference.state_dict().items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(block(X), reference(X))


def test_loads_own_names_and_other_ports() -> None:
    source = make(4, 5, **FULL)
    own = source.state_dict()
    spellings = {
        "timm": {"depthwise": "conv_dw", "depthwise_norm": "bn_dw", "pointwise": "conv_pw", "pointwise_norm": "bn_pw"},
        "body": {"depthwise": "body.0", "depthwise_norm": "body.1", "pointwise": "body.3", "pointwise_norm": "body.4"},
        "own": {name: name for name in ("depthwise", "depthwise_norm", "pointwise", "pointwise_norm")},
    }
    for spelling in spellings.values():
        state = {f"{spelling[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in own.items()}
        given = dict(state)
        block = AtrousSeparableConv2d(4, 5, **FULL, dtype=torch.float64)
        block.load_state_dict(state)
        assert state == given  # the caller's dictionary is left alone
        assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), own.values(), strict=True))
    block = AtrousSeparableConv2d(4, 5, depthwise_norm=True, dtype=torch.float64)
    first_port = {"depthwise": "conv1", "depthwise_norm": "bn", "pointwise": "pointwise"}
    state = {f"{first_port[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in block.state_dict().items()}
    AtrousSeparableConv2d(4, 5, depthwise_norm=True, dtype=torch.float64).load_state_dict(state)


def test_strict_loading_reports_what_is_there() -> None:
    state = sequential(make(4, 5, padding=2, dilation=2, **FULL)).state_dict()
    block = AtrousSeparableConv2d(4, 5, depthwise_norm=True, depthwise_activation="relu", dtype=torch.float64)
    result = block.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == sorted(name for name in state if name.startswith("4."))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "4.weight"'):
        block.load_state_dict(state)
    del state["3.weight"], state["4.weight"]
    block = AtrousSeparableConv2d(4, 5, **FULL, bias=True, dtype=torch.float64)
    result = block.load_state_dict(
        {"conv_dw.weight": torch.ones(4, 1, 3, 3), "bn.bias": torch.ones(5), "head.weight": torch.ones(1)}, strict=False
    )
    assert result.unexpected_keys == ["head.weight"]
    assert "pointwise.weight" in result.missing_keys
    assert "pointwise_norm.bias" not in result.missing_keys
    with pytest.raises(RuntimeError, match=r"size mismatch for depthwise\.weight"):
        block.load_state_dict({"0.weight": torch.ones(3, 1, 3, 3), "1.weight": torch.ones(5, 4, 1, 1)}, strict=False)
    # Three convolutions are no such block: nothing is guessed.
    three = {f"{i}.weight": torch.ones(4, 4, 1, 1) for i in range(3)}
    assert sorted(block.load_state_dict(three, strict=False).unexpected_keys) == sorted(three)


def test_timm_separable_conv_norm_act() -> None:
    timm = peer("timm")
    theirs = randomise(timm.layers.SeparableConvNormAct(4, 6, 3, dilation=2)).eval()
    ours = AtrousSeparableConv2d(
        4, 6, 3, padding="same", dilation=2, pointwise_norm=True, pointwise_activation="relu", eps=theirs.bn.eps
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    taken = AtrousSeparableConv2d.from_modules(theirs.conv_dw, theirs.conv_pw, theirs.bn)
    torch.testing.assert_close(taken(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_timm_xception_separable_conv() -> None:
    peer("timm")
    from timm.models.xception_aligned import SeparableConv2d

    theirs = randomise(SeparableConv2d(4, 6, 3, stride=2, dilation=2)).eval()
    ours = AtrousSeparableConv2d(4, 6, 3, stride=2, padding="same", dilation=2, **FULL, eps=theirs.bn_dw.eps).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in ((9, 7), (8, 10)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_segmentation_models_pytorch_separable_conv() -> None:
    peer("segmentation_models_pytorch")
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPPSeparableConv, SeparableConv2d

    x = torch.randn(2, 4, 9, 7)
    for bias in (True, False):
        theirs = randomise(SeparableConv2d(4, 6, 3, padding=2, dilation=2, bias=bias))
        ours = AtrousSeparableConv2d(4, 6, 3, padding=2, dilation=2, bias=bias)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    branch = randomise(ASPPSeparableConv(4, 6, 12)).eval()
    ours = AtrousSeparableConv2d(
        4, 6, 3, padding=12, dilation=12, pointwise_norm=True, pointwise_activation="relu", eps=1e-5
    )
    ours.eval().load_state_dict(branch.state_dict())
    torch.testing.assert_close(ours(x), branch(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_from_modules(training: bool) -> None:
    stack = sequential(make(4, 5, padding=2, dilation=2, **FULL)).train(training)
    reference = copy.deepcopy(stack)
    block = AtrousSeparableConv2d.from_modules(*stack)
    assert block.training is training
    assert block.depthwise.weight is stack[0].weight
    assert block.pointwise is stack[3]
    assert block.depthwise_norm is stack[1]
    assert block.depthwise_activation == block.pointwise_activation == "relu"
    torch.testing.assert_close(block(X), reference(X))
    torch.testing.assert_close(stack[1].running_mean, reference[1].running_mean)
    nested = AtrousSeparableConv2d.from_modules(nn.ReLU6(), nn.Sequential(stack[0], nn.Identity()), None, stack[3])
    assert (nested.pre_activation, nested.depthwise_activation) == ("relu6", None)
    torch.testing.assert_close(nested(X), stack[3](stack[0](F.relu6(X))))
    short = AtrousSeparableConv2d.from_modules(stack[0], stack[1], stack[3], None, depthwise_activation="relu")
    expected = stack[3](F.relu(stack[1](stack[0](X)))).detach()
    if not training:
        torch.testing.assert_close(short(X).detach(), expected)
    again = AtrousSeparableConv2d.from_modules(block.depthwise, block.depthwise_norm, block.pointwise)
    assert again.depthwise is block.depthwise


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "bias": False, **kwargs})


def pointwise(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 5, "kernel_size": 1, **kwargs})


def hooked() -> nn.Conv2d:
    module = conv()
    module.register_forward_hook(lambda m, i, o: None)
    return module


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ((conv(groups=2), pointwise()), ValueError, r"groups equal to its in_channels 4, got groups=2"),
        ((conv(), pointwise(kernel_size=3)), ValueError, r"kernel_size \(1, 1\), got \(3, 3\)"),
        ((conv(), pointwise(stride=2)), ValueError, "stride 1, padding 0 and groups 1"),
        ((conv(), pointwise(padding=1)), ValueError, "stride 1, padding 0 and groups 1"),
        ((conv(), pointwise(in_channels=8)), ValueError, "4 output channels as in_channels, got 8"),
        ((conv(padding_mode="reflect"), pointwise()), ValueError, "padding_mode must be \"zeros\", got 'reflect'"),
        ((conv(), nn.BatchNorm2d(3), pointwise()), ValueError, "depthwise convolution must have 4 channels, got 3"),
        ((conv(), pointwise(), nn.GroupNorm(2, 4)), ValueError, "pointwise convolution must have 5 channels, got 4"),
        ((conv(),), ValueError, "needs a depthwise and a pointwise convolution, got 1 of 2"),
        ((conv(), pointwise(), pointwise()), ValueError, "a third"),
        ((conv(), nn.ReLU(), nn.ReLU6(), pointwise()), ValueError, "two activations"),
        ((nn.BatchNorm2d(4), conv(), pointwise()), ValueError, "directly after each convolution"),
        ((conv(), nn.ReLU(), nn.BatchNorm2d(4), pointwise()), ValueError, "directly after each convolution"),
        ((conv(), nn.Dropout(), pointwise()), TypeError, r"got Dropout\(p=0.5"),
        ((conv(), pointwise(dtype=torch.float64)), ValueError, "one dtype, got torch.float32 and torch.float64"),
        ((hooked(), pointwise()), ValueError, "has hooks"),
        ((parametrizations.weight_norm(conv()), pointwise()), TypeError, "nn.Conv2d itself, got Parametrized"),
        (("relu", conv(), pointwise()), TypeError, "got 'relu'"),
    ],
)
def test_from_modules_refuses(modules: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtrousSeparableConv2d.from_modules(*modules)


# What a module is put through.


def test_copies_pickles_and_files() -> None:
    block = make(4, 5, padding="same", dilation=3, **FULL)
    expected = Stack(block)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(file, weights_only=False),
    ):
        assert repr(copied) == repr(block)
        assert_same(copied, copy.deepcopy(expected), X)


def test_repr_names_what_is_not_default() -> None:
    text = repr(AtrousSeparableConv2d(4, 6, 3, padding=2, dilation=2, pre_activation="relu", depthwise_norm=True))
    assert "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2), pre_activation='relu'" in text
    assert "depthwise_activation" not in text
    assert "(depthwise_norm): BatchNorm2d(4, eps=0.001" in text


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, training: bool) -> None:
    block = make(16, 8, padding=2, dilation=2, **FULL).to(dtype).train(training)
    exact = copy.deepcopy(block).double()
    plain = Stack(block)
    x = torch.randn(2, 16, 9, 9).to(dtype)
    expected = Stack(exact)(x.double())
    out = block(x)
    assert out.dtype == dtype
    ours, theirs = ((o.double() - expected).abs().max().item() for o in (out, plain(x)))
    assert ours <= 2 * theirs
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in block.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    block = make(16, 8, padding=2, dilation=2, dtype=torch.float32, **FULL).train(training)
    stack = Stack(block)
    x = torch.randn(2, 16, 9, 9)
    exact = Stack(copy.deepcopy(block).double())(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = block(x), stack(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    assert block.depthwise_norm.running_mean.dtype == torch.float32


def test_inference_in_single_precision_is_as_exact_as_plain_layers() -> None:
    block = make(64, 32, padding=12, dilation=12, dtype=torch.float32, **FULL).eval()
    x = torch.randn(2, 64, 33, 33)
    with torch.no_grad():
        exact = Stack(copy.deepcopy(block).double())(x.double())
        ours, theirs = block(x), Stack(block)(x)
        for error in (lambda out: (out - exact).abs().max(), lambda out: (out - exact).square().mean().sqrt()):
            assert error(ours) <= 1.5 * error(theirs)
        block.to(memory_format=torch.channels_last)
        out = block(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, ours, rtol=1e-4, atol=1e-4)


def test_convert_sync_batchnorm(calls: list[str]) -> None:
    block = make(4, 5, padding=1, **FULL)
    stack = Stack(block)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert type(converted.depthwise_norm) is nn.SyncBatchNorm
    assert_same(converted, stack, X)
    assert calls == UNFUSED
    assert_same(converted.eval(), stack.eval(), X)
    assert calls == UNFUSED + FUSED


def test_meta_device_then_real_weights() -> None:
    block = AtrousSeparableConv2d(4, 5, **FULL, device="meta")
    for training in (True, False):
        assert block.train(training)(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 5, 7, 7)
    source = make(4, 5, **FULL, dtype=torch.float32)
    block.load_state_dict(sequential_names(source.state_dict()), assign=True)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(block(x), source.eval()(x))
    empty = AtrousSeparableConv2d(4, 5, **FULL, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x).isfinite().all()


def sequential_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    number = {"depthwise": "0", "depthwise_norm": "1", "pointwise": "3", "pointwise_norm": "4"}
    return {f"{number[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    block = make(4, 5, padding=1, **FULL).train(training)
    stack = Stack(block)
    assert_same(torch.compile(block, fullgraph=True, backend="aot_eager")._orig_mod, stack, X)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (6, 7):
        x = torch.randn(2, 4, size, size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), stack(x))
        torch.testing.assert_close(block.depthwise_norm.running_var, stack.depthwise_norm.running_var)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), stack(X))


def test_export() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, (X,), dynamic_shapes=({0: batch},))
    assert "atrous_depthwise_bn_act_inference" in str(program.graph)
    x = torch.cat([X, X + 1])
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_under_torch_func() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    expected = Stack(block)(X)
    torch.testing.assert_close(torch.jit.trace(block, X)(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(block)(X[None])[0], expected)


def test_flops_are_those_of_the_convolutions() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    with FlopCounterMode(display=False) as counter:
        block(X)
    assert counter.get_total_flops() == 2 * X.numel() * (9 + 5)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    script = textwrap.dedent("""
        import sys
        import torch, torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from deeplab_kernels import AtrousSeparableConv2d

        torch.set_num_threads(1)
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
        torch.manual_seed(rank)  # other weights, buffers and data on each rank; DDP makes weights and buffers one
        block = AtrousSeparableConv2d(4, 5, padding=1, depthwise_norm=True, depthwise_activation="relu",
                                      pointwise_norm=True, dtype=torch.float64)
        model = DistributedDataParallel(block)
        state = {"0": "depthwise", "1": "depthwise_norm", "3": "pointwise", "4": "pointwise_norm"}
        stack = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4, eps=1e-3),
                              nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5, eps=1e-3)).double()
        for number, name in state.items():
            stack[int(number)].load_state_dict(block.get_submodule(name).state_dict())
        reference = DistributedDataParallel(stack)
        for _ in range(3):
            x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
            for module in (model, reference):
                module.zero_grad()
                module(x).square().sum().backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.01 * parameter.grad
        for ours, theirs in zip(block.state_dict().values(), stack.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs)
        weights = torch.cat([p.detach().flatten() for p in block.parameters()])
        other = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(other, weights)
        assert torch.equal(other[0], other[1])
        dist.destroy_process_group()
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "rendezvous")], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding_mode": "reflect"}, ValueError, "padding_mode must be \"zeros\", got 'reflect'"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"out_channels": -2}, ValueError, "out_channels must be at least 1, got -2"),
        ({"in_channels": 4.0}, TypeError, "in_channels must be an int, got 4.0"),
        ({"channel_multiplier": 0}, ValueError, "channel_multiplier must be at least 1, got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"dilation": -1}, ValueError, "dilation must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": "full"}, ValueError, "padding must be"),
        ({"padding": (1, 1, 1)}, ValueError, "padding must be"),
        ({"depthwise_activation": "gelu"}, ValueError, "depthwise_activation must be .*'gelu'"),
        ({"pre_activation": F.relu}, ValueError, "pre_activation must be"),
        ({"pointwise_activation": []}, ValueError, "pointwise_activation must be"),
        ({"depthwise_norm": "batch"}, TypeError, "depthwise_norm must be True, False, None or a function"),
        ({"pointwise_norm": nn.BatchNorm2d(5)}, TypeError, "pointwise_norm must be True, False, None or a function"),
        ({"pointwise_norm": lambda n: n}, TypeError, "pointwise_norm must return an nn.Module, got int"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtrousSeparableConv2d(**{"in_channels": 4, "out_channels": 5, **arguments})


@pytest.mark.parametrize("variant", ["linear", "activation between", "both biases"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(4, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(4, 9, 9\)"),
        (torch.ones(2, 2, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(2, 2, 9, 9\)"),
        (torch.ones(2, 8, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(2, 8, 9, 9\)"),
        (torch.ones(2, 4, 2, 9), ValueError, "kernel is larger than the padded input: height 2"),
        (torch.ones(2, 4, 9, 9, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(2, 4, 9, 9, dtype=torch.float64), TypeError, "weight must have x's dtype torch.float64"),
        (torch.ones(2, 4, 9, 9, device="meta"), ValueError, "weight must be on x's device meta, got cpu"),
    ],
)
def test_forward_refuses(variant: str, x: Tensor, error: type[Exception], message: str) -> None:
    block = AtrousSeparableConv2d(4, 5, **VARIANTS[variant])
    with pytest.raises(error, match=message):
        block(x)


def test_failed_step_counts_no_batch() -> None:
    block = AtrousSeparableConv2d(4, 5, **FULL)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.ones(1, 4, 3, 3))
    assert block.depthwise_norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_and_non_finite(training: bool) -> None:
    block = make(4, 5, padding=1, **FULL).train(training)
    stack = Stack(block)
    empty = torch.empty(0, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    assert block(empty).shape == stack(empty).shape == (0, 5, 7, 5)
    block(empty).sum().backward()
    x = X.clone()
    x[0, 1, 2, 3], x[1, 0, 0, 0] = float("nan"), float("inf")
    torch.testing.assert_close(block(x), stack(x), equal_nan=True)


def test_views_are_read_as_they_are() -> None:
    block = make(4, 5, padding=1, **FULL)
    wide = torch.randn(2, 8, 12, 11, dtype=torch.float64)
    for view in (wide[:, ::2, 1::2, 2:], wide[:, :4].transpose(2, 3), wide[:1, :4].expand(3, -1, -1, -1)):
        assert_same(block, Stack(block), view)


def test_depthwise_module_is_a_conv2d() -> None:
    for bias in (True, False):
        ours = AtrousDepthwiseConv2d(4, 8, (3, 5), 2, (1, 2), 2, bias, dtype=torch.float64)
        theirs = nn.Conv2d(4, 8, (3, 5), 2, (1, 2), 2, 4, bias, dtype=torch.float64)
        theirs.load_state_dict(ours.state_dict())
        assert_same(ours, theirs, torch.randn(2, 4, 11, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match="out_channels must be a multiple of in_channels=4, got 6"):
        AtrousDepthwiseConv2d(4, 6)


def test_documentation_and_example_run(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "atrous_separable.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    runpy.run_path(str(root / "examples" / "atrous_separable.py"), run_name="__main__")
    differences = re.findall(r"largest difference (\S+);", capsys.readouterr().out)
    assert len(differences) == 3
    assert max(map(float, differences)) < 1e-4
