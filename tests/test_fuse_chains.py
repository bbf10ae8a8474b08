"""What fuse finds in hand-written models, what it refuses, and where what it found runs fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _fusable import ALONE, INFERENCE, TRAINING, WHOLE, Block, X, assert_same, block, operators
from _models import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deeplab_kernels import AtrousSeparableConv2d, fuse


@pytest.mark.parametrize("channels_last", [False, True])
def test_hand_written(channels_last: bool) -> None:
    plain = block()
    fused = copy.deepcopy(plain)
    report = fuse(fused, always=True)
    assert [(e.name, e.fused, e.activation) for e in report.fused] == [
        ("first", ("first", "norm1", "relu"), "relu"),
        ("second", ("second", "norm2"), None),
    ]
    assert "relu6" in report.fused[1].reason
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(fused, Block)
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    for mode in (True, False):
        assert_same(fused.train(mode), plain.train(mode), x)
    assert operators(fused, x) == [INFERENCE] * 2
    assert operators(fused.train(), x) == [TRAINING, INFERENCE]  # a bias before the norm trains unfused; it alone
    assert fused.calls == 4
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused.eval()(x, 3.0), plain.eval()(x, 3.0))
    torch.testing.assert_close(fused(x, scale=3.0), plain(x, scale=3.0))


class Separable(nn.Module):
    """A whole block; its second activation may be one that the operator has not."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=4, dilation=4, groups=6, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.pointwise = nn.Conv2d(6, 9, 1, bias=True)
        self.norm2 = nn.BatchNorm2d(9)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.depthwise(x)))
        x = self.norm2(self.pointwise(x))
        return self.relu(x) if self.last is None else self.last(x)


@pytest.mark.parametrize("last", [None, nn.SiLU(), nn.ReLU6()])
def test_whole_blocks(last: nn.Module | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPLAB_KERNELS_SEPARABLE_EXECUTION", "whole")
    plain = randomise(Separable(last)).double()
    fused = copy.deepcopy(plain)
    (entry,) = fuse(fused).fused
    assert entry.fused == ("depthwise", "norm1", "relu")
    assert entry.pointwise[:2] == ("pointwise", "norm2")
    for mode in (True, False):  # both with gradients, where the halves run one by one
        assert_same(fused.train(mode), plain.train(mode), X)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-12, atol=1e-12)
    assert operators(fused, X) == [WHOLE]
    monkeypatch.setenv("DEEPLAB_KERNELS_SEPARABLE_EXECUTION", "two_kernels")
    assert operators(fused, X) == [INFERENCE]
    monkeypatch.setenv("DEEPLAB_KERNELS_SEPARABLE_EXECUTION", "whole")
    assert operators(fused.train(), X) == [TRAINING]
    fused.eval().load_state_dict(plain.eval().state_dict())
    seen: list[Tensor] = []
    fused.pointwise.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    assert operators(fused, X) == [INFERENCE]
    torch.testing.assert_close(seen[0], plain.relu(plain.norm1(plain.depthwise(X))))
    fused.pointwise = nn.Conv2d(6, 9, 3, padding=1).double()
    assert operators(fused, X) == [INFERENCE]


def test_sequential() -> None:
    def depthwise() -> nn.Conv2d:
        return nn.Conv2d(6, 6, 3, padding="same", groups=6, bias=False)

    shared = depthwise()
    plain = nn.Sequential(
        nn.Sequential(depthwise(), nn.BatchNorm2d(6), nn.ReLU6()),
        nn.Sequential(shared, nn.BatchNorm2d(6), nn.Hardswish()),
        nn.Sequential(shared, nn.ReLU()),
        depthwise(),
    )
    plain = randomise(plain).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused, always=True)
    assert [(e.name, e.fused) for e in report.fused] == [
        ("0.0", ("0", "1", "2")),
        ("1.0", ("0", "1")),
        ("3", ("3",)),
    ]
    assert_same(fused, plain, X)
    assert_same(fused.eval(), plain.eval(), X)
    assert operators(fused, X) == [INFERENCE] * 3 + [ALONE]
    fused[0].insert(1, nn.Sigmoid())
    plain[0].insert(1, nn.Sigmoid())
    assert_same(fused, plain, X)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "padding_mode": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
    "is a ConvTranspose2d": lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
    "parametrised": lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 3, groups=6)),
    "1 x 1": lambda: nn.Conv2d(6, 6, 1, groups=6),
    "already": lambda: AtrousSeparableConv2d(6, 6, 3, padding=1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    plain = nn.Sequential(REFUSED[reason](), nn.BatchNorm2d(6), nn.ReLU()).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.fused == []
    assert [reason in entry.reason for entry in report.skipped] == [True]
    assert reason in str(report)
    assert type(fused) is nn.Sequential
    torch.testing.assert_close(fused(X), plain(X), rtol=0, atol=0)


def test_not_depthwise() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 6, 3), nn.Conv1d(6, 6, 3, groups=6))
    report = fuse(model)
    assert report.to_dict() == {"fused": [], "skipped": []}
    assert "no depthwise" in str(report)


class Branching(nn.Module):
    """Cannot be traced as a whole or in training; and a norm that two results reach."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "loop":
            for _ in range(x.shape[0]):
                x = self.norm(self.conv(x))
            return x
        y = self.conv(x)
        if self.kind == "two users":
            return self.norm(y) + y
        if self.kind == "norm twice":
            return self.norm(self.norm(y))
        if self.kind == "conv twice":
            return self.norm(self.conv(y))
        if self.kind == "mode" and self.training:
            return y
        if self.kind == "size" and x.shape[2] > 100:
            return y
        return self.norm(y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("loop", "cannot trace"),
        ("two users", "used 2 times"),
        ("norm twice", "norm is called 2 times"),
        ("conv twice", "is called 2 times"),
        ("mode", "branches"),
        ("size", "branches"),
    ],
)
def test_only_what_the_data_flow_allows(kind: str, reason: str) -> None:
    plain = randomise(Branching(kind)).double()
    fused = copy.deepcopy(plain)
    (entry,) = fuse(fused, always=True).fused
    assert entry.fused == ("conv",)
    assert reason in entry.reason
    for mode in (True, False):
        assert_same(fused.train(mode), plain.train(mode), X)
    assert set(operators(fused, X)) == {ALONE}


@pytest.mark.parametrize(
    "norm", [lambda n: nn.GroupNorm(2, n), lambda n: nn.InstanceNorm2d(n, affine=True), lambda n: nn.LayerNorm([14])]
)
def test_other_norms(norm: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), norm(6), nn.ReLU()).double()
    fused = copy.deepcopy(plain)
    (entry,) = fuse(fused).fused
    assert entry.fused == ("0",)
    assert "not a plain batch norm" in entry.reason
    assert_same(fused, plain, X)


def test_synchronised_norm() -> None:
    plain = block()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert_same(fused.eval(), plain.eval(), X)
    assert operators(fused, X) == [INFERENCE] * 2


def test_only_skip_and_always() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({name: nn.Sequential(Block(), Block(rate=1)) for name in ("encoder", "decoder")})

    def fused(**kwargs: Any) -> list[str]:
        report = fuse(model(), **kwargs)
        assert len(report.fused) + len(report.skipped) == 8
        return [entry.name for entry in report.fused]

    assert fused(only="encoder.0") == ["encoder.0.first", "encoder.0.second"]
    assert fused(only=["*.1.first"]) == ["encoder.1.first", "decoder.1.first"]
    assert fused(skip=["encoder", "decoder.1.*"]) == ["decoder.0.first", "decoder.0.second"]
    with pytest.raises(ValueError, match="only='middle' matches none of the 8"):
        fused(only="middle")
    with pytest.raises(TypeError, match="skip must hold names"):
        fused(skip=[3])


def test_scope_on_a_cpu() -> None:
    """Small maps under large kernels stay with PyTorch in inference, and the report says so."""
    model = nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.BatchNorm2d(6)).double().eval()
    report = fuse(model)
    assert report.fused[0].scope == "all but NCHW inference below 20 x 20"
    assert report.fused[0].scope in str(report)
    assert operators(model, X) == []
    assert operators(model, X.repeat(1, 1, 3, 3)) == [INFERENCE]
    fuse(model, always=True)
    assert operators(model, X) == [INFERENCE]


@pytest.mark.parametrize(
    ("kernel", "stride", "rate", "alone", "words"),
    [
        (3, 1, 3, False, "everywhere"),
        (3, 1, 1, True, "everywhere"),
        (3, 2, 1, False, "all but NHWC training"),
        (3, 2, 4, True, "everywhere"),
        (5, 1, 2, False, "everywhere"),
        (5, 1, 1, True, "all but NCHW inference"),
        (5, 1, 2, True, "all but NCHW inference, NHWC inference"),
        (5, 1, 3, True, "everywhere"),
        (7, 2, 1, False, "all but NCHW inference below 48 x 48"),
        (7, 1, 2, False, "everywhere"),
    ],
)
def test_scope_follows_from_the_geometry(kernel: int, stride: int, rate: int, alone: bool, words: str) -> None:
    conv = nn.Conv2d(6, 6, kernel, stride, rate * (kernel // 2), rate, 6)
    model = nn.Sequential(conv) if alone else nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())
    assert fuse(model).fused[0].scope == words


def test_what_is_out_of_scope_runs_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.BatchNorm2d(6), nn.ReLU()).double()
    fuse(model)
    x = X.contiguous(memory_format=torch.channels_last)
    assert operators(model, x, learns=True) == []
    assert operators(model, X, learns=True) != []
    assert operators(model, x) != []
    fuse(model, always=True)
    assert operators(model, x, learns=True) != []
