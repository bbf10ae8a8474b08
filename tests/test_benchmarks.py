"""The benchmarks time the right layers, refuse wrong results and judge by the right arithmetic; no speed is tested."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bars  # noqa: E402
import bench_atrous_depthwise as bench  # noqa: E402
import bench_atrous_separable as separable  # noqa: E402
import bench_dense_crf_layer  # noqa: E402
import builds  # noqa: E402
import depthwise  # noqa: E402
import layers  # noqa: E402
import measure  # noqa: E402
import overhead  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402

from deeplab_kernels import models  # noqa: E402
from deeplab_kernels.timing import interleaved  # noqa: E402

TINY = depthwise.Convolution(batch=2, channels=11, height=9, width=7, rate=2, padding=2)


# Shapes.


@pytest.mark.parametrize("output_stride", [8, 16])
def test_layers_are_those_of_the_built_model(output_stride: int) -> None:
    model = models.build("deeplabv3plus_xception65", output_stride=output_stride, separable=True, device="meta")
    built: Counter[tuple[int, ...]] = Counter()
    for layer in models.madds(model, 513, "true", per_layer=True):
        if layer.groups == layer.output_shape[1] > 1:
            assert layer.kernel == (3, 3)
            assert layer.output_shape[2] == layer.output_shape[3]
            built[layer.groups, layer.output_shape[2], layer.stride[0], layer.rate[0]] += 1
    listed: Counter[tuple[int, ...]] = Counter()
    for layer, count in layers.xception65_layers(output_stride).items():
        listed[layer.channels, layer.out_size, layer.stride, layer.rate] += count
    assert listed == built
    assert sum(built.values()) == 68


def test_shapes_are_distinct_and_hold_every_layer() -> None:
    names = [shape.name for shape in layers.shapes()]
    assert len(names) == len(set(names)) == 2 * len(layers.all_layers())
    assert set(layers.all_layers()) >= {*layers.xception65_layers(8), *layers.xception65_layers(16)}
    assert "A12:2048x33r12/N4" in names


def test_names_of_blocks_are_distinct() -> None:
    blocks = {*layers.xception65_blocks(16), *layers.xception65_blocks(8)}
    assert len({block.name for block in blocks}) == len(blocks)
    chosen = separable.chosen(separable.parse(["--blocks", "A12:2048x33r12->256,256x129->256"]))
    assert [b.name for b in chosen] == ["256x129->256", "256x129->relu->256", "A12:2048x33r12->relu->256"]
    with pytest.raises(SystemExit, match="weather"):
        separable.chosen(separable.parse(["--blocks", "weather"]))


def test_select() -> None:
    assert [s.name for s in bench.select("A6,728x65r2/N4", [1], False)] == ["A6:2048x33r6/N1", "M8:728x65r2/N4"]
    assert len(bench.select(None, [1, 4], False)) == len(layers.shapes())
    assert len(bench.select(None, [1], True)) == len(layers.NAMED)
    with pytest.raises(SystemExit, match="A13"):
        bench.select("A13", [1], False)


def test_sizes_and_floor() -> None:
    conv = depthwise.Convolution(batch=2, channels=3, height=9, width=12, kernel=5, stride=2, rate=2, padding=4)
    y = torch.nn.functional.conv2d(torch.zeros(2, 3, 9, 12), torch.zeros(3, 1, 5, 5), None, 2, 4, 2, 3)
    assert conv.out_size == tuple(y.shape[2:])
    assert conv.output_elements == y.numel()
    # 648 + 180 floats at 1 GB/s take 3312 ns.
    assert conv.floor_ms(1.0) == pytest.approx(3312e-6)
    assert conv.floor_ms(1.0, "training") == pytest.approx((3 * 648 + 2 * 180) * 4e-6)


# Checks.


@pytest.mark.parametrize("layout", measure.LAYOUTS)
@pytest.mark.parametrize(
    "conv",
    [TINY, depthwise.Convolution(1, 5, 8, 33, kernel=5, stride=2, rate=3, padding=7, multiplier=2)],
    ids=["3x3", "5x5 stride 2 multiplier 2"],
)
def test_contenders_agree(conv: depthwise.Convolution, layout: str) -> None:
    inference, training = depthwise.Problem(conv, "inference"), depthwise.Problem(conv, "training")
    with torch.no_grad():
        for name in ("ours", "folded"):
            results = getattr(inference, name)(layout, torch.float32)()
            assert inference.check(name, results, torch.float32) < 1e-5
        # Rounded weights of the folded convolution make PyTorch's bf16 worse than one rounding: only ours is checked.
        half = inference.ours(layout, torch.bfloat16)()
        assert half["out"].dtype == torch.bfloat16
        inference.check("bf16", half, torch.bfloat16)
    for name in ("ours", "eager_step"):
        results = getattr(training, name)(layout, torch.float32)()
        assert set(results) == {"out", "grad_x", "grad_weight", "grad_gamma", "grad_beta"}
        assert training.check(name, results, torch.float32) < 1e-5


@pytest.mark.parametrize("key", ["out", "grad_x", "grad_weight", "grad_gamma", "grad_beta"])
@pytest.mark.parametrize("damage", [1e-3, float("nan")])
def test_check_refuses_a_wrong_result(key: str, damage: float) -> None:
    problem = depthwise.Problem(TINY, "training")
    results = {name: value.detach().clone() for name, value in problem.ours("nchw", torch.float32)().items()}
    problem.check("right", results, torch.float32)
    results[key].view(-1)[-1] += damage * results[key].abs().max()
    with pytest.raises(measure.CheckFailed, match=key):
        problem.check("wrong", results, torch.float32)


def test_measure_refuses_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    right = depthwise.ops.atrous_depthwise_bn_act
    monkeypatch.setattr(
        depthwise.ops, "atrous_depthwise_bn_act", lambda *args, **kwargs: right(*args, **kwargs) * 1.001
    )
    with pytest.raises(measure.CheckFailed, match="out"):
        depthwise.measure_convolution(TINY, "inference", depthwise.Options(compile=False, rounds=1))


def test_kept_for_backward_counts_a_storage_once() -> None:
    conv = depthwise.Convolution(batch=2, channels=8, height=33, width=33)
    kept = depthwise.Problem(conv, "training").kept_for_backward()
    x, vectors = 4 * conv.input_elements, 4 * 8 * 13  # weight: 9 each; gamma, beta, mean, var
    assert x <= kept <= x + 4 * conv.output_elements + vectors


# Bars.


def _record(mode: str = "inference", rate: int = 1, megabytes: float = 10, **medians: float) -> dict[str, Any]:
    """A record with medians given as ours_float32_nchw=1.0."""
    return {
        "name": "made up",
        "mode": mode,
        "convolution": {"rate": rate},
        "input_bytes": megabytes * 1e6,
        "output_bytes": megabytes * 1e6,
        "allocator": "tuned",
        "threads": 4,
        "commit": "0",
        "date": "2000-01-01",
        "timings": {
            key.replace("_", " "): {"median_ms": ms, "min_ms": ms, "iqr_ms": 0.0, "rounds": 1}
            for key, ms in medians.items()
        },
    }


def _verdicts(record: dict[str, Any]) -> dict[str, tuple[float, float, bool]]:
    return {f"{b.layout} {b.name}": (b.value, b.limit, b.passed) for b in bars.bars(record)}


def test_inference_is_compared_with_the_best_of_the_same_layout() -> None:
    medians = {
        "ours_float32_nchw": 2.0,
        "eager_float32_nchw": 5.0,
        "frozen_float32_nchw": 3.0,
        "eager_float32_nhwc": 1.0,
    }
    assert _verdicts(_record(**medians)) == {"nchw speed-up": (1.5, 1, True)}
    assert _verdicts(_record(rate=6, **medians)) == {"nchw speed-up": (1.5, 8, False)}
    assert _verdicts(_record(rate=5, **medians))["nchw speed-up"][2]


def test_training_is_compared_with_the_better_layout() -> None:
    medians = {"ours_float32_nhwc": 2.0, "eager_float32_nchw": 5.0, "eager_float32_nhwc": 30.0}
    assert _verdicts(_record("training", **medians)) == {"nhwc training speed-up": (2.5, 2, True)}
    assert _verdicts(_record("training", rate=2, **medians)) == {"nhwc training speed-up": (2.5, 10, False)}


@pytest.mark.parametrize(
    ("megabytes", "ours", "expected"),
    [
        (10, 3.0, (3.0, 3, True)),
        (10, 3.1, (3.1, 3, False)),
        (50, 9.0, None),  # neither fits a cache of 32 MB nor is large
        (65, 1.5, (1.5, 1.5, True)),
        (65, 1.6, (1.6, 1.5, False)),
    ],
)
def test_time_over_clone(megabytes: float, ours: float, expected: tuple[float, float, bool] | None) -> None:
    record = _record(megabytes=megabytes, ours_float32_nhwc=ours, clone_float32_nhwc=1.0)
    assert _verdicts(record).get("nhwc time / clone") == expected


def test_bf16_and_memory() -> None:
    record = _record(ours_float32_nchw=1.0, ours_bfloat16_nchw=2.1)
    assert _verdicts(record) == {"nchw bf16 / fp32": (2.1, 2, False)}
    record = _record("training", ours_float32_nchw=1.0) | {"kept_bytes": {"nchw": 20.1e6}}
    assert _verdicts(record)["nchw bytes kept / (x + out)"][2]
    record["kept_bytes"] = {"nchw": 20.3e6}
    assert not _verdicts(record)["nchw bytes kept / (x + out)"][2]


def test_report_names_the_worst() -> None:
    good = _record(ours_float32_nchw=1.0, eager_float32_nchw=4.0)
    bad = _record(ours_float32_nchw=1.0, eager_float32_nchw=0.5) | {"name": "a cliff"}
    machine = {"cpu": "made up", "last_level_cache_bytes": 1}
    assert report.summary([good, bad], machine) == ["FAIL inference: speed-up >= 1: 1 of 2, worst 0.50 (a cliff nchw)"]
    page = report.document({"machine": machine, "records": [good, bad]})
    assert "| a cliff | nchw | 1 | 0.5 | eager | 0.50 |" in page
    assert "speed-up 0.50 < 1" in page
    assert "frozen" not in page  # a column without figures


# Runs.


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_measure_a_tiny_shape(mode: str) -> None:
    record = depthwise.measure_convolution(TINY, mode, depthwise.Options(compile=False, rounds=2), "tiny")
    json.dumps(record)
    for layout in measure.LAYOUTS:
        for kind in ("ours", "eager", "clone"):
            assert record["timings"][f"{kind} float32 {layout}"]["median_ms"] > 0
        assert record["relative_error"][f"ours float32 {layout}"] < 1e-5
    table = report.rows([record], {})
    assert [row["layout"] for row in table] == ["nchw", "nhwc"]
    assert all(row["ours"] and row["ratio"] and row["/clone"] for row in table)
    assert "tiny" in report.text(table, report.COLUMNS[mode])


def test_command_writes_and_replaces_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "results.json"
    arguments = ["--shapes", "728x33", "--inference", "--layout", "nchw", "--dtype", "float32", "--no-pytorch"]
    for _ in range(2):
        bench.run(bench.parse([*arguments, "--rounds", "1", "--json", str(path)]))
    records = json.loads(path.read_text())["records"]
    assert [r["name"] for r in records] == ["728x33/N1"]
    assert "728x33/N1" in path.with_suffix(".md").read_text()
    assert "728x33/N1" in capsys.readouterr().out


def test_command_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_atrous_depthwise.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=100)
    assert done.stdout.split() == [shape.name for shape in layers.shapes()]


def test_replayed_clock_gives_the_samples() -> None:
    clock = bench.Replay()
    clock.samples = [0.5, 0.25]
    assert [-clock() + clock(), -clock() + clock()] == [0.5, 0.25]


def test_interleaved_visits() -> None:
    calls: list[str] = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = interleaved(candidates, rounds=4, warmup=1, visit_seconds=0, settle=False)
    assert [len(t.samples) for t in timings.values()] == [4, 4]
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(0, len(calls), 2))  # every round visits both


def test_interleaved_calls_a_slow_candidate_once() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    timings = interleaved({"slow": slow, "fast": lambda: None}, rounds=5, candidate_seconds=0.01)
    assert calls == ["slow"]
    assert timings["slow"].median >= 20
    assert len(timings["fast"].samples) == 5


# Sweep and overhead.


def test_sweep_is_seeded_bounded_and_varied() -> None:
    runs = sweep.draws(200, seed=0)
    assert runs == sweep.draws(200, seed=0) != sweep.draws(200, seed=1)
    assert len({run.name for run in runs}) == 200
    for run in runs:
        assert min(run.conv.out_size) >= 1
        assert max(run.conv.input_elements, run.conv.output_elements) <= sweep.MAX_ELEMENTS
    for attribute, values in {
        "kernel": {3, 5, 7},
        "stride": {1, 2, 3},
        "multiplier": {1, 2},
        "batch": {1, 2, 4, 8},
    }.items():
        assert {getattr(run.conv, attribute) for run in runs} == values
    assert {(run.mode, run.layout) for run in runs} == {
        (mode, layout) for mode in ("inference", "training") for layout in measure.LAYOUTS
    }
    assert {run.dtype for run in runs} == {"float32", "bfloat16"}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_sweep_measures_a_draw(mode: str) -> None:
    record = sweep.measure_draw(sweep.Draw(TINY, mode, "nhwc", "float32"), rounds=1, candidate_seconds=1.0)
    assert record["ratio"] == record["ours_ms"] / record["pytorch_ms"] > 0


def test_sweep_lists_losses() -> None:
    records = [
        {"name": name, "mode": "inference", "ours_ms": ours, "pytorch_ms": 1.0, "ratio": ours}
        for name, ours in (("won", 0.5), ("even", 1.09), ("lost", 1.11))
    ]
    text = sweep.summary(records, ["wrong: out"])
    assert "FAIL: 1 of 3 runs" in text
    assert "lost" in text
    assert "won" not in text
    assert "FAIL not timed, wrong: out" in text
    assert sweep.quantiles(records)["max"] == 2.0


def test_overhead_measures_every_call() -> None:
    found = overhead.microseconds(rounds=1)
    assert {"F.conv2d", "raw operator", "ops.atrous_depthwise_conv2d"} <= set(found)
    assert min(found.values()) > 0


def test_dense_crf_layer_is_measured_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    bench_dense_crf_layer.run_case(
        "sxy 49, srgb 5", "and the three sigmas", recompute=False, rounds=1, height=12, width=16
    )
    record = json.loads(capsys.readouterr().out)
    q = 4 * 21 * 12 * 16  # bytes; Q of the 10 iterations, the energies and what belongs to the image are kept
    assert 9 * q <= record["kept_bytes"] <= 15 * q
    record |= {"sigmas": "", "trained": "", "forward": 1.0, "backward": 3.5}
    assert "bar 3" in bench_dense_crf_layer.rows([{**record, "recompute": False}])[0]["bars"]
    assert bench_dense_crf_layer.rows([{**record, "recompute": True}])[0]["bars"] == ""


@pytest.mark.parametrize(("importing", "building", "code"), [(0.29, 2.9, 0), (0.31, 0.1, 1), (0.1, 3.1, 1)])
def test_builds_are_judged_by_their_bars(
    importing: float, building: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builds, "import_seconds", lambda module, rounds: importing)
    monkeypatch.setattr(builds, "build_seconds", lambda name: building)
    monkeypatch.setattr(sys, "argv", ["builds.py", "--quick"])
    assert builds.main() == code
    assert "| build deeplabv3_small |" in capsys.readouterr().out
