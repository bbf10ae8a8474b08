"""Results of bench_contenders as rows, bars, Markdown and pytest-benchmark's JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _bench_results import contenders, full_timing, separable, write
from _html_page import check_self_contained

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bars  # noqa: E402
from suite import exports, kinds, page, stored  # noqa: E402


def test_product_as_rows_with_reasons(tmp_path: Path) -> None:
    document = contenders(ours__nhwc=1.0, eager__nhwc=4.0, native__nchw=2.0, copy__nhwc=0.5, dtype="bf16")
    document["records"][0]["with_gaps"] = {"ours nhwc": full_timing(1.5)}
    results = stored.read(write(tmp_path, contenders=document))
    found = {row.contender: row for row in results.rows}
    ours = found["ours nhwc"]
    assert (ours.subject, ours.rival, ours.ratio) == (kinds.TITLES["separable"], "native nchw", 2.0)
    assert (ours.with_gaps_ms, ours.peak_bytes, ours.full_precision) == (1.5, 5 * 10**6, False)
    assert ours.matrix_share == pytest.approx(2.0)  # 2000 GFLOP/s against bf16's 1000
    assert (found["copy nhwc"].madds, found["copy nhwc"].ratio) == (0, None)
    assert [(u.contender, u.reason) for u in results.unavailable] == [
        ("max-autotune nhwc", "no <compiler>"),
        ("tf32", "CUDA only"),
    ]
    text = page.render(results)
    parsed = check_self_contained(text)
    assert "no &lt;compiler&gt;" in text
    assert any("with launch gaps, ms" in line for table in parsed.tables for line in table)
    assert "728x33-&gt;728/N1 fp16, training" in text


def test_same_demand_of_two_issues_stands_twice(tmp_path: Path) -> None:
    times = {"ours__nhwc": 10.0, "eager__nhwc": 16.0}
    what = "deeplabv3plus_xception65, output stride 16"
    results = stored.read(write(tmp_path, contenders=contenders(subject="models", what=what, **times)))
    found = {(v.demand.source, v.demand.limit): v.text for v in results.verdicts if v.measured}
    assert found == {("issue 4", 1.5): "met", ("issue 5", 1.7): "missed"}
    assert [(m.source, m.what) for m in results.missed] == [("issue 5", "best layout: ratio 1.60 < 1.7")]
    assert sum(v.text == "not measured" for v in results.verdicts) == len(bars.DEMANDS) - 2


@pytest.mark.parametrize(
    ("device", "subject", "what", "dtype", "expected"),
    [
        ("cpu", "separable", "A12:2048x33r12->relu->256", "fp32", {"block, ASPP": 2.0}),
        ("cpu", "separable", "728x33->728", "fp32", {"block": 2.0}),
        ("cpu", "separable", "728x33->728", "bf16", {}),
        ("cpu", "aspp", "2048x33 rates 6,12,18", "fp32", {"aspp": 2.0}),
        ("cpu", "depthwise", "A12:2048x33r12", "fp32", {"depthwise, rate >= 6": 2.0}),
        ("cpu", "models", "deeplabv3plus_xception65, output stride 8, no SC", "fp32", {}),
        ("cuda", "depthwise", "728x33", "bf16", {"gpu depthwise": 2.0}),
        ("cuda", "depthwise", "728x65r2", "bf16", {"gpu depthwise, rate >= 2": 2.0}),
        ("cuda", "separable", "728x33->728", "fp16", {"gpu block": 2.0}),
        ("cuda", "models", "deeplabv3plus_xception65, output stride 16", "bf16", {"gpu network": 3.0}),
        ("cuda", "models", "deeplabv3plus_xception65, output stride 16", "fp32", {}),
    ],
)
def test_bars_of_the_product(device: str, subject: str, what: str, dtype: str, expected: dict[str, float]) -> None:
    times = {"ours__nhwc": 1.0, "eager__nhwc": 2.0, "max_autotune__nhwc": 3.0, "copy__nhwc": 0.1}
    document = contenders(device, subject, what, dtype, **times)
    found = bars.contenders(document["records"][0], document["machine"])
    assert {bar.demand: pytest.approx(bar.value) for bar in found} == expected


def test_large_gpu_tensors_are_held_to_the_copy_bandwidth() -> None:
    document = contenders("cuda", "depthwise", "A24:2048x65r24", "bf16", ours__nhwc=10.0, eager__nhwc=40.0)
    document["records"][0]["bytes"] = 2 * 70 * 10**6
    found = {b.demand: b.value for b in bars.contenders(document["records"][0], {"copy_gb_per_s": 20.0})}
    assert found == {"gpu depthwise, rate >= 2": 4.0, "gpu bandwidth": pytest.approx(0.7)}


def test_pytest_benchmark_reads_the_export(tmp_path: Path) -> None:
    old = {**separable(whole__nhwc=2.0, eager__nhwc=5.0)}  # without all statistics: left out
    results = stored.read(write(tmp_path, contenders=contenders(ours__nhwc=1.0, eager__nhwc=4.0), atrous_separable=old))
    file = tmp_path / "export.json"
    file.write_text(json.dumps(exports.pytest_benchmark(results)))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--columns=median,iqr,rounds"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2048x33r12->relu->256/N8 fp32, inference") >= 2
    [ours, eager] = json.loads(file.read_text())["benchmarks"]
    assert ours["stats"]["median"] == pytest.approx(1e-3)
    assert eager["stats"]["iqr"] == pytest.approx(0.6e-3)
    assert ours["extra_info"]["ratio"] == pytest.approx(4.0)


def test_markdown_has_every_row(tmp_path: Path) -> None:
    document = contenders(ours__nhwc=1.0, eager__nhwc=4.0)
    document["records"][0]["unavailable"] = {"compile nhwc": "a|b\nc"}
    text = exports.markdown(stored.read(write(tmp_path, contenders=document)))
    line = next(line for line in text.splitlines() if "| ours nhwc |" in line)
    assert "| 4.00 |" in line
    assert "| 1000.0 | 10.0 | 50% | 2000% | 5 |" in line  # millions, MB, shares, MB
    assert "a/b c" in text
    assert "| issue 5 | CPU |" in text
