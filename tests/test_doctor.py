"""doctor: finds nothing wrong here, and what is wrong when something is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplab_kernels import cli, doctor, info
from deeplab_kernels.doctor import operators


@pytest.fixture(scope="module")
def report() -> info.Report:
    return info.collect()


def test_this_installation_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["healthy"] is True
    subjects = {finding["subject"]: finding for finding in data["findings"]}
    for name in operators.CASES:
        assert subjects[f"{name} on cpu"]["status"] == "ok"
        assert "C++" in subjects[f"{name} on cpu"]["found"]
    for subject in ("torch", "library _C", "library _densecrf", "densecrf", "CPU", "threads", "OpenMP"):
        assert subject in subjects


def test_table_and_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [doctor.Finding("ok", "this", "works"), doctor.Finding("warning", "that", "is slow", "do so")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "  warning  that  is slow  do so\n" in text
    assert text.endswith("healthy: 0 errors, 1 warning, 0 notes\n")
    findings.append(doctor.Finding("error", "it", "is broken"))
    assert cli.main(["doctor"]) == 1
    assert "NOT healthy: 1 error," in capsys.readouterr().out


def test_cases_are_operators() -> None:
    assert operators.CASES.keys() <= set(operators.names())


def test_wrong_operators(monkeypatch: pytest.MonkeyPatch, report: info.Report) -> None:
    right = operators._operator

    def wrong(name: str, *args: Any) -> Any:
        out = right(name, *args)
        if name == "gaussian_filter":
            return out * 1.01
        if name == "local_gaussian_filter":
            return out * float("nan")
        if name == "permutohedral_filter":
            raise RuntimeError("no such\nkernel")
        return out[:, :1] if name == "atrous_depthwise_conv2d" else out

    monkeypatch.setattr(operators, "_operator", wrong)
    findings = {f.subject: f for f in doctor._operators(report)}
    broken = {name.removesuffix(" on cpu") for name, f in findings.items() if f.status == "error"}
    assert broken >= {"gaussian_filter", "local_gaussian_filter", "permutohedral_filter", "atrous_depthwise_conv2d"}
    assert findings["dense_crf_mean_field on cpu"].status == "ok"
    assert "differs from its definition by 1.0e-02" in findings["gaussian_filter on cpu"].found
    assert "no such kernel" in findings["permutohedral_filter on cpu"].found


GPU = {"device": "cuda:0", "name": "some GPU", "architecture": "sm_75", "cuda": "12.8"}

# What is changed in a report -> (who looks, status, what the finding says)
TROUBLE: dict[str, tuple[Callable[[info.Report], Any], Callable[..., Any], str, str]] = {
    "no torch": (lambda r: r["versions"].update(torch=None), doctor._versions, "error", "not installed"),
    "old torch": (lambda r: r["versions"].update(torch="2.9.1"), doctor._versions, "error", "2.10 or newer"),
    "newer torch": (lambda r: r["versions"].update(torch="2.99.0"), doctor._versions, "note", "built with"),
    "damaged library": (
        lambda r: r["libraries"][0].update(missing_because="truncated"),
        doctor._libraries,
        "error",
        "_C not loaded: truncated",
    ),
    "no CUDA library": (
        lambda r: (r["devices"].append(GPU), r["libraries"][1].update(missing_because="not built")),
        doctor._libraries,
        "warning",
        "not built",
    ),
    "another CUDA": (
        lambda r: (r["devices"].append(GPU), r["build"].update(cuda={"nvcc": "release 13.0", "architectures": ["75"]})),
        doctor._gpu,
        "warning",
        "torch has CUDA 12.8",
    ),
    "older GPU": (
        lambda r: (r["devices"].append(GPU), r["build"].update(cuda={"nvcc": "release 12.8", "architectures": ["80"]})),
        doctor._gpu,
        "warning",
        "sm_75 is older than sm_80",
    ),
    "too many threads": (
        lambda r: r["threads"].update(torch=9, cores_allowed=4),
        doctor._threads,
        "warning",
        "9 of torch on 4 cores",
    ),
    "one thread": (lambda r: r["threads"].update(torch=1, cores_allowed=4), doctor._threads, "note", "1 of torch"),
    "no operators": (
        lambda r: r.update(operators={"missing_because": "ImportError"}),
        doctor._operators,
        "error",
        "ImportError",
    ),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble(name: str, report: info.Report) -> None:
    change, examination, status, text = TROUBLE[name]
    report = copy.deepcopy(report)
    change(report)
    findings = [f for f in examination(report) if f.status != "ok"]
    assert any(f.status == status and text in f"{f.subject} {f.found} {f.advice}" for f in findings), findings


def test_portable_kernels(monkeypatch: pytest.MonkeyPatch, report: info.Report) -> None:
    report = copy.deepcopy(report)
    report["operators"]["cpu_instruction_set"] = "portable"
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    (finding,) = doctor._cpu(report)
    assert finding.status == "warning"
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert [f.status for f in doctor._cpu(report)] == ["ok"]


def test_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: info.Report) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f r-xp /a/torch/lib/libgomp.so.1\n7f r--p /a/torch/lib/libgomp.so.1\n7f r-xp /b/libiomp5.so\n")
    assert doctor._loaded_openmp(maps) == {"libgomp.so.1", "libiomp5.so"}
    assert doctor._loaded_openmp(tmp_path / "none") == set()
    monkeypatch.setattr(doctor, "_loaded_openmp", lambda: {"libgomp.so.1", "libiomp5.so"})
    assert [f.status for f in doctor._openmp(report)] == ["warning"]
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    (finding,) = doctor._openmp(report)
    assert finding.found == "torch was built without it"


def test_environment(monkeypatch: pytest.MonkeyPatch, report: info.Report) -> None:
    variables = ("DEEPLAB_KERNELS_CUDA_BACKEND", "DEEPLAB_KERNELS_CPU_ISA")
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    assert list(doctor._environment(report)) == []
    for variable in variables:
        monkeypatch.setenv(variable, "portable")
        assert f"{variable}=portable" in [f.found for f in doctor._environment(report) if f.status == "note"]
