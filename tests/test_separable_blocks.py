"""Names and modules of separable blocks that were written elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _peers import peer
from _plain_block import FULL, VARIANTS, Stack, X, make, randomise
from torch import nn
from torch.nn.utils import parametrizations

from deeplab_kernels.nn import AtrousSeparableConv2d


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
