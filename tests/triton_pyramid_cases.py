"""The Triton kernels of the atrous spatial pyramid against float64. Collected by
test_triton_atrous_spatial_pyramid.py in a process of its own; see triton_cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _cases import LAYOUTS
from _pyramid import RawPyramid
from torch import Tensor
from triton_cases import DEVICE, _fast_interpreter, assert_exact, assert_layout  # noqa: F401 (a fixture)

from deeplab_kernels import reference
from deeplab_kernels.triton import _tiling
from deeplab_kernels.triton import atrous_spatial_pyramid as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    rates: tuple[int, ...] = (1, 1, 2, 2)  # vertical, horizontal; for each branch
    kernel: tuple[int, int] = (3, 3)


CASES = {
    "two rates": Case((2, 3, 5, 6)),
    "one pixel": Case((1, 1, 1, 1)),
    "phases": Case((1, 9, 9, 7), (2, 2, 4, 4, 6, 6)),
    "rates beyond the image": Case((1, 3, 5, 5), (1, 1, 40, 40)),
    "rates of each axis": Case((1, 5, 7, 6), (2, 3, 4, 1)),
    "even kernel": Case((1, 3, 5, 6), kernel=(2, 4)),
    "more taps than are unrolled": Case((1, 2, 5, 6), (1, 1, 2, 1), (5, 3)),
    "one branch": Case((1, 17, 3, 5), (1, 1)),
}


def results(name: str, problem: RawPyramid, operators: Any = kernels) -> list[Tensor]:
    """Everything that an operator returns, flat."""
    found: list[Tensor] = []
    for part in getattr(operators, name)(*problem.arguments(name)):
        found += [part] if isinstance(part, Tensor) else part
    return found


def check(case: Case, dtype: torch.dtype, layout: str, **changes: Any) -> None:
    for name in RawPyramid.OPERATORS:
        problem = RawPyramid(case.size, case.rates, case.kernel, dtype, layout, DEVICE, **changes)
        ours, plain = results(name, problem), results(name, problem, reference)
        exact = results(name, problem.double(), reference)
        assert len(ours) == len(plain)
        for k, (got, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
            if true.numel():
                assert_exact(got, theirs, true, f"{name} {k}", dtype)
            assert got.shape == true.shape
            if got.shape == problem.x.shape:
                assert_layout(got, problem.x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case, layout):
    check(CASES[case], torch.float32, layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout, dtype):
    check(Case((1, 11, 5, 6), (2, 2, 4, 4)), dtype, layout)


@pytest.mark.parametrize("changes", [{"norm": False}, {"affine": False, "pool": False}, {"keep_conv": False}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_optional(layout, changes):
    check(CASES["two rates"], torch.float32, layout, **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unneeded_gradients_are_empty(layout):
    problem = RawPyramid((1, 3, 5, 6), (1, 1, 2, 2), (3, 3), torch.float32, layout, DEVICE)
    name = "atrous_spatial_pyramid_backward"
    full = results(name, problem)
    for need in ((True, False), (False, True), (False, False)):
        some = getattr(kernels, name)(*problem.arguments(name)[:-2], *need)
        for wanted, result, needed in zip(full, some, (*need, True, True), strict=True):
            assert torch.equal(result, wanted) if needed else result.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_and_other_cuts(layout, monkeypatch):
    """64-bit offsets give the bits of 32-bit ones; programs that take several tiles, the same sums in another cut."""
    problem = RawPyramid((2, 3, 6, 5), (2, 2), (3, 3), torch.float32, layout, DEVICE)
    before = {name: results(name, problem) for name in RawPyramid.OPERATORS}
    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    for name, wanted in before.items():
        assert all(map(torch.equal, results(name, problem), wanted))
    monkeypatch.setattr(_tiling, "_ENOUGH_PROGRAMS", 1)
    for name, wanted in before.items():
        for got, again in zip(results(name, problem), wanted, strict=True):
            torch.testing.assert_close(got, again, rtol=1e-4, atol=1e-5)


def test_strided_tensors_are_copied():
    problem = RawPyramid((1, 3, 7, 7), (1, 1, 2, 2), (3, 3), torch.float32, "nhwc", DEVICE)
    problem.grads = [g.contiguous() for g in problem.grads]
    problem.conv = [y.contiguous() for y in problem.conv]
    for name in RawPyramid.OPERATORS:
        for got, wanted in zip(results(name, problem), results(name, problem, reference), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "dtype"), [((1, 3, 5, 5), torch.float64), ((0, 3, 5, 5), torch.float32), ((2, 0, 5, 5), torch.float32)],
    ids=str,
)  # fmt: skip
def test_the_reference_serves_the_rest(size, dtype):
    problem = RawPyramid(size, (1, 1, 2, 2), (3, 3), dtype, "nchw", DEVICE)
    for name in RawPyramid.OPERATORS:
        for got, wanted in zip(results(name, problem), results(name, problem, reference), strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True)


def test_integers_are_refused():
    problem = RawPyramid((1, 3, 5, 5), (1, 1), (3, 3), torch.float32, "nchw", DEVICE)
    problem.x = problem.x.int()
    with pytest.raises(TypeError, match="x must be float32, float16, bfloat16 or float64"):
        kernels.atrous_spatial_pyramid(*problem.arguments("atrous_spatial_pyramid"))
