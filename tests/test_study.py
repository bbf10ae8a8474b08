"""The study of the papers' findings: verdicts follow the stated rule, runs resume, reports hold what was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from study import curves, experiments, findings, report, verdicts, worker  # noqa: E402
from study.experiments import NETWORKS, Job, Settings  # noqa: E402
from study.findings import FINDINGS, MEAN_IOU, NARROWING, trimap  # noqa: E402
from study.verdicts import NO_VERDICT, NOT_HERE, REPRODUCED, WITHIN  # noqa: E402

from deeplab_kernels import models  # noqa: E402

TINY = Settings(
    steps=2,
    batch_size=2,
    crop=33,
    train_scenes=3,
    test_scenes=3,
    validation_scenes=1,
    scene_size=49,
    all_candidates=False,
)


# Verdicts.


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.021, 0.022], REPRODUCED),
        ([-0.02, -0.021, -0.022], NOT_HERE),
        ([0.05, -0.03, 0.01], WITHIN),
        # Mean 0.02; with standard errors of 0.0068 and 0.0069 the limit of 2.92 of them is just below and above it.
        ([0.02 - 0.0068 * 3**0.5, 0.02, 0.02 + 0.0068 * 3**0.5], REPRODUCED),
        ([0.02 - 0.0069 * 3**0.5, 0.02, 0.02 + 0.0069 * 3**0.5], WITHIN),
        ([0.02], NO_VERDICT),
        ([], NO_VERDICT),
    ],
)
def test_greater(differences: list[float], verdict: str) -> None:
    assert verdicts.greater(verdicts.summarise(differences)) == verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.004, -0.02, 0.03], REPRODUCED),
        ([-0.03, -0.031, -0.029], NOT_HERE),
        ([0.03, -0.01, 0.03], WITHIN),
        ([0.0], NO_VERDICT),
    ],
)
def test_same(differences: list[float], verdict: str) -> None:
    assert verdicts.same(verdicts.summarise(differences)) == verdict


def test_lower() -> None:
    assert verdicts.lower(1.0, 2.0, 0.5) == REPRODUCED
    assert verdicts.lower(2.0, 1.0, 0.5) == NOT_HERE
    assert verdicts.lower(1.8, 2.0, 0.5) == WITHIN


def test_differences_are_paired_by_seed() -> None:
    difference = verdicts.paired({0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.8, 0: 0.4, 5: 0.0})
    assert difference.count == 2
    assert difference.mean == pytest.approx(0.1)
    assert difference.error == pytest.approx(0, abs=1e-12)
    assert math.isnan(verdicts.summarise([]).mean)
    # The one-sided 95 % quantiles for three and for many seeds.
    assert verdicts.t_quantile(3) == 2.92
    assert verdicts.t_quantile(50) == verdicts.t_quantile(10) == 1.833


# What is planned.


def test_every_finding_refers_to_what_is_measured() -> None:
    for finding in FINDINGS:
        points = [(row.network, row.variant) for row in finding.rows]
        points += [point for claim in finding.claims for point in (claim.more, claim.less)]
        for network, variant in points:
            assert variant in NETWORKS[network].variants, (finding.key, network, variant)
        assert finding.claims
    used = {row.network for finding in FINDINGS for row in finding.rows}
    assert used == set(NETWORKS)


def test_the_papers_figures() -> None:
    """Signs of the papers' differences agree with what is claimed, and table 5 with the package's own copy of it."""
    for finding in FINDINGS:
        for claim in finding.claims:
            if claim.paper not in ("", "yes"):
                assert abs(float(claim.paper)) < 0.5 if claim.equal else float(claim.paper) > 0, claim
    v2 = {(row.network, row.variant): row.paper for row in FINDINGS[0].rows}
    assert v2["aspp_l", "CRF"] == "71.57"
    assert v2["large_fov", "plain"] == "65.76"


def test_networks_differ_where_they_should() -> None:
    with_meta = {
        name: models.build(n.model, 7, n.output_stride, device="meta", **n.options) for name, n in NETWORKS.items()
    }
    assert with_meta["v3"].decoder is None
    assert with_meta["channels_64"].decoder.reduce.conv.out_channels == 16
    assert [len(with_meta[name].decoder.convs) for name in ("convs_1", "v3plus", "convs_3")] == [1, 2, 3]
    counts = [models.madds(with_meta[name], 97, "true") for name in ("v3plus", "v3plus_dense")]
    assert counts[0] < counts[1]


def test_jobs_are_told_apart() -> None:
    planned = experiments.jobs(TINY, 3)
    assert len(planned) == len({job.record_name for job in planned}) == 3 * len(NETWORKS)
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)
    job = planned[0]
    tested = replace(job, settings=replace(TINY, test_scenes=4))
    assert tested.weights_name == job.weights_name  # the weights serve another evaluation
    assert tested.record_name != job.record_name
    assert replace(job, settings=replace(TINY, steps=3)).weights_name != job.weights_name


def test_scale() -> None:
    assert Settings().scaled(1) == Settings()
    assert Settings().scaled(4) == replace(Settings(), steps=4 * Settings().steps)
    small = Settings().scaled(0.001)
    assert small.steps >= 2
    assert small.test_scenes >= 3
    assert not small.all_candidates


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two seeds of LargeFOV."""
    path = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        worker.run(Job("large_fov", seed, TINY), path)
    return path


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_records(folder: Path) -> None:
    first, second = _records(folder)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["final_loss"] != second["final_loss"]
    assert set(first["results"]) == set(NETWORKS["large_fov"].variants)
    for result in first["results"].values():
        assert 0 <= result["mean_iou"] <= 1
        assert len(result["trimap"]) == 40
    assert first["results"]["short-range CRF"]["crf"]["filter"] == "local"
    assert first["results"]["CRF"]["crf"]["filter"] == "permutohedral"


def test_a_finished_job_is_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("large_fov", 0, TINY)
    record = json.loads((folder / job.record_name).read_text())
    monkeypatch.setattr(worker, "train", lambda *_, **__: pytest.fail("trained again"))
    assert worker.run(job, folder) == record
    # Without the record only the evaluation is repeated, from the weights kept.
    (folder / job.record_name).unlink()
    again = worker.run(job, folder)
    del again["evaluation_cpu_seconds"], record["evaluation_cpu_seconds"]
    assert json.loads(json.dumps(again)) == record


# Reports.


@pytest.fixture
def content() -> dict[str, Any]:
    """Records made up: ASPP-L 2 points above LargeFOV with every seed, ASPP-S equal to it on average."""
    records = []
    for seed, noise in enumerate((0.0, 0.01, 0.02)):
        for network, mean in (("large_fov", 0.6), ("aspp_s", 0.6 + (1 - seed) * 0.03), ("aspp_l", 0.62)):
            result = {"mean_iou": mean + noise, "trimap": [0.3 + noise + 0.005 * b for b in range(40)]}
            better = {"mean_iou": mean + noise + 0.01, "trimap": result["trimap"]}
            variants = dict.fromkeys(NETWORKS[network].variants, result) | {"CRF": better}
            records.append(
                {
                    "network": network,
                    "seed": seed,
                    "results": variants,
                    "cpu_seconds": 60.0,
                    "evaluation_cpu_seconds": 30.0,
                    "parameters": 400_000,
                    "final_loss": 0.5,
                }
            )
    cost = {"title": "v3+", "threads": 1, "full_size_madds": 1, "paper_madds": 1.0}
    slow = {**cost, "network": "v3plus_dense", "madds": 4, "latency": {"median_ms": 2.0, "iqr_ms": 0.1}}
    fast = {**cost, "network": "v3plus", "madds": 1, "latency": {"median_ms": 1.0, "iqr_ms": 0.1}}
    return {
        "machine": {"cpu": "a processor", "cores": 4, "torch": "2"},
        "commit": "abc",
        "date": "2026-01-01",
        "settings": vars(Settings()),
        "scale": 1.0,
        "seeds": 3,
        "processes": 4,
        "failures": {},
        "missing": 21,
        "cost": [slow, fast],
        "records": records,
    }


def test_verdicts_follow_from_the_records(content: dict[str, Any]) -> None:
    found = {claim["claim"]: claim for claim in report.summary(content)["findings"][0]["claims"]}
    assert found["ASPP-L > LargeFOV"]["verdict"] == REPRODUCED
    assert found["ASPP-L > LargeFOV"]["difference"] == pytest.approx(0.02)
    assert found["ASPP-S > LargeFOV"]["verdict"] == WITHIN
    assert found["the CRF helps LargeFOV"]["verdict"] == REPRODUCED
    assert report.values(content, "large_fov", "plain", trimap(3))[1] == pytest.approx(0.32)
    assert report.values(content, "large_fov", "plain", NARROWING)[0] == pytest.approx(-0.195)
    assert report.values(content, "v3", "plain", MEAN_IOU) == {}


def test_report(content: dict[str, Any], tmp_path: Path) -> None:
    report.write(content, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "| DeepLab v2, ASPP-L | plain | 63.00 ± 1.00 |" in text
    assert "68.96" in text
    assert "| ASPP-L > LargeFOV | +2.00 ± 0.00 | +3.20 | **reproduced** |" in text
    assert "| SC takes fewer Multiply-Adds | 0.25 | 1.00 | **reproduced** |" in text
    assert "| SC has the lower latency | 0.50 | yes | **reproduced** |" in text
    assert "21 trainings are missing" in text
    assert "nan" not in text
    written = (tmp_path / "study.json").read_text()
    assert "NaN" not in written
    assert json.loads(written)["findings"][0]["key"] == "aspp"


def test_curves(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert curves.draw(content, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not curves.draw(content, tmp_path / "none.png")


def test_command(tmp_path: Path) -> None:
    """The command trains one network in a process of its own, reports, and the second time only reports."""
    command = [sys.executable, "-m", "benchmarks.study", "--scale", "0.001", "--only", "channels_32", "--seeds", "1"]
    command += ["--workers", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"][0]["title"] == findings.FINDINGS[0].title
    records = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.json")}
    assert len(records) == 1
    again = subprocess.run([*command, "--report"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "training:" not in again.stderr
    assert records == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.json")}
