"""nn.AtrousSeparableConv2d whose submodules somebody else looks at, or has changed: what runs fused, what as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _plain_block import FULL, Stack, X, assert_same, make
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, prune

from deeplab_kernels.nn import _halves


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


def test_convert_sync_batchnorm(calls: list[str]) -> None:
    block = make(4, 5, padding=1, **FULL)
    stack = Stack(block)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert type(converted.depthwise_norm) is nn.SyncBatchNorm
    assert_same(converted, stack, X)
    assert calls == UNFUSED
    assert_same(converted.eval(), stack.eval(), X)
    assert calls == UNFUSED + FUSED
