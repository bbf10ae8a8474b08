"""The CUDA sources of the permutohedral filter and the dense CRF, compiled for the CPU with csrc/emulator and run under
AddressSanitizer and UBSan, against the float64 reference, in several schedules."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _emulator
import pytest
import torch
from _emulator import double
from torch import Tensor

import deeplab_kernels.ops  # noqa: F401  # before reference, which imports from it
from deeplab_kernels.reference import dense_crf, permutohedral

pytestmark = _emulator.needs_compiler

OPERATORS = ("filter", "filter_backward", "mean_field", "mean_field_backward")
NONE, BEFORE, AFTER, SYMMETRIC = range(4)
# Largest error over the largest magnitude of a result.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


def _text(field: str, value: Any) -> str:
    return "_".join(f"{d}{'nbas'[n]}" for d, n in value) if field == "kernels" else str(value)


@dataclass(frozen=True)
class Case:
    """One call; a kernel is (feature dimension, normalization)."""

    op: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    channels: int = 5
    points: int = 127
    kernels: tuple[tuple[int, int], ...] = ((5, SYMMETRIC),)
    transpose: bool = False
    iterations: int = 2
    spread: float = 1.0  # standard deviation of the features
    offset: float = 0.0
    matrix: str = "full"  # compatibility: full, diagonal, potts
    masked: bool = False
    keep: bool = True  # forward: save Q; backward: have it given
    need: tuple[bool, bool] = (True, True)  # values and features, or features and compatibility
    bad_point: bool = False  # one with NaN features

    @property
    def name(self) -> str:
        return _emulator.case_name(self, Case("filter"), 2, _text)


def inputs(case: Case) -> dict[str, Tensor | None]:
    g = _emulator.generator(case.name)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (case.batch, case.channels, case.points)
    t: dict[str, Tensor | None] = {"values": normal(*shape), "grad": None, "mask": None, "saved": None}
    if case.op.endswith("backward"):
        t["grad"] = normal(*shape)
    if case.masked:
        t["mask"] = torch.rand(case.batch, case.points, generator=g) < 0.7
    for m, (d, _) in enumerate(case.kernels):
        features = normal(case.batch, d, case.points) * case.spread + case.offset
        if case.bad_point:
            features[0, d // 2, case.points // 2] = float("nan")
        t[f"features{m}"] = features
        diagonal = torch.diag(
            normal(case.channels) if case.matrix == "diagonal" else torch.ones(case.channels).double()
        )
        t[f"matrix{m}"] = normal(case.channels, case.channels) / 3 if case.matrix == "full" else -2 * diagonal
    t = {k: v if v is None or v.dtype == torch.bool else v.to(case.dtype) for k, v in t.items()}
    if case.op == "mean_field_backward" and case.keep:
        t["saved"] = mean_field_reference(replace(case, op="mean_field"), t)[1].to(case.dtype).contiguous()
    return t


def mean_field_arguments(case: Case, t: dict[str, Tensor | None]) -> tuple:
    count = range(len(case.kernels))
    return (
        double(t["values"]), [double(t[f"features{m}"]) for m in count], [],
        [double(t[f"matrix{m}"]) for m in count], t["mask"], [n for _, n in case.kernels], case.iterations,
    )  # fmt: skip


def mean_field_reference(case: Case, t: dict[str, Tensor | None]) -> list[Tensor | None]:
    energy, saved = dense_crf.dense_crf_mean_field(*mean_field_arguments(case, t), case.keep)
    return [energy, saved if case.keep else None]


def expected(case: Case, t: dict[str, Tensor | None]) -> list[Tensor | None]:
    """The results in the driver's order, in float64; None where one is not asked for."""
    if case.op.startswith("filter"):
        arguments = (double(t["values"]), double(t["features0"]), None, case.kernels[0][1], case.transpose)
        if case.op == "filter":
            return [permutohedral.permutohedral_filter(*arguments)]
        grads = permutohedral.permutohedral_filter_backward(double(t["grad"]), *arguments, True, True)
        return [g if need else None for g, need in zip(grads, case.need, strict=True)]
    if case.op == "mean_field":
        return mean_field_reference(case, t)
    saved = double(t["saved"]) if case.keep else torch.empty(0, dtype=torch.float64)
    unary, features, matrices = dense_crf.dense_crf_mean_field_backward(
        double(t["grad"]), saved, *mean_field_arguments(case, t), True, True
    )
    results: list[Tensor | None] = [unary]
    for pair in zip(features, matrices, strict=True):
        results += [g if need else None for g, need in zip(pair, case.need, strict=True)]
    return results


def shapes(case: Case) -> list[tuple[int, ...]]:
    values = (case.batch, case.channels, case.points)
    features = [(case.batch, d, case.points) for d, _ in case.kernels]
    row = (case.channels + 7) // 8 * 8
    return {
        "filter": [values],
        "filter_backward": [values, features[0] if features else ()],
        "mean_field": [values, (case.iterations, case.batch, case.points, row)],
        "mean_field_backward": [values, *(s for f in features for s in (f, (case.channels, case.channels)))],
    }[case.op]


def encode(case: Case) -> bytes:
    t = inputs(case)
    count = len(case.kernels)
    padding = [0] * (6 - count)
    need = (case.keep, False) if case.op == "mean_field" else case.need
    header = struct.pack(
        "<22q", OPERATORS.index(case.op), case.dtype == torch.float64, case.batch, case.channels, case.points,
        case.iterations, case.transpose, *need, count,
        *[d for d, _ in case.kernels], *padding, *[n for _, n in case.kernels], *padding,
    )  # fmt: skip
    names = ["values", "grad"]
    names += ["features0"] if case.op.startswith("filter") else ["mask", "saved"]
    if not case.op.startswith("filter"):
        names += [f"{name}{m}" for m in range(count) for name in ("features", "matrix")]
    return header + b"".join(_emulator.encoded(t[name]) for name in names)


class Run(_emulator.Run):
    def __init__(
        self, driver: Path, cases: list[Case], folder: Path, order: str, seed: int = 0, dropped: str = ""
    ) -> None:
        super().__init__(driver, map(encode, cases), folder, order, seed, dropped)
        self.results: dict[Case, list[Tensor | None]] = {}
        if self.error:
            return
        offset = 0
        for case in cases:
            results: list[Tensor | None] = []
            for shape in shapes(case):
                result, offset = _emulator.decoded(memoryview(self.data), offset, shape, case.dtype)
                results.append(result)
            self.results[case] = results
        assert offset == len(self.data)


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for dtype in (torch.float32, torch.float64):
        for normalization in (NONE, BEFORE, AFTER, SYMMETRIC):
            for transpose in (False, True):
                base = Case("filter", dtype, 2, kernels=((3, normalization),), transpose=transpose)
                cases += [base, replace(base, op="filter_backward")]
        for d in (1, 2, 4, 5, 6, 9, 16):
            # More dimensions, further apart: the points must share vertices.
            base = Case("filter_backward", dtype, points=65, kernels=((d, SYMMETRIC),), spread=1.5 / d)
            cases += [base, replace(base, op="filter", channels=33)]
    shape_cases = [
        Case("filter", points=1),
        Case("filter", channels=1, batch=3, points=33, kernels=((2, AFTER),)),
        Case("filter", channels=8, points=5),
        Case("filter", channels=127, points=40, kernels=((2, NONE),)),
        Case("filter", channels=600, points=9, kernels=((2, NONE),)),  # more packs than a block has threads
        Case("filter", points=1500, kernels=((2, SYMMETRIC),)),
        Case("filter", spread=0.0, points=700, kernels=((2, SYMMETRIC),), offset=0.37),  # all points in one simplex
        Case("filter", spread=0.05, points=900, kernels=((3, BEFORE),)),  # lists over many chunks
        Case("filter", spread=40.0, points=200, kernels=((3, SYMMETRIC),)),  # no vertex in common
        # Coordinates beyond 16 bits; only whole numbers stay exact there.
        Case("filter", torch.float64, spread=1.0, offset=5e4, points=200, kernels=((3, SYMMETRIC),)),
        Case("filter", torch.float64, spread=3e4, points=100, kernels=((5, NONE),)),
        Case("filter", batch=0),
        Case("filter", points=0),
        Case("filter", channels=0, points=7),
        Case("filter_backward", need=(True, False)),
        Case("filter_backward", need=(False, True)),
        Case("filter_backward", torch.float64, points=400, spread=0.1, kernels=((2, SYMMETRIC),)),
        Case("filter_backward", channels=0, points=7),
        Case("filter_backward", points=0),
    ]
    cases += shape_cases
    image = ((5, SYMMETRIC), (2, SYMMETRIC))
    for op in ("mean_field", "mean_field_backward"):
        for dtype in (torch.float32, torch.float64):
            cases += [
                Case(op, dtype, 2, kernels=image),
                Case(op, dtype, kernels=image, matrix="potts", channels=21, points=33),
                Case(op, dtype, kernels=((3, BEFORE), (2, AFTER), (1, NONE)), matrix="diagonal", masked=True),
                Case(op, dtype, 2, kernels=((2, AFTER), (2, SYMMETRIC)), masked=True, channels=9, points=65),
                # More kernels than a step takes.
                Case(op, dtype, kernels=tuple((d, n % 4) for n, d in enumerate((2, 3, 1, 2, 5, 2))), points=40),
            ]
        cases += [
            Case(op, kernels=image, keep=False),
            Case(op, kernels=tuple((2, n % 4) for n in range(5)), points=33, keep=False),
            Case(op, kernels=image, channels=1, points=9),
            Case(op, kernels=((2, SYMMETRIC),), channels=40, points=70),  # several tiles of labels
            Case(op, kernels=((2, SYMMETRIC),), channels=150, points=5, matrix="potts"),
            Case(op, kernels=((2, SYMMETRIC),), iterations=0),
            Case(op, kernels=(), iterations=2),
            Case(op, kernels=image, points=0, keep=False),
            Case(op, kernels=image, batch=0, keep=False),
            Case(op, kernels=((2, SYMMETRIC),), points=1),
        ]
    cases += [
        Case("mean_field_backward", kernels=image, need=need) for need in ((True, False), (False, True), (False, False))
    ]
    unique = list(dict.fromkeys(cases))
    assert len({c.name for c in unique}) == len(unique)
    return unique


CASES = all_cases()
BAD_POINT = [
    Case("filter", points=40, kernels=((3, SYMMETRIC),), bad_point=True),
    Case("filter_backward", points=40, kernels=((5, AFTER),), bad_point=True),
    Case("mean_field", points=40, kernels=((2, SYMMETRIC),), bad_point=True, iterations=1),
]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stems = ("permutohedral", "permutohedral_build", "dense_crf", "sort")
    kernels = [_emulator.CSRC / "cuda" / f"{stem}.cu" for stem in stems]
    return _emulator.build(tmp_path_factory, "crf_driver.cpp", kernels)


@pytest.fixture(scope="session")
def forward_run(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(driver, CASES, tmp_path_factory.mktemp("forward"), "forward")


def test_sanitizers_find_nothing(forward_run: Run) -> None:
    assert not forward_run.error, forward_run.error


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_agrees_with_reference(case: Case, forward_run: Run) -> None:
    if forward_run.error:
        pytest.skip("the run failed")
    for i, (result, wanted) in enumerate(zip(forward_run.results[case], expected(case, inputs(case)), strict=True)):
        if wanted is None:
            assert result is None
            continue
        assert result is not None
        assert result.shape == wanted.shape, f"result {i}"
        if wanted.numel() == 0:
            continue
        assert not result.isnan().any(), f"result {i}"
        error = (result.double() - wanted).abs().max().item()
        assert error <= TOLERANCE[case.dtype] * max(wanted.abs().max().item(), 1e-2), f"result {i}"


@pytest.mark.parametrize(("order", "seed"), [("reverse", 0), ("random", 1)])
def test_every_schedule_gives_the_same_bits(
    order: str, seed: int, driver: Path, forward_run: Run, tmp_path: Path
) -> None:
    run = Run(driver, CASES, tmp_path, order, seed)
    assert not run.error, run.error
    assert run.data == forward_run.data


def test_a_point_without_finite_features_harms_no_other(driver: Path, tmp_path: Path) -> None:
    run = Run(driver, BAD_POINT, tmp_path, "forward")
    assert not run.error, run.error
    for case in BAD_POINT:
        t, bad = inputs(case), case.points // 2
        keep = [n for n in range(case.points) if n != bad]
        without = {k: v[..., keep] if v is not None and v.shape[-1] == case.points else v for k, v in t.items()}
        for result, wanted in zip(run.results[case], expected(case, without), strict=True):
            if result is None or result.dim() == 4:
                continue
            assert result[..., bad].isnan().all()
            torch.testing.assert_close(result[..., keep].double(), wanted, rtol=1e-3, atol=1e-4)


def test_every_barrier_is_needed(driver: Path, forward_run: Run, tmp_path: Path) -> None:
    few = [
        Case("filter", points=2500, channels=40, kernels=((2, SYMMETRIC),)),
        Case("mean_field_backward", kernels=((2, SYMMETRIC), (3, AFTER)), points=127, channels=9),
        Case("mean_field", kernels=((2, SYMMETRIC), (1, AFTER)), points=127, channels=21),
    ]
    _emulator.assert_barriers_needed(partial(Run, driver, few, tmp_path), forward_run.barriers)
