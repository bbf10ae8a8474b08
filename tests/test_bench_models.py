"""The benchmark of whole networks: PyTorch's side is the same network, without an operator of ours; its bars."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_models  # noqa: E402
import measure  # noqa: E402

from deeplab_kernels import models  # noqa: E402
from deeplab_kernels.nn import AtrousSeparableConv2d  # noqa: E402

NO_DECODER = bench_models.replace(bench_models.QUICK[0], decoder=False, separable=False)


@pytest.mark.parametrize("case", [*bench_models.QUICK, NO_DECODER], ids=lambda case: case.key)
def test_the_plain_network_is_the_same_network(case: bench_models.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_models.check(case) < 1e-9
    plain = bench_models.build(case, bench_models.EAGER)
    assert not any(isinstance(m, AtrousSeparableConv2d) for m in plain.modules())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    assert (norms > 0) == (case.mode == "training")
    if case.mode == "training":
        return
    monkeypatch.setattr(bench_models, "fold", lambda model: model.apply(shift_bias))
    with pytest.raises(measure.CheckFailed, match="differs from the plain network"):
        bench_models.check(case)


def test_the_plain_network_must_not_call_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    training = next(case for case in bench_models.QUICK if case.mode == "training")
    monkeypatch.setattr(bench_models, "PlainConvNormAct", bench_models.ConvNormAct)
    with pytest.raises(measure.CheckFailed, match=r"calls deeplab_kernels\.batch_norm_act"):
        bench_models.check(training)


def test_table_5_is_measured_in_all_its_rows() -> None:
    cases = [case for case in (*bench_models.CASES, *bench_models.TABLE_5) if case.mode == "inference"]
    rows = {
        (row["eval_output_stride"], row["decoder"], row["separable"]) for row in models.paper_table(multi_scale=False)
    }
    assert {(case.output_stride, case.decoder, case.separable) for case in cases} == rows
    assert len({case.key for case in cases}) == len({case.name for case in cases}) == len(rows) == 6
    assert cases[2].key == "inference16-no-decoder-no-SC"
    assert "output stride 16, no decoder, no SC, 513 x 513" in cases[2].name


def shift_bias(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.BatchNorm2d):
        torch.nn.init.constant_(module.bias, 1e-3)


def test_bars_of_whole_networks() -> None:
    def timing(milliseconds: float) -> dict[str, float]:
        return {"median_ms": milliseconds, "min_ms": milliseconds, "iqr_ms": 0.1 * milliseconds, "rounds": 3}

    timings = {
        "ours nchw": timing(300),
        "ours nhwc": timing(200),
        "eager nchw": timing(500),
        "compiled nhwc": timing(390),
    }
    case = bench_models.CASES[1]
    record = {
        "name": case.name,
        "mode": case.mode,
        "case": {"model": case.model, "output_stride": case.output_stride},
        "madds": 50e9,
        "floor_ms": 100.0,
        "timings": timings,
        "peak_bytes": {"ours": 3e8, "eager": 2e8},
    }
    assert bench_models.failures(record) == [
        "ratio 1.95 < 2 (issue 4)",
        "ratio 1.95 < 2.5 (issue 5)",
        "memory of eager's 1.50 > 1 (issue 4)",
    ]
    row = bench_models.row(record)
    assert (row["ours NHWC"], row["eager NCHW"], row["ratio"], row["of ceiling"]) == ("200", "500", "1.95", "50%")
    timings["compiled nhwc"] = timing(510)
    record["peak_bytes"]["ours"] = 2e8
    assert bench_models.row(record)["bars"] == "met"
