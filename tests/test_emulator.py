"""The CUDA kernels' own sources, compiled for the CPU with csrc/emulator and run under AddressSanitizer and UBSan,
against the float64 reference, in several schedules."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _emulator
import pytest
import torch
from _emulator import DTYPES, TOLERANCE, double
from torch import Tensor

import deeplab_kernels.ops  # noqa: F401  # before reference, which imports from it
from deeplab_kernels import reference

pytestmark = _emulator.needs_compiler

OPERATORS = ("conv", "conv_backward", "inference", "training", "backward")


def _text(field: str, value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Case:
    """One call. x is (n, c, h, w); the weight has m filters a channel."""

    op: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    n: int = 2
    c: int = 8
    m: int = 1
    size: tuple[int, int] = (9, 11)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    rate: tuple[int, int] = (1, 1)
    activation: int = 1
    affine: bool = True
    batch_statistics: bool = True
    keep_conv: bool = True  # training: return conv(x); backward: have it given
    need: tuple[bool, bool] = (True, True)
    misalign: int = 0  # elements by which every tensor is off a 16-byte boundary

    @property
    def name(self) -> str:
        return _emulator.case_name(self, Case("conv"), 3, _text)

    @property
    def out_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        free_h = self.size[0] + top + bottom - self.rate[0] * (self.kernel[0] - 1) - 1
        free_w = self.size[1] + left + right - self.rate[1] * (self.kernel[1] - 1) - 1
        return free_h // self.stride[0] + 1, free_w // self.stride[1] + 1

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.rate)


def inputs(case: Case) -> dict[str, Tensor | None]:
    g = _emulator.generator(case.name)
    channels = case.c * case.m

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    # Channel means are large beside the deviations, so that unsound variances show.
    x = normal(case.n, case.c, *case.size) + 3 * normal(1, case.c, 1, 1)
    tensors: dict[str, Tensor | None] = {"x": x.to(case.dtype)}
    tensors["weight"] = normal(channels, 1, *case.kernel).div(3).to(case.dtype)
    if case.op in ("conv_backward", "backward"):
        tensors["grad"] = normal(case.n, channels, *case.out_size).to(case.dtype)
    if case.op in ("inference", "training", "backward"):
        tensors["gamma"] = (normal(channels) + 1.5).to(case.acc) if case.affine else None
        tensors["beta"] = normal(channels).to(case.acc) if case.affine else None
    if case.op in ("inference", "backward"):
        y = conv64(case, tensors)
        empty = y.numel() == 0
        tensors["y"] = y.to(case.dtype)
        mean = torch.zeros(channels) if empty else y.mean((0, 2, 3))
        var = torch.ones(channels) if empty else y.var((0, 2, 3), correction=0) + 0.01
        tensors["mean"], tensors["var"] = mean.to(case.acc), var.to(case.acc)
    return tensors


def conv64(case: Case, t: dict[str, Tensor | None]) -> Tensor:
    return reference.atrous_depthwise_conv2d(double(t["x"]), double(t["weight"]), *case.geometry)


def expected(case: Case, t: dict[str, Tensor | None]) -> list[Tensor | None]:
    """The results in the driver's order, in float64; None where one is not asked for."""
    x, weight = double(t["x"]), double(t["weight"])
    if case.op == "conv":
        return [conv64(case, t)]
    if case.op == "conv_backward":
        grads = reference.atrous_depthwise_conv2d_backward(double(t["grad"]), x, weight, *case.geometry, True, True)
        return [g if need else None for g, need in zip(grads, case.need, strict=True)]
    gamma, beta = double(t["gamma"]), double(t["beta"])
    if case.op == "training":
        out, y, mean, var = reference.atrous_depthwise_bn_act_training(
            x, weight, gamma, beta, 1e-3, case.activation, *case.geometry, True
        )
        return [out, y if case.keep_conv else None, mean, var]
    mean, var = double(t["mean"]), double(t["var"])
    if case.op == "inference":
        arguments = (x, weight, gamma, beta, mean, var, 1e-3, case.activation, *case.geometry)
        return [reference.atrous_depthwise_bn_act_inference(*arguments)]
    grads = reference.atrous_depthwise_bn_act_backward(
        double(t["grad"]), x, weight, double(t["y"]), gamma, beta, mean, var, 1e-3, case.activation,
        case.batch_statistics, *case.geometry, True, True,
    )  # fmt: skip
    return [g if need else None for g, need in zip(grads, (*case.need, True, True), strict=True)]


def encode(case: Case, t: dict[str, Tensor | None]) -> bytes:
    want = (case.keep_conv, False) if case.op == "training" else case.need
    header = struct.pack(
        "<23qd",
        OPERATORS.index(case.op), DTYPES[case.dtype], case.misalign,
        case.n, case.c, case.m, *case.size, *case.out_size, *case.kernel, *case.stride, case.padding[0],
        case.padding[2], *case.rate, case.channels_last, case.activation, case.batch_statistics, *want, 1e-3,
    )  # fmt: skip
    parts = [header]
    for name in ("x", "weight", "gamma", "beta", "mean", "var", "grad", "y"):
        if name not in t or (name == "y" and case.op == "inference"):
            continue
        value = None if name == "y" and not case.keep_conv else t[name]
        parts.append(_emulator.encoded(value, case.channels_last and name != "weight"))
    return b"".join(parts)


def decode(case: Case, data: memoryview, offset: int) -> tuple[list[Tensor | None], int]:
    channels = case.c * case.m
    y = (case.n, channels, *case.out_size)
    x, weight, vector = (case.n, case.c, *case.size), (channels, 1, *case.kernel), (channels,)
    shapes = {
        "conv": [y], "inference": [y], "conv_backward": [x, weight], "training": [y, y, vector, vector],
        "backward": [x, weight, vector, vector],
    }[case.op]  # fmt: skip
    results: list[Tensor | None] = []
    for shape in shapes:
        dtype = case.acc if shape == vector else case.dtype
        result, offset = _emulator.decoded(data, offset, shape, dtype, case.channels_last and shape != weight)
        results.append(result)
    return results, offset


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = sorted((_emulator.CSRC / "cuda").glob("atrous_depthwise*.cu"))
    return _emulator.build(tmp_path_factory, "driver.cpp", kernels)


class Run(_emulator.Run):
    """Results of the driver over many cases."""

    def __init__(
        self, driver: Path, cases: list[Case], folder: Path, order: str, seed: int = 0, dropped: str = ""
    ) -> None:
        super().__init__(driver, (encode(c, inputs(c)) for c in cases), folder, order, seed, dropped)
        self.results: dict[Case, list[Tensor | None]] = {}
        if not self.error:
            offset = 0
            for case in cases:
                self.results[case], offset = decode(case, memoryview(self.data), offset)
            assert offset == len(self.data)


def variants(base: Case) -> list[Case]:
    """The operators of one geometry, each once with what makes it different."""
    return [
        replace(base, op="conv"),
        replace(base, op="conv_backward"),
        replace(base, op="inference", activation=2),
        replace(base, op="training"),
        replace(base, op="backward"),
    ]


def all_cases() -> list[Case]:
    cases: list[Case] = []
    layouts = (False, True)
    for dtype, last in itertools.product(DTYPES, layouts):
        cases += variants(Case("conv", dtype, last, c=16, size=(9, 11), padding=(2, 2, 2, 2), rate=(2, 2)))
        cases += variants(Case("conv", dtype, last, c=16, size=(7, 10), stride=(2, 2)))
    for last in layouts:
        base = Case("conv", channels_last=last)
        geometries = [
            replace(base, c=1, n=1, size=(5, 33)),
            replace(base, c=5, n=3, size=(5, 1), padding=(1, 1, 1, 1)),
            replace(base, c=12, n=1, size=(33, 33), rate=(12, 12), padding=(12, 12, 12, 12)),
            replace(base, c=4, n=1, size=(33, 9), rate=(18, 6), padding=(18, 18, 6, 6)),
            replace(base, c=8, n=1, size=(13, 37), rate=(3, 1), padding=(0, 3, 2, 0)),
            replace(base, c=6, m=2, size=(8, 5)),
            replace(base, c=3, m=3, kernel=(5, 3), stride=(1, 2), padding=(2, 1, 0, 3), size=(9, 8)),
            replace(base, c=8, kernel=(1, 1), padding=(0, 0, 0, 0), size=(6, 7)),
            replace(base, c=8, kernel=(7, 7), padding=(6, 6, 6, 6), rate=(2, 2), size=(9, 7)),
            replace(base, c=8, stride=(3, 1), padding=(4, 0, 0, 4), size=(12, 9)),
            replace(base, c=40, n=1, size=(3, 127)),
            replace(base, c=1, n=1, size=(127, 65), rate=(3, 2), padding=(3, 3, 2, 2)),  # several bands of a plane
            replace(base, c=4, n=1, size=(65, 33), stride=(2, 1)),
            replace(base, c=1, n=1, size=(3, 5000)),  # rows too long for shared memory
            replace(base, c=8, misalign=1),
            replace(base, c=8, n=0),
        ]
        for geometry in geometries:
            cases += variants(geometry)
        cases += [replace(c, misalign=3) for c in variants(replace(base, dtype=torch.bfloat16, size=(5, 9)))]
        for activation, affine in ((0, True), (2, False)):
            chosen = replace(base, activation=activation, affine=affine)
            cases += [replace(chosen, op=op) for op in ("inference", "training", "backward")]
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(replace(base, op="training", dtype=dtype, keep_conv=False))
            cases.append(replace(base, op="backward", dtype=dtype, keep_conv=False, batch_statistics=False))
        for need in ((True, False), (False, True), (False, False)):
            cases.append(replace(base, op="conv_backward", need=need))
            cases.append(replace(base, op="backward", need=need))
    unique = list(dict.fromkeys(cases))
    assert len({c.name for c in unique}) == len(unique)
    return unique


CASES = all_cases()


@pytest.fixture(scope="session")
def forward_run(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(driver, CASES, tmp_path_factory.mktemp("forward"), "forward")


def test_sanitizers_find_nothing(forward_run: Run) -> None:
    assert not forward_run.error, forward_run.error


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_agrees_with_reference(case: Case, forward_run: Run) -> None:
    if forward_run.error:
        pytest.skip("the run failed")
    _emulator.assert_close(forward_run.results[case], expected(case, inputs(case)), TOLERANCE[case.dtype])


@pytest.mark.parametrize(("order", "seed"), [("reverse", 0), ("random", 1)])
def test_every_schedule_gives_the_same_bits(
    order: str, seed: int, driver: Path, forward_run: Run, tmp_path: Path
) -> None:
    run = Run(driver, CASES, tmp_path, order, seed)
    assert not run.error, run.error
    assert run.data == forward_run.data


def test_every_barrier_is_needed(driver: Path, forward_run: Run, tmp_path: Path) -> None:
    few = [c for c in CASES if c.n and c.dtype == torch.float32 and not c.misalign and c.need == (True, True)]
    few = [c for c in few if c.size in ((9, 11), (7, 10), (33, 33))]
    _emulator.assert_barriers_needed(partial(Run, driver, few, tmp_path), forward_run.barriers)
