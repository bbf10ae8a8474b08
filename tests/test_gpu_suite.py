"""The suite for GPUs but for the GPU: its steps, what it writes, and README's status from made-up results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bars  # noqa: E402
import gpu_suite  # noqa: E402
import measure  # noqa: E402
import report as tables  # noqa: E402
import status  # noqa: E402
from suite import cases, stored  # noqa: E402

from deeplab_kernels.errors import UserError  # noqa: E402
from deeplab_kernels.timing import Timing  # noqa: E402

XML = """<testsuites><testsuite>
<testcase file="tests/gpu/test_a.py" name="1"/>
<testcase file="tests/gpu/test_a.py" name="2"><failure/></testcase>
<testcase file="tests/gpu/test_a.py" name="3"><skipped/></testcase>
<testcase file="tests/gpu/test_b.py" name="1"><error/></testcase>
</testsuite></testsuites>"""


# The call.


def test_steps_have_scripts_and_tests_and_their_order() -> None:
    for step in (*gpu_suite.STEPS, *gpu_suite.REHEARSAL):
        assert (ROOT / step.where).exists() if step.kind == "test" else (ROOT / "benchmarks" / step.what).is_file()
        assert 0 < step.share < 1
    assert len({step.name for step in gpu_suite.STEPS}) == len(gpu_suite.STEPS)
    # What is rehearsed is what runs, but for the tests of Triton, which its interpreter runs elsewhere.
    assert {s.where for s in gpu_suite.REHEARSAL} == {s.where for s in gpu_suite.STEPS if "triton" not in s.where}
    assert [step.where for step in gpu_suite.STEPS[:3]] == ["tests/gpu", "contenders", "crf"]


def test_tests_are_counted_by_file(tmp_path: Path) -> None:
    log = tmp_path / "log.xml"
    assert gpu_suite.counts(log) == {}
    log.write_text(XML)
    assert gpu_suite.counts(log) == {
        "tests/gpu/test_a.py": {"passed": 1, "failed": 1, "skipped": 1},
        "tests/gpu/test_b.py": {"failed": 1},
    }


def test_rehearsal_of_tests_and_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = gpu_suite.REHEARSAL
    quick = gpu_suite.Step("test", "tests/gpu/test_permutohedral.py", 0.9, "strided")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_suite, "REHEARSAL", (quick, *(step for step in steps if step.where in ("crf", "pyramid"))))
        folder = tmp_path / "rehearsed"
        code = gpu_suite.main(["--rehearse", "--seconds", "300", "--output", str(folder)])
    data = json.loads((folder / gpu_suite.FILE).read_text())
    assert code == 0, data
    assert [step["step"] for step in data["steps"]] == ["build", quick.name, "measure crf", "measure pyramid"]
    assert data["steps"][1]["files"] == {"tests/gpu/test_permutohedral.py": {"passed": 1}}
    assert data["crf"][0]["times"]["10 iterations, lattices built"]["median_us"] > 0
    assert len(data["pyramids"]) == 8
    for row in data["pyramids"]:
        assert row["backward"]["ours"].keys() == row["inference"]["ours, rate by rate"].keys()
    assert data.keys() >= {"commit", "date", "machine", "elapsed_s"}
    assert data["machine"].keys() >= {"torch", "python"}
    assert (folder / "report.html").exists()
    assert not list(folder.glob("*.part.json"))
    assert "failed: nothing" in capsys.readouterr().out
    assert status.runs(tmp_path) == []  # a rehearsal shows nothing of GPUs


def test_a_step_that_fails_or_takes_too_long_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu_suite.Report(tmp_path / gpu_suite.FILE, 100)
    report.data |= {"commit": "abc"}
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "broken.py").write_text("import sys; sys.exit('device lost')")
    slow = "import pathlib, sys, time\npathlib.Path(sys.argv[2]).write_text('{\"crf\": []}')\ntime.sleep(99)"
    (benchmarks / "slow.py").write_text(slow)
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0.0)
    for name in ("broken", "slow"):
        gpu_suite.measured(report, gpu_suite.Step("measure", name, 0.5, f"{name}.py"), tmp_path, 3, rehearse=False)
    stored = json.loads(report.path.read_text())
    assert gpu_suite.failures(stored) == ["measure broken", "measure slow"]
    assert "device lost" in stored["steps"][0]["tail"]
    assert stored["steps"][1]["exit"] == "timed out"
    assert stored["crf"] == []  # what it had written


def test_no_gpu_and_no_rehearsal() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--rehearse"):
        gpu_suite.main([])
    assert measure.results_folder("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"


def test_every_bar_of_gpus_has_a_case() -> None:
    """Judged by made-up times, the plan's cases and the CRF's pictures reach every demand on GPUs."""
    machine = {"copy_gb_per_s": 3000.0}
    reached = set()
    for task in cases.gpu_bars():
        timings = {f"{name} {layout}": {"median_ms": 1.0} for name in task.contenders for layout in task.layouts}
        case = cases.to_dict(task.case)
        record = {"subject": task.case.subject, "mode": task.case.mode, "device": "cuda", "bytes": task.case.bytes}
        reached |= {bar.demand for bar in bars.contenders({**record, "case": case, "timings": timings}, machine)}
    import gpu_crf

    reached |= {f"gpu crf {picture}" for picture in gpu_crf.PICTURES} | {"gpu exact filter"}
    assert reached == {key for key, demand in bars.DEMANDS.items() if demand.device == "GPU"}


# README from results.


def made_up(folder: Path, failed: int = 0, gpu: str = "NVIDIA Made Up", rehearsal: bool = False) -> None:
    folder.mkdir(parents=True)
    machine = {"gpu": gpu, "torch": "2.13.0", "copy_gb_per_s": 3000.0}
    files = {
        "tests/gpu/test_atrous_depthwise.py": {"passed": 40, "failed": failed, "skipped": 1},
        "tests/gpu/test_dense_crf.py": {"passed": 5},
    }
    crf = [{"picture": "375x500x21", "times": {"10 iterations, lattices built": {"median_us": 2500.0, "min_us": 1.0}}}]
    suite: dict[str, Any] = {
        "machine": machine, "date": "2027-01-02", "commit": "abc123", "rehearsal": rehearsal, "crf": crf,
        "steps": [{"step": "build", "ok": True}, {"step": "test tests/gpu", "ok": not failed, "files": files}],
    }  # fmt: skip
    case = cases.to_dict(cases.Case("separable", "A12:2048x33r12->relu->256", "inference", 8, "bf16"))
    record = {
        "name": "A12", "subject": "separable", "mode": "inference", "device": "cuda", "case": case, "madds": 1,
        "bytes": 1,
        "timings": {"ours nhwc": Timing((1.0,)).summary(), "eager nhwc": Timing((2.0,)).summary()},
    }  # fmt: skip
    (folder / "gpu_suite.json").write_text(json.dumps(suite))
    (folder / "contenders.json").write_text(json.dumps({"machine": machine, "records": [record]}))


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "README.md", tmp_path / "README.md"))


def row_of(text: str, start: str) -> str:
    return next(line for line in text.split("\n") if line.startswith(f"| {start}"))


def test_readme_says_what_the_results_say(tmp_path: Path, readme: Path) -> None:
    made_up(tmp_path / "results" / "nvidia-made-up")
    tables.update_readme(None, readme, tmp_path / "results")
    text = readme.read_text()
    when = "on an NVIDIA Made Up (2027-01-02, commit abc123)"
    assert f"GPU: 40 tests passed {when} |" in row_of(text, "`ops.atrous_depthwise_conv2d`")
    assert f"GPU: 1 cases timed {when} |" in row_of(text, "`ops.atrous_separable_conv2d`")
    assert f"GPU: 5 tests passed {when} |" in row_of(text, "`ops.permutohedral_filter`")
    assert "GPU: not measured on a GPU |" in row_of(text, "`fuse(model)`")
    assert "GPU: not measured on a GPU |" in row_of(text, "DeepLab v3 and v3+")
    assert "| NVIDIA Made Up | whole separable block, inference" in text
    assert "| >= 1.5 | 1 of 1 | 2.00 | met |" in text
    assert "| <= 2 | 0 of 1 | 2.50 | missed |" in text
    assert "Demands on GPUs" not in text
    # Everything else stands.
    strip = [line for line in text.split("\n") if "GPU" not in line]
    kept = [line for line in (ROOT / "README.md").read_text().split("\n") if "GPU" not in line]
    assert set(kept) <= set(strip)


def test_failed_tests_are_named(tmp_path: Path, readme: Path) -> None:
    made_up(tmp_path / "results" / "gpu", failed=2)
    tables.update_readme(None, readme, tmp_path / "results")
    assert "GPU: 40 tests passed, **2 failed** on an" in row_of(readme.read_text(), "`ops.atrous_depthwise_conv2d`")


def test_rehearsals_and_cpus_show_nothing_of_gpus(tmp_path: Path, readme: Path) -> None:
    made_up(tmp_path / "results" / "rehearsed", rehearsal=True)
    made_up(tmp_path / "results" / "cpu", gpu="")
    before = readme.read_text()
    tables.update_readme(None, readme, tmp_path / "results")
    assert readme.read_text() == before


def test_readme_follows_from_the_committed_results(readme: Path) -> None:
    before = readme.read_text()
    tables.update_readme(None, readme, ROOT / "benchmarks" / "results")
    assert readme.read_text() == before, "run: python benchmarks/report.py --readme"


def test_readme_without_its_marks(readme: Path) -> None:
    readme.write_text(readme.read_text().replace("<!-- end of the GPU table -->", ""))
    with pytest.raises(UserError, match="GPU table"):
        tables.update_readme(None, readme, ROOT / "benchmarks" / "results")


def test_report_of_a_gpu(tmp_path: Path) -> None:
    made_up(tmp_path / "gpu")
    results = stored.read(tmp_path / "gpu")
    verdicts = {v.demand.what: v.text for v in results.verdicts if v.measured}
    assert set(verdicts.values()) == {"met", "missed"}
    assert results.machine["gpu"] == "NVIDIA Made Up"
