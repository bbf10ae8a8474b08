"""Examines the installation: does everything load, is every operator right on every device, is anything slow for no
reason."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import info
from .._text import table

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
_OLDEST_TORCH = (2, 10)
_VARIABLES = {
    "DEEPLAB_KERNELS_CUDA_BACKEND": "no other backend serves on the GPU",
    "DEEPLAB_KERNELS_CPU_ISA": "no other instruction set serves on the CPU",
}


@dataclass(frozen=True)
class Finding:
    """status: "ok", "note" (worth knowing), "warning" (works, but slower or riskier than it need be), "error"."""

    status: str
    subject: str
    found: str
    advice: str = ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _versions(report: info.Report) -> Iterator[Finding]:
    versions, built = report["versions"], report["build"].get("torch")
    torch = versions["torch"]
    if torch is None:
        yield Finding(ERROR, "torch", "is not installed", "pip install torch")
        return
    if _release(torch) < _OLDEST_TORCH:
        yield Finding(ERROR, "torch", torch, "the operators need torch 2.10 or newer")
    elif built and _release(built) != _release(torch):
        yield Finding(NOTE, "torch", f"{torch}, built with {built}", "one build serves every torch from 2.10 on")
    else:
        yield Finding(OK, "torch", torch)


def _libraries(report: info.Report) -> Iterator[Finding]:
    has_gpu = any("architecture" in device for device in report["devices"])
    for library in report["libraries"]:
        subject, reason = f"library {library['name']}", library["missing_because"]
        if reason is None:
            yield Finding(OK, subject, "loaded")
        elif library["name"] != "_C_cuda":
            yield Finding(ERROR, subject, f"not loaded: {reason}", "pip install --force-reinstall .")
        elif has_gpu:
            yield Finding(WARNING, subject, f"not loaded: {reason}", "Triton or plain torch serve on the GPU instead")
        else:
            yield Finding(NOTE, subject, f"not loaded: {reason}", "no GPU here needs it")


def _gpu(report: info.Report) -> Iterator[Finding]:
    built = report["build"].get("cuda") or {}
    for device in report["devices"]:
        if "architecture" not in device:
            continue
        yield Finding(OK, device["device"], f"{device['name']}, {device['architecture']}")
        nvcc = re.search(r"release (\d+)\.", built.get("nvcc", ""))
        if nvcc and nvcc[1] != device["cuda"].split(".")[0]:
            found = f"built by {built['nvcc']}, torch has CUDA {device['cuda']}"
            yield Finding(WARNING, "CUDA versions", found, "build with the nvcc of torch's major version")
        oldest = min((int(a) for a in built.get("architectures", [])), default=0)
        if int(device["architecture"].removeprefix("sm_")) < oldest:
            found = f"{device['architecture']} is older than sm_{oldest}, the oldest that the library was built for"
            yield Finding(WARNING, device["device"], found, "Triton or plain torch serve instead")


def _cpu(report: info.Report) -> Iterator[Finding]:
    instructions = report["operators"].get("cpu_instruction_set")
    if instructions == "portable" and platform.machine() in ("x86_64", "AMD64"):
        yield Finding(WARNING, "CPU", "no AVX2: the portable kernels serve", "see which CPU a virtual machine shows")
    elif instructions:
        yield Finding(OK, "CPU", instructions)


def _threads(report: info.Report) -> Iterator[Finding]:
    threads = report["threads"]
    count, cores = threads.get("torch"), threads.get("cores_allowed", os.cpu_count())
    if count is None or cores is None:
        return
    found = f"{count} of torch on {cores} cores"
    if count > cores:
        yield Finding(WARNING, "threads", found, "more threads than cores are slow: set OMP_NUM_THREADS to the cores")
    elif count == 1 and cores > 1:
        yield Finding(NOTE, "threads", found, "set OMP_NUM_THREADS or call torch.set_num_threads to use more")
    else:
        yield Finding(OK, "threads", found)


def _loaded_openmp(maps: Path = Path("/proc/self/maps")) -> set[str]:
    try:
        names = re.findall(r"/(lib(?:gomp|iomp5|omp)\b[^/\s]*)", maps.read_text())
    except OSError:
        return set()
    return set(names)


def _openmp(report: info.Report) -> Iterator[Finding]:
    try:
        import torch
    except Exception:
        return
    runtimes = sorted(_loaded_openmp())
    if not torch.backends.openmp.is_available():
        yield Finding(WARNING, "OpenMP", "torch was built without it", "the CPU operators run in one thread")
    elif len(runtimes) > 1:
        found = f"{len(runtimes)} runtimes in one process: {', '.join(runtimes)}"
        yield Finding(WARNING, "OpenMP", found, "they compete for the cores: install the packages from one source")
    else:
        yield Finding(OK, "OpenMP", ", ".join(runtimes) or "available")


def _environment(report: info.Report) -> Iterator[Finding]:
    for variable, effect in _VARIABLES.items():
        if value := os.environ.get(variable):
            yield Finding(NOTE, "environment", f"{variable}={value}", effect)


def _operators(report: info.Report) -> Iterator[Finding]:
    if "serving" not in report["operators"]:
        yield Finding(ERROR, "operators", f"cannot be loaded: {report['operators']['missing_because']}")
        return
    from . import operators

    devices = [d["device"] for d in report["devices"] if not d.get("missing_because")]
    for device in devices:
        for name in operators.names():
            subject = f"{name} on {device}"
            served = report["operators"]["serving"][name][device.split(":")[0]]
            if name not in operators.CASES:
                yield Finding(NOTE, subject, f"{served}: not examined")
                continue
            try:
                error = operators.error(name, device)
            except Exception as failure:
                yield Finding(ERROR, subject, f"{served}: {info.one_line(failure)}", "report it with this table")
                continue
            right = error < operators.TOLERANCE
            found = f"{served}: differs from its definition by {error:.1e}"
            yield Finding(OK if right else ERROR, subject, found, "" if right else "report it with this table")


def _numpy_crf(report: info.Report) -> Iterator[Finding]:
    try:
        import numpy as np

        from ..densecrf import DenseCRF2D

        crf = DenseCRF2D(6, 5, 3)
        crf.setUnaryEnergy(np.random.default_rng(0).normal(size=(3, 30)).astype(np.float32))
        crf.addPairwiseGaussian(sxy=2, compat=3)
        total = float(np.abs(np.array(crf.inference(3)).sum(axis=0) - 1).max())
    except Exception as failure:
        yield Finding(ERROR, "densecrf", info.one_line(failure))
        return
    right = total < 1e-5
    yield Finding(OK if right else ERROR, "densecrf", f"probabilities sum to 1 within {total:.1e}")


_EXAMINATIONS = (
    _versions, _libraries, _gpu, _cpu, _threads, _openmp, _environment, _operators, _numpy_crf,
)  # fmt: skip


def examine() -> list[Finding]:
    """All findings, in the order of what depends on what."""
    report = info.collect()
    return [finding for examination in _EXAMINATIONS for finding in examination(report)]


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """Plain data: healthy (no error), and findings."""
    return {"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings]}


def healthy(findings: list[Finding]) -> bool:
    return all(finding.status != ERROR for finding in findings)


def render(findings: list[Finding]) -> str:
    """The findings as a table for people, and a last line that sums up."""
    rows = [["", "what", "found", "advice"], *([f.status, f.subject, f.found, f.advice] for f in findings)]
    counts = {status: sum(f.status == status for f in findings) for status in (ERROR, WARNING, NOTE)}
    summary = ", ".join(f"{count} {status}{'s' * (count != 1)}" for status, count in counts.items())
    return "\n".join([*table(rows), "", f"{'healthy' if healthy(findings) else 'NOT healthy'}: {summary}"])
