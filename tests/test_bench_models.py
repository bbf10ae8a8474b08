"""The benchmark of whole networks: its bars."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_models  # noqa: E402


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
