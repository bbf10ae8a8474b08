"""The ASPP head and the module that runs its atrous branches in one pass: the same as calling the branches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from _cases import LAYOUTS
from torch import Tensor, nn

from deeplab_kernels import ops
from deeplab_kernels.models.heads.aspp import ASPP
from deeplab_kernels.nn import AtrousSeparableConv2d, AtrousSpatialPyramid

CHANNELS = 64
RATES = (1, 2, 5)


def pyramid(norm: bool = True, rates: tuple[int, ...] = RATES, **options) -> AtrousSpatialPyramid:
    options = {"depthwise_norm": norm, "depthwise_activation": "relu" if norm else None, "padding": "same"} | options
    options |= {"pointwise_norm": True, "pointwise_activation": "relu", "execution": "two_kernels"}
    module = AtrousSpatialPyramid(AtrousSeparableConv2d(CHANNELS, 7, dilation=r, **options) for r in rates)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry, `training`, for each call of the operator."""
    found: list[bool] = []
    operator = ops.atrous_spatial_pyramid

    def spy(*args, **options):
        found.append(options["training"])
        return operator(*args, **options)

    monkeypatch.setattr(ops, "atrous_spatial_pyramid", spy)
    return found


def image(layout: str = "nchw", requires_grad: bool = False) -> Tensor:
    return torch.randn(2, CHANNELS, 9, 11).contiguous(memory_format=LAYOUTS[layout]).requires_grad_(requires_grad)


def backpropagated(module: nn.Module, outputs: list[Tensor], mean: Tensor, x: Tensor) -> list[Tensor]:
    sum((i + 1) * (out * out).sum() for i, out in enumerate([*outputs, mean])).backward()
    return [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_one_pass_is_the_branches(norm, training, layout, calls):
    module = pyramid(norm).train(training)
    twin = copy.deepcopy(module)
    x = image(layout, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, mean = module(x)
    assert calls == [training and norm]
    expected, expected_mean = [branch(y) for branch in twin], y.mean((2, 3), keepdim=True)
    torch.testing.assert_close((found, mean), (expected, expected_mean))
    for a, b in zip(
        backpropagated(module, found, mean, x), backpropagated(twin, expected, expected_mean, y), strict=True
    ):
        scale = max(b.abs().max().item(), 1e-3)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_without_gradients(layout, calls):
    module, x = pyramid().eval(), image(layout)
    with torch.inference_mode():
        found, mean = module(x)
        torch.testing.assert_close(found, [branch(x) for branch in module])
    torch.testing.assert_close(mean, x.mean((2, 3), keepdim=True))
    assert calls == [False]


def test_cumulative_momentum_counts_batches(calls):
    module = pyramid(momentum=None)
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = image()
        module(x)
        for branch in twin:
            branch(x)
    assert calls == [True] * 3
    assert module[0].depthwise_norm.num_batches_tracked == 3
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


def change(function: Callable[[AtrousSpatialPyramid], object]) -> Callable[[], AtrousSpatialPyramid]:
    def changed() -> AtrousSpatialPyramid:
        module = pyramid()
        function(module)
        return module

    return changed


BRANCH_BY_BRANCH = {
    "hook on a norm": change(lambda m: m[1].depthwise_norm.register_forward_hook(lambda *_: None)),
    "hook on a block": change(lambda m: m[1].register_forward_hook(lambda *_: None)),
    "one frozen norm": change(lambda m: m[1].depthwise_norm.eval()),
    "another eps": change(lambda m: setattr(m[1].depthwise_norm, "eps", 0.5)),
    "another stride": change(lambda m: [setattr(b, "stride", 2) for b in m]),
    "explicit padding": change(lambda m: [setattr(b, "padding", 1) for b in m]),
    "another memory": change(lambda m: setattr(m[1], "save_conv", True)),
    "another norm": change(lambda m: setattr(m[0], "depthwise_norm", nn.GroupNorm(2, CHANNELS))),
    "plain convolution": change(lambda m: m.append(nn.Conv2d(CHANNELS, 7, 3, padding=1))),
    "bias": lambda: pyramid(depthwise_bias=True),
    "activation before": lambda: pyramid(pre_activation="relu"),
    "no branches": lambda: pyramid(rates=()),
}


@pytest.mark.parametrize("what", BRANCH_BY_BRANCH)
def test_anything_else_runs_branch_by_branch(what, calls):
    module = BRANCH_BY_BRANCH[what]()
    twin, x = copy.deepcopy(module), image()
    found, mean = module(x)
    assert calls == []
    torch.testing.assert_close(found, [branch(x) for branch in twin])
    torch.testing.assert_close(mean, x.mean((2, 3), keepdim=True))


def test_synchronised_norms_run_branch_by_branch_in_training(calls):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(pyramid())
    assert isinstance(module, AtrousSpatialPyramid)
    x = image()
    module.eval()(x)
    assert calls == [False]
    assert not module.train()._is_one_pass(list(module), x)


def test_global_hooks_see_every_module(calls):
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        pyramid()(image())
    finally:
        handle.remove()
    assert calls == []
    assert sum(isinstance(m, nn.BatchNorm2d) for m in seen) == 2 * len(RATES)


def test_whole_blocks_are_kept_in_inference(calls):
    module, x = pyramid().eval(), image("nhwc")
    for block in module:
        block.execution = "whole"
    with torch.no_grad():
        module(x)
    assert calls == []
    module(x)  # with gradients a block is no operator of its own
    assert calls == [False]


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"input must have shape \(N, 64, H, W\)"):
        pyramid()(torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize("training", [False, True])
def test_head_compiles_and_takes_one_pass(training, calls):
    head = ASPP(CHANNELS, 8, RATES, dropout=0.0).train(training)
    x = image()
    expected = head(x)
    assert calls == [training]
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), expected)


def test_head_keeps_its_names_and_rates(calls):
    head = ASPP(CHANNELS, 8, RATES, dropout=0.0).eval()
    names = {name.rpartition(".")[0] for name in head.state_dict()}
    assert {"atrous.0.depthwise", "atrous.2.pointwise_norm", "pooling.conv", "pointwise.norm", "project.conv"} <= names
    head.set_rates((2, 4, 7))
    x = image()
    expected = [branch(x) for branch in head.atrous]
    torch.testing.assert_close(head.atrous(x)[0], expected)
    assert [branch.dilation for branch in head.atrous] == [(2, 2), (4, 4), (7, 7)]
