"""The suite's front end: its report of made-up and of committed results, comparison, planning; nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from _bench_results import MACHINE, contenders, models, separable, timing, write
from _html_page import Page, check_self_contained

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bars  # noqa: E402
from suite import cases, compare, kinds, page, plots, rows, runner, stored, subjects  # noqa: E402

from deeplab_kernels import cli  # noqa: E402
from deeplab_kernels.commands import bench  # noqa: E402
from deeplab_kernels.errors import UserError  # noqa: E402

COMMITTED = sorted({path.parent for path in (BENCHMARKS / "results").glob("*/atrous_depthwise.json")})


def run(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts benchmarks/ in front


# Rows.


def test_rows_of_a_separable_block(tmp_path: Path) -> None:
    document = separable(whole__nhwc=2.0, two_kernels__nhwc=3.0, eager__nhwc=5.0, compile__nhwc=4.0, eager__nchw=1.0)
    found = {row.contender: row for row in stored.read(write(tmp_path, atrous_separable=document)).rows}
    whole = found["whole nhwc"]
    assert (whole.ours, found["two_kernels nhwc"].ours, found["eager nhwc"].ours) == (True, True, False)
    assert (whole.rival, whole.ratio) == ("compile nhwc", 2.0)  # of the same layout
    assert whole.spread == pytest.approx(0.05)
    assert whole.achieved_gflop_per_s == pytest.approx(1000)
    assert whole.matrix_share == pytest.approx(10)
    assert whole.bandwidth_share == pytest.approx(0.25)  # 10 MB in 2 ms against 20 GB/s


def test_missed_bars_are_listed(tmp_path: Path) -> None:
    document = separable(whole__nhwc=2.0, eager__nhwc=4.0)
    results = stored.read(write(tmp_path, atrous_separable=document, models=models()))
    assert [bar.case for bar in results.missed][-1] == "A12:2048x33r12->relu->256"
    assert "2.00 < 3" in results.missed[-1].what
    assert [bar.source for bar in results.missed if "ratio 1.12" in bar.what] == ["issue 4", "issue 5"] * 2
    assert not stored.read(write(tmp_path / "fast", atrous_separable=separable(whole__nhwc=1, eager__nhwc=4))).missed


def test_spatial_pyramids_are_compared_in_their_better_layouts(tmp_path: Path) -> None:
    times = {
        "operator": {"one pass nhwc": 2.0, "rate by rate nhwc": 3.0, "eager nchw": 8.0},
        "stage": {"ours nchw": 4.0, "ours nhwc": 5.0, "eager nchw": 10.0, "compile nchw": 9.0},
    }
    shared = {"name": "2048x33r6/12/18 N1", "mode": "inference", "gemm_madds_per_s": 1e11, "threads": 4}
    records = [
        {**shared, "what": what, "madds": 2e8, "timings": {name: timing(ms) for name, ms in found.items()}}
        for what, found in times.items()
    ]
    results = stored.read(write(tmp_path, atrous_spatial_pyramid={"machine": MACHINE, "records": records}))
    found = {(row.case.split(", ")[1], row.contender): row for row in results.rows}
    assert found["operator", "rate by rate nhwc"].ours
    assert not found["operator", "eager nchw"].ours
    assert found["operator", "one pass nhwc"].ratio == 4
    assert (found["stage", "ours nhwc"].rival, found["stage", "ours nhwc"].ratio) == ("compile nchw", 1.8)
    assert found["stage", "ours nchw"].matrix_share == pytest.approx(0.5)
    assert [(missed.case, missed.what) for missed in results.missed] == [
        ("2048x33r6/12/18 N1, stage, inference", "best layout: speed-up 2.25 < 3")
    ]


def test_depthwise_bytes_and_multiply_adds(tmp_path: Path) -> None:
    conv = {"batch": 1, "channels": 4, "height": 5, "width": 5, "kernel": 3, "stride": 1, "rate": 1}
    record = {
        "name": "4x5/N1",
        "convolution": conv,
        "input_bytes": 400,
        "output_bytes": 400,
        "threads": 1,
        "timings": {
            f"{kind} {dtype} nchw": timing(1.0)
            for kind in ("ours", "clone", "eager")
            for dtype in ("float32", "bfloat16")
        },
    }
    records = [{**record, "mode": mode} for mode in ("inference", "training")]
    write(tmp_path, atrous_depthwise={"machine": MACHINE, "records": records})
    found = {(row.mode, row.contender): row for row in stored.read(tmp_path).rows}
    assert (found["inference", "ours float32 nchw"].bytes, found["inference", "ours float32 nchw"].madds) == (800, 900)
    assert (found["inference", "ours bfloat16 nchw"].bytes, found["inference", "clone float32 nchw"].bytes) == (
        400,
        800,
    )
    assert (found["training", "ours float32 nchw"].bytes, found["training", "ours float32 nchw"].madds) == (2000, 2700)
    assert found["inference", "clone float32 nchw"].ratio is None
    assert not found["inference", "ours bfloat16 nchw"].full_precision


def test_gpu_results_are_read_in_microseconds(tmp_path: Path) -> None:
    times = {"ours cuda": {"median_us": 10.0}, "torch eager cudnn": {"median_us": 40.0}, "floor_us": 5.0}
    layer = {"layer": "A12", "batch": 8, "dtype": "bfloat16", "layout": "nhwc", "inference": times}
    pyramid = {"pyramid": "P", "batch": 8, "dtype": "float32", "layout": "nhwc", "backward": times}
    broken = {**layer, "inference": {}, "failed": "RuntimeError: lost"}
    document = {
        "machine": {"gpu": "G"}, "copy_gb_per_s": 2000.0, "layers": [layer, broken], "pyramids": [pyramid],
        "crf": [{"picture": "1x2x3", "times": {"MONAI, 10 iterations": {"median_us": 7.0}}}],
    }  # fmt: skip
    results = stored.read(write(tmp_path, gpu_suite=document))
    found = [(row.case, row.median_ms, row.ratio, row.ours) for row in results.rows]
    assert found[:2] == [("A12/N8 bfloat16 nhwc", 0.01, 4.0, True), ("A12/N8 bfloat16 nhwc", 0.04, 1.0, False)]
    assert found[2][:2] == ("P/N8 float32 nhwc", 0.01)
    assert found[4] == ("CRF 1x2x3", 0.007, None, False)
    assert results.rows[0].bandwidth_share == pytest.approx(0.5)
    assert [(u.case, u.reason) for u in results.unavailable] == [("A12/N8 bfloat16 nhwc", "RuntimeError: lost")]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "models.json", "not a results file of models"),
        ("[]", "models.json", "not a results file of models"),
        ('{"records": [{"name": "a"}]}', "atrous_separable.json", "KeyError"),
        ("{}", "other.json", "must be one of contenders.json"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        stored.read(tmp_path / name)


def test_no_results(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "models.json"):
        with pytest.raises(UserError, match="no results"):
            stored.read(path)


# The report.


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_report_of_committed_results_has_every_case(folder: Path) -> None:
    results = stored.read(folder)
    parsed = check_self_contained(page.render(results))
    cells = {(line[0], line[1], line[2]) for table in parsed.tables for line in table if len(line) > 3}
    assert {(row.case, row.mode, row.contender) for row in results.rows} <= cells
    depthwise = json.loads((folder / "atrous_depthwise.json").read_text())["records"]
    assert {record["name"] for record in depthwise} <= {case for case, *_ in cells}
    assert [len(table) - 1 for table in parsed.tables[:2]] == [len(bars.DEMANDS), len(results.missed)]
    assert parsed.references == []


def test_names_are_escaped(tmp_path: Path) -> None:
    document = separable(whole__nhwc=1.0, eager__nhwc=2.0)
    document["records"][0]["name"] = "</td><script>alert(1)</script>&"
    text = page.render(stored.read(write(tmp_path, atrous_separable=document)))
    assert "<script>alert" not in text
    assert "Tiny <CPU>" not in text
    assert Page(text).tags.count("script") == 1
    assert any("</td><script>alert(1)</script>&" in line for table in Page(text).tables for line in table)


def test_plots_have_titles_units_and_every_point(tmp_path: Path) -> None:
    document = separable(whole__nhwc=1.0, eager__nhwc=2.0, compile__nhwc=3.0)
    results = stored.read(write(tmp_path, atrous_separable=document, models=models()))
    roofline, latency = plots.roofline(results.rows), plots.latency(results.rows)
    Page(roofline), Page(latency)
    assert roofline.count("<circle") == 2  # ours and the best of PyTorch, not the others
    assert latency.count("<circle") == 4
    assert "FLOP per byte" in roofline
    assert "GFLOP/s" in roofline
    assert "copy, 20 GB/s" in roofline
    assert "billions" in latency
    assert "latency, ms" in latency
    assert "54.0 billion Multiply-Adds, 800 ms" in latency
    assert ">output stride 16</text>" in latency
    assert plots.roofline([]) == plots.latency([]) == ""


def test_axes_are_logarithmic_and_hold_their_values() -> None:
    axes = plots.LogAxes([1, 100], [2, 2], "x", "y")
    assert axes.x(10) == pytest.approx((axes.x(1) + axes.x(100)) / 2)
    assert plots.LEFT < axes.x(1) < axes.x(100) < plots.WIDTH - plots.RIGHT
    assert plots.TOP < axes.y(2) < plots.HEIGHT - plots.BOTTOM


# Comparison.


def test_slowdown_beyond_the_spread_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before", atrous_separable=separable(whole__nhwc=1.0, eager__nhwc=4.0, whole__nchw=1.0))
    now = write(tmp_path / "now", atrous_separable=separable(whole__nhwc=1.2, eager__nhwc=5.0, whole__nchw=1.03))
    assert run("--report-only", "-o", now, "--compare", before, "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert [(c["contender"], round(c["ratio"], 2)) for c in summary["slower"]] == [("whole nhwc", 1.2)]
    text = (now / "report.html").read_text()
    table = Page(text).tables[0]
    assert [line[2] for line in table] == ["contender", "whole nhwc", "eager nhwc"]
    assert '<b class="slower">1.20</b>' in text
    assert '<span class="same">1.03</span>' in text
    assert run("--report-only", "-o", before, "--compare", now / "atrous_separable.json") == 0


def test_one_sample_counts_as_uncertain_by_a_tenth() -> None:
    def row(ms: float, samples: int) -> rows.Row:
        return rows.Row("s", "c", "m", "ours", True, ms, 0.0, samples)

    assert compare.Change(row(1.0, 1), row(1.05, 1)).verdict == ""
    assert compare.Change(row(1.0, 5), row(1.05, 5)).verdict == "slower"
    assert compare.Change(row(1.0, 1), row(0.8, 1)).verdict == "faster"


def test_another_machine_is_pointed_out(tmp_path: Path) -> None:
    document = separable(whole__nhwc=1.0)
    now = stored.read(write(tmp_path / "now", atrous_separable=document))
    document["machine"] = {**MACHINE, "cores": 64}
    before = stored.read(write(tmp_path / "before", atrous_separable=document))
    assert compare.other_machine(before, now) == ["cores: 64 before, 2 now"]
    assert "cores: 64 before, 2 now" in page.render(now, before)
    assert compare.other_machine(now, now) == []


# The command.


def test_report_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, models=models(100.0))
    assert run("--report-only", "-o", tmp_path) == 0
    assert f"4 rows; report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    Page((tmp_path / "report.html").read_text())


def test_user_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run("--only", "weather")
    assert "weather" in capsys.readouterr().err
    assert run("--report-only", "-o", tmp_path) == 2
    assert "no results" in capsys.readouterr().err
    for options in (
        ["--minutes", "-1"],
        ["--batch", "0"],
        ["--device", "cuda"],
        ["--threads", "-2"],
        ["--layers", "weather"],
    ):
        assert run(*options, "-o", tmp_path) == 2
        error = capsys.readouterr().err
        assert options[0] in error
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        bench, "__file__", str(tmp_path / "site-packages" / "deeplab_kernels" / "commands" / "bench.py")
    )
    assert run("--quick") == 2
    assert "checkout" in capsys.readouterr().err


def test_an_interrupted_run_still_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wanted: subjects.Wanted, folder: Path) -> None:
        write(folder, contenders=contenders(ours__nhwc=1.0, eager__nhwc=4.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert run("--quick", "-o", tmp_path / "out") not in (0, 1)
    assert "report of what was measured" in capsys.readouterr().err
    Page((tmp_path / "out" / "report.html").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "contenders.json", "report.html", "report.md", "pytest_benchmark.json",
    }  # fmt: skip


# What runs.


def test_plans() -> None:
    assert bench.SUBJECTS == subjects.SUBJECTS
    axes = {"modes": cases.MODES, "dtypes": cases.DTYPES, "contenders": cases.CONTENDERS, "layouts": cases.LAYOUTS}
    assert axes == bench.AXES
    for quick, minutes in ((True, subjects.QUICK_MINUTES), (False, subjects.FULL_MINUTES)):
        jobs = subjects.Wanted(quick=quick, minutes=minutes).jobs
        assert all((BENCHMARKS / job.script).is_file() and Path(job.results).stem in kinds.KINDS for job in jobs)
        plans = [plan for job in jobs if (plan := job.plan(quick))]
        assert len(plans) == len(jobs) == (4 if quick else 5)
        assert sum(plan.seconds for plan in plans) <= 60 * minutes
        assert jobs[0].script == "bench_contenders.py"
        assert plans[0].cases > 5
    only = subjects.Wanted(["crf"], quick=True)
    assert [job.script for job in only.jobs] == ["bench_dense_crf.py"]
    assert subjects.fitting([10, 100, 20, 5], 36) == 3


def test_options_are_those_of_the_files(tmp_path: Path) -> None:
    import bench_contenders
    import bench_dense_crf

    chosen = cases.Selection(what=["A12"], dtypes=["bf16"], batches=[1, 4], layouts=["nchw"])
    wanted = subjects.Wanted(["separable", "crf"], quick=True, minutes=1.0, selection=chosen, threads=3)
    product, crf = wanted.jobs
    args = bench_contenders.parse(product.arguments(True, tmp_path, 0.5)[1:])
    assert (args.plan, args.minutes, args.threads, args.device) == ("quick", 0.5, 3, "cpu")
    assert bench_contenders.selection_of(args) == dataclasses.replace(chosen, subjects=["separable"], modes=cases.MODES)
    crf_args = bench_dense_crf.parse(crf.arguments(True, tmp_path)[1:])
    assert sum(crf_args.cases in case.name for case in bench_dense_crf.SMALL) == crf.quick.cases
    assert crf_args.json == tmp_path / "dense_crf.json"


SCRIPT = """
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["DEEPLAB_KERNELS_RESULTS"])
assert "MALLOC_TRIM_THRESHOLD_" in os.environ
(folder / "models.json").write_text(json.dumps({"machine": {}, "records": [{"name": sys.argv[1]}, {"name": "old"}]}))
if sys.argv[1] == "bad":
    raise SystemError("out of paper")
sys.exit(1)  # a bar is missed
"""


class Wanted(subjects.Wanted):
    """One made-up file; arguments of its script in ``contents``."""

    script: Path
    contents: tuple[str, ...]
    fills = False

    @property
    def jobs(self) -> list[subjects.Job]:
        plan = subjects.Plan(1.0, 2, self.contents)
        return [subjects.Job(("models",), str(self.script), "models.json", plan, fills=self.fills)]


def wanted(script: Path, text: str, *contents: str, minutes: float = 0.0) -> Wanted:
    script.write_text(text)
    made = Wanted(minutes=minutes)
    object.__setattr__(made, "script", script)
    object.__setattr__(made, "contents", contents)
    return made


@pytest.mark.parametrize("name", ["good", "bad"])
def test_a_job_keeps_what_was_measured(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "out", models={"records": [{"name": "old"}]})
    [outcome] = runner.run(wanted(tmp_path / "bench_tiny.py", SCRIPT, name), tmp_path / "out")
    assert (outcome.ok, outcome.cases, outcome.cut) == (name == "good", 1, False)
    assert outcome.error == ("" if outcome.ok else "SystemError: out of paper")
    assert (tmp_path / "out" / runner.TIMES).exists() == outcome.ok
    error = capsys.readouterr().err
    assert "1 files" in error
    assert ("out of paper" in error) != outcome.ok


def test_a_file_that_fills_the_time_gets_all_that_the_others_leave(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; pathlib.Path(os.environ['DEEPLAB_KERNELS_RESULTS'], 'got').write_text(sys.argv[2])"
    )
    one = wanted(tmp_path / "bench_tiny.py", script, minutes=10.0)
    object.__setattr__(one, "fills", True)
    [outcome] = runner.run(one, tmp_path / "out")
    assert outcome.ok
    assert 9.5 < float((tmp_path / "out" / "got").read_text()) < 10


def test_the_time_limit_stops_a_file_and_keeps_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "REPORT_SECONDS", 0.0)
    script = SCRIPT.replace("sys.exit(1)", "import time; time.sleep(600)")
    [outcome] = runner.run(wanted(tmp_path / "bench_slow.py", script, "slow", minutes=4 / 60), tmp_path / "out")
    assert (outcome.ok, outcome.cut, outcome.cases) == (True, True, 2)
    assert outcome.seconds < 30
    assert "the time is over" in capsys.readouterr().err
    assert not (tmp_path / "out" / runner.TIMES).exists()  # no estimate for the next time


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    progress = runner.Progress({"a": (100.0, 2), "b": (100.0, 1)})

    def after(seconds: float, script: str, done: int) -> tuple[float, str]:
        now[0] = seconds
        progress.update(script, done)
        return progress.bar.n, progress.bar.postfix

    assert after(0, "a", 0) == (0, "about 3:20 min left")
    assert after(30, "a", 0) == (15, "about 2:50 min left")  # the case at work counts by its time
    assert after(80, "a", 0) == (25, "about 2:30 min left")  # but not for more than it was planned to take
    pace = (100 + 40) / (50 + 40)
    assert after(100, "a", 1) == (25, f"about {runner.clock(150 * pace)} left")
    progress.finish("a")
    assert progress.bar.n == 50
    assert after(5000, "b", 7) == (100, "about 0 s left")
    progress.close()
