"""The CUDA sources of the atrous spatial pyramid, compiled for the CPU with csrc/emulator and run under
AddressSanitizer and UBSan, against the float64 reference, in several schedules."""

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

OPERATORS = ("forward", "training", "backward")
MOST_BRANCHES = 10  # of the driver
EPS = 1e-3


def _text(field: str, value: Any) -> str:
    return str(value).replace(" ", "").replace("),(", "_")


@dataclass(frozen=True)
class Case:
    """One call. x is (n, c, h, w)."""

    op: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    n: int = 2
    c: int = 8
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    rates: tuple[tuple[int, int], ...] = ((2, 2), (4, 4), (6, 6))
    activation: int = 1
    norm: bool = True
    affine: bool = True
    batch_statistics: bool = True
    pool: bool = True
    keep_conv: bool = True  # training: return conv_r(x); backward: have them given
    need: tuple[bool, bool] = (True, True)
    misalign: int = 0  # elements by which every tensor is off a 16-byte boundary

    @property
    def name(self) -> str:
        return _emulator.case_name(self, Case("forward"), 3, _text)

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dilation(self) -> list[int]:
        return [rate for pair in self.rates for rate in pair]


def inputs(case: Case) -> dict[str, Tensor | None]:
    g = _emulator.generator(case.name)
    branches, image = len(case.rates), (case.n, case.c, *case.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t: dict[str, Tensor | None] = dict.fromkeys(("gamma", "beta", "mean", "var", "grad_pooled"))
    # Channel means are large beside the deviations, so that unsound variances show.
    t["x"] = (normal(*image) + 3 * normal(1, case.c, 1, 1)).to(case.dtype)
    t["weight"] = normal(branches, case.c, 1, *case.kernel).div(3).to(case.dtype)
    if case.norm and case.affine:
        t["gamma"], t["beta"] = ((normal(branches, case.c) + s).to(case.acc) for s in (1.5, 0))
    conv, _ = reference.atrous_spatial_pyramid(
        double(t["x"]), double(t["weight"]), *[None] * 4, 0.0, 0, case.dilation, False
    )
    if case.norm and case.op != "training":
        empty = case.n == 0
        t["mean"] = torch.stack([torch.zeros(case.c) if empty else y.mean((0, 2, 3)) for y in conv]).to(case.acc)
        var = [torch.ones(case.c) if empty else y.var((0, 2, 3), correction=0) + 0.01 for y in conv]
        t["var"] = torch.stack(var).to(case.acc)
    if case.op == "backward":
        t["grad_pooled"] = normal(case.n, case.c, 1, 1).mul(30).to(case.dtype) if case.pool else None
        for r, y in enumerate(conv):
            t[f"grad{r}"] = normal(*image).to(case.dtype)
            t[f"conv{r}"] = y.to(case.dtype)
    return t


def expected(case: Case, t: dict[str, Tensor | None]) -> list[Tensor | None]:
    """The results in the driver's order, in float64; None where one is not asked for."""
    x, weight, gamma, beta, mean, var = (double(t[k]) for k in ("x", "weight", "gamma", "beta", "mean", "var"))
    settings = (EPS, case.activation if case.norm else 0)
    if case.op == "forward":
        out, pooled = reference.atrous_spatial_pyramid(
            x, weight, gamma, beta, mean, var, *settings, case.dilation, case.pool
        )
        return [*out, pooled if case.pool else None]
    if case.op == "training":
        out, conv, mean, var, pooled = reference.atrous_spatial_pyramid_training(
            x, weight, gamma, beta, *settings, case.dilation, case.pool, True
        )
        return [*out, *(y if case.keep_conv else None for y in conv), mean, var, pooled if case.pool else None]
    rows = range(len(case.rates))
    grads = reference.atrous_spatial_pyramid_backward(
        [double(t[f"grad{r}"]) for r in rows], double(t["grad_pooled"]), x, weight,
        [double(t[f"conv{r}"]) for r in rows], gamma, beta, mean, var, *settings, case.batch_statistics,
        case.dilation, True, True,
    )  # fmt: skip
    return [g if need else None for g, need in zip(grads, (*case.need, case.norm, case.norm), strict=True)]


def encode(case: Case) -> bytes:
    t = inputs(case)
    branches = len(case.rates)
    header = struct.pack(
        f"<{11 + 2 * MOST_BRANCHES + 6}qd",
        OPERATORS.index(case.op), DTYPES[case.dtype], case.misalign, case.n, case.c, *case.size, *case.kernel,
        case.channels_last, branches, *case.dilation, *[0] * (2 * (MOST_BRANCHES - branches)),
        case.activation if case.norm else 0, case.batch_statistics, case.pool, case.keep_conv, *case.need, EPS,
    )  # fmt: skip
    names = ["x", "weight", "gamma", "beta", "mean", "var"]
    if case.op == "backward":
        names += ["grad_pooled", *(f"{k}{r}" for k in ("grad", "conv") for r in range(branches))]
    left_out = () if case.keep_conv else tuple(f"conv{r}" for r in range(branches))
    return header + b"".join(
        _emulator.encoded(None if name in left_out else t[name], case.channels_last) for name in names
    )


def shapes(case: Case) -> list[tuple[tuple[int, ...], torch.dtype]]:
    branches = len(case.rates)
    images = [((case.n, case.c, *case.size), case.dtype)] * branches
    vectors = [((branches, case.c), case.acc)] * 2
    pooled = ((case.n, case.c, 1, 1), case.dtype)
    weight = ((branches, case.c, 1, *case.kernel), case.dtype)
    return {
        "forward": [*images, pooled],
        "training": [*images, *images, *vectors, pooled],
        "backward": [images[0], weight, *vectors],
    }[case.op]


class Run(_emulator.Run):
    """Results of the driver over many cases."""

    def __init__(
        self, driver: Path, cases: list[Case], folder: Path, order: str, seed: int = 0, dropped: str = ""
    ) -> None:
        super().__init__(driver, map(encode, cases), folder, order, seed, dropped)
        self.results: dict[Case, list[Tensor | None]] = {}
        offset, data = 0, memoryview(self.data)
        for case in [] if self.error else cases:
            self.results[case] = []
            for shape, dtype in shapes(case):
                result, offset = _emulator.decoded(data, offset, shape, dtype, case.channels_last)
                self.results[case].append(result)
        assert self.error or offset == len(self.data)


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for last in (False, True):
        base = Case("forward", channels_last=last)
        geometries = [replace(base, dtype=dtype, c=16) for dtype in DTYPES]
        geometries += [
            replace(base, n=1, c=4, size=(33, 33), rates=((6, 6), (12, 12), (18, 18))),
            replace(base, n=1, c=40, size=(5, 33), rates=((1, 1),)),
            replace(base, n=3, c=5, size=(5, 1), rates=((1, 1), (9, 9))),  # a rate that leaves the image
            replace(base, n=1, size=(7, 9), rates=((40, 1), (1, 50))),
            replace(base, n=1, size=(9, 8), rates=((2, 3), (6, 1), (4, 12), (2, 2))),
            replace(base, n=1, c=4, size=(60, 61), rates=((1, 1), (2, 2))),  # too large a slab for shared memory
            replace(base, n=1, c=1, size=(1, 4200), rates=((1, 1), (2, 2))),  # rows too long for it, backward
            replace(base, c=6, kernel=(5, 3), rates=((1, 2), (3, 1))),
            replace(base, c=4, kernel=(2, 4), rates=((1, 1), (3, 2))),  # odd padding
            replace(
                base, c=4, n=1, size=(5, 6), rates=tuple((k, k) for k in range(1, 11))
            ),  # more branches than one launch takes
            replace(base, size=(1, 1)),
            replace(base, misalign=1),
            replace(base, dtype=torch.bfloat16, misalign=3, size=(5, 9)),
            replace(base, n=0),
        ]
        if not last:
            geometries.append(replace(base, n=1, c=1, size=(190, 66), rates=((3, 2), (6, 9))))  # bands of a plane
        for geometry, op in itertools.product(geometries, OPERATORS):
            cases.append(replace(geometry, op=op))
        for op in ("forward", "backward"):
            cases += [
                replace(base, op=op, norm=False, dtype=dtype, misalign=misalign)
                for dtype, misalign in ((torch.float32, 0), (torch.float16, 0), (torch.float32, 1))
            ]
        for op, dtype in itertools.product(OPERATORS, (torch.float32, torch.bfloat16)):
            cases.append(replace(base, op=op, dtype=dtype, activation=2, affine=False, pool=False))
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(replace(base, op="training", dtype=dtype, keep_conv=False))
            cases.append(replace(base, op="backward", dtype=dtype, keep_conv=False, batch_statistics=False))
        for need, norm in itertools.product(((True, False), (False, True), (False, False)), (True, False)):
            cases.append(replace(base, op="backward", need=need, norm=norm))
        cases.append(replace(base, op="backward", need=(True, False), misalign=1))
    unique = list(dict.fromkeys(cases))
    assert len({c.name for c in unique}) == len(unique)
    return unique


CASES = all_cases()


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cuda = _emulator.CSRC / "cuda"
    kernels = sorted([*cuda.glob("atrous_spatial_pyramid*.cu"), *cuda.glob("atrous_depthwise_*.cu")])
    return _emulator.build(tmp_path_factory, "pyramid_driver.cpp", kernels)


@pytest.fixture(scope="session")
def forward_run(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(driver, CASES, tmp_path_factory.mktemp("forward"), "forward")


def test_sanitizers_find_nothing(forward_run: Run) -> None:
    assert not forward_run.error, forward_run.error


def test_agrees_with_reference(forward_run: Run) -> None:
    assert not forward_run.error
    wrong = []
    for case, results in forward_run.results.items():
        try:
            _emulator.assert_close(results, expected(case, inputs(case)), TOLERANCE[case.dtype])
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("order", "seed"), [("reverse", 0), ("random", 1)])
def test_every_schedule_gives_the_same_bits(
    order: str, seed: int, driver: Path, forward_run: Run, tmp_path: Path
) -> None:
    some = [case for case in CASES if case.n][seed::2]
    run = Run(driver, some, tmp_path, order, seed)
    assert not run.error, run.error
    for case in some:
        for result, wanted in zip(run.results[case], forward_run.results[case], strict=True):
            assert result is wanted is None or torch.equal(result, wanted), case.name


def test_every_barrier_is_needed(driver: Path, forward_run: Run, tmp_path: Path) -> None:
    """Removing any one of the pyramid's own barriers changes a result (test_emulator.py removes those of the parts that
    it shares)."""
    own = [barrier for barrier in forward_run.barriers if barrier.startswith("atrous_spatial_pyramid")]
    assert len(own) >= 8
    few = [c for c in CASES if c.n and c.dtype == torch.float32 and not c.misalign and c.kernel == (3, 3)]
    few = [c for c in few if c.size == (9, 7) and len(c.rates) == 3 and c.norm and c.affine and c.batch_statistics]
    few = [c for c in few if c.need == (True, True) or (c.op == "backward" and c.need[0])]
    _emulator.assert_barriers_needed(partial(Run, driver, few, tmp_path), own)
