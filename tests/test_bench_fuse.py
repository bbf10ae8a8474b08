"""The benchmark of where fused convolutions are the faster choice: what runs, and what it says; no speed is tested."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bench_fuse
import measure

OPTIONS = ["--threads", "1", "--cpu-time", "--rounds", "1", "--quick", "--kernels", "3", "--rates", "2"]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("alone", [False, True])
def test_both_ways_are_timed(alone: bool, layout: str) -> None:
    args = bench_fuse.parse(OPTIONS)
    results = []
    for mode in bench_fuse.MODES:
        case = bench_fuse.Case(3, 1, 2, alone, layout, mode, 8, 20)
        results.append(bench_fuse.measure_case(case, args))
        assert results[-1].ratio > 0
    assert results[1].fused  # gradients always are
    lines = bench_fuse.table(results).splitlines()
    assert [line.count("|") for line in lines] == [8] * 4


def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fuse, "fuse", lambda model, always: model[0].weight.data.mul_(1.01))
    with pytest.raises(measure.CheckFailed, match="fused differs from plain"):
        bench_fuse.measure_case(bench_fuse.Case(3, 1, 1, True, "nchw", "inference", 8, 7), bench_fuse.parse(OPTIONS))


def test_what_the_rule_loses() -> None:
    case = bench_fuse.Case(3, 1, 1, False, "nchw", "inference", 32, 7)
    results = [bench_fuse.Result(case, ratio, fused) for ratio, fused in ((0.5, True), (2.0, True), (1.5, False))]
    assert [result.loss for result in results] == [2.0, 0.5, 1.5]
    text = bench_fuse.summary(results)
    assert text.startswith("2 of 3 cases slower")
    assert text.splitlines()[1].endswith("fused, x 2.00")
    assert text.splitlines()[2].endswith("as it was, x 1.50")
    sizes = {case.size for case in bench_fuse.cases(bench_fuse.parse(OPTIONS))}
    assert sizes < set(bench_fuse.MAPS)
