"""What is installed, what was built, and which backend serves each operator on each device.

Every part is collected on its own: where torch or a native library is missing or does not load, the report says so and
goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from . import __version__, _artefacts
from ._text import table

Report = dict[str, Any]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _versions() -> Report:
    versions: Report = {"deeplab_kernels": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "triton", "numpy")}
    with contextlib.suppress(Exception):
        # Says which build it is (+cpu, +cu130), which the installed package's record may not.
        versions["torch"] = importlib.import_module("torch").__version__
    return versions


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _devices() -> list[Report]:
    """The CPU and every accelerator; where there is no CUDA device, an entry with the reason."""
    cpu: Report = {"device": "cpu", "name": _cpu_model(), "machine": platform.machine(), "cores": os.cpu_count()}
    try:
        import torch
    except Exception as error:
        return [cpu, {"device": "cuda", "missing_because": f"torch does not import: {one_line(error)}"}]
    if torch.version.cuda is None:
        return [cpu, {"device": "cuda", "missing_because": f"torch {torch.__version__} has no CUDA"}]
    if not torch.cuda.is_available():
        return [cpu, {"device": "cuda", "missing_because": "torch sees no CUDA device (no GPU, or no driver)"}]
    devices = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "architecture": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
            }
        )
    return devices


def _threads() -> Report:
    threads: Report = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if hasattr(os, "sched_getaffinity"):
        threads["cores_allowed"] = len(os.sched_getaffinity(0))
    try:
        import torch
    except Exception:
        return threads
    return threads | {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()}


def _library(name: str, file: Path | None, missing_because: str | None) -> Report:
    size = file.stat().st_size if file else None
    return {"name": name, "file": str(file) if file else None, "bytes": size, "missing_because": missing_because}


def _torch_libraries() -> tuple[list[Report], Report]:
    """(_C and _C_cuda, the backends of each operator)."""
    cpu, cuda = (_artefacts.find_library(name) for name in ("_C", "_C_cuda"))
    try:
        backends = importlib.import_module("deeplab_kernels.ops._backends")
        library = importlib.import_module("deeplab_kernels._library")
        separable = importlib.import_module("deeplab_kernels.ops.atrous_separable")
        pyramid = importlib.import_module("deeplab_kernels.ops.atrous_spatial_pyramid")
    except Exception as error:
        reason = one_line(error)
        cuda_reason = reason if cuda else _artefacts.build_info().get("cuda_missing_because") or reason
        return [_library("_C", cpu, reason), _library("_C_cuda", cuda, cuda_reason)], {"missing_because": reason}
    missing = library.missing()
    operators = {
        "cpu_instruction_set": library.cpu_instruction_set(),
        "serving": {name: backends.serving(name) for name in backends.OPERATORS},
        "missing": missing,
        "separable_execution": separable.describe_execution(),
        "pyramid_execution": pyramid.describe_execution(),
    }
    return [_library("_C", cpu, None), _library("_C_cuda", cuda, missing.get("cuda"))], operators


def _numpy_library() -> Report:
    file = _artefacts.find_library("_densecrf")
    reason = None
    try:
        importlib.import_module("deeplab_kernels._densecrf")
    except Exception as error:
        reason = one_line(error) if file else f"not built: {_artefacts.not_built_hint()}"
    return _library("_densecrf", file, reason)


def collect() -> Report:
    """The report as plain data: keys versions, build, libraries, threads, devices, operators.

    In ``libraries`` and ``devices``, ``missing_because`` is None or absent for what works. ``operators`` has
    ``serving`` (operator -> device -> backend), ``missing`` (backend -> reason), ``separable_execution`` (device ->
    "whole" or "two_kernels"), ``pyramid_execution`` likewise and ``cpu_instruction_set``, or only ``missing_because``
    where the operators cannot be loaded at all.
    """
    libraries, operators = _torch_libraries()
    return {
        "versions": _versions(),
        "build": _artefacts.build_info(),
        "libraries": [*libraries, _numpy_library()],
        "threads": _threads(),
        "devices": _devices(),
        "operators": operators,
    }


def _build_lines(build: Report) -> list[str]:
    if not build:
        return [f"  no record of the build: {_artefacts.no_record_hint()}"]
    cuda = build.get("cuda")
    gpu = f"none: {build['cuda_missing_because']}"
    if cuda:
        gpu = f"{', '.join(f'sm_{a}' for a in cuda['architectures'])} and PTX of the last one ({cuda['nvcc']})"
    return table(
        [
            ["built with", f"{build['compiler']}, torch {build['torch']}, python {build['python']}"],
            ["CPU", f"{build['machine']}: {', '.join(build['cpu_instruction_sets'])}"],
            ["GPU", gpu],
        ]
    )


def _library_lines(libraries: list[Report]) -> list[str]:
    rows = []
    for library in libraries:
        built = f"{library['bytes'] / 2**20:.1f} MiB" if library["file"] else "not built"
        reason = library["missing_because"]
        rows.append([library["name"], built, f"not loaded: {reason}" if reason else "loaded"])
    return table(rows)


def _device_lines(devices: list[Report]) -> list[str]:
    rows = []
    for device in devices:
        if device.get("missing_because"):
            rows.append([device["device"], f"none: {device['missing_because']}"])
            continue
        extra = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        rows.append([device["device"], f"{device['name']} ({extra})"])
    return table(rows)


def _operator_lines(operators: Report, has_cuda: bool) -> list[str]:
    if "serving" not in operators:
        return [f"  none: {operators['missing_because']}"]
    cuda = "cuda" if has_cuda else "cuda (no device here)"
    rows = [["", "cpu", cuda, "other devices"]]
    rows += [[name, s["cpu"], s["cuda"], s["other"]] for name, s in operators["serving"].items()]
    lines = table(rows)
    for what, key in (
        ("separable convolution, float32 inference", "separable_execution"),
        ("spatial pyramid of separable convolutions", "pyramid_execution"),
    ):
        lines.append(f"  {what}: " + ", ".join(f"{device}: {how}" for device, how in operators[key].items()))
    return lines + [f"  {name} cannot serve: {reason}" for name, reason in operators["missing"].items()]


def render(report: Report) -> str:
    """The report as text for people."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in report["versions"].items())
    threads = ", ".join(f"{name} {'unset' if value is None else value}" for name, value in report["threads"].items())
    has_cuda = any(d["device"].startswith("cuda") and not d.get("missing_because") for d in report["devices"])
    sections = {
        "Build": _build_lines(report["build"]),
        "Libraries": _library_lines(report["libraries"]),
        "Devices": _device_lines(report["devices"]),
        "Operators: which backend serves where": _operator_lines(report["operators"], has_cuda),
    }
    lines = [versions, f"{sys.executable}, package in {_artefacts.HERE}", f"threads: {threads}"]
    for title, body in sections.items():
        lines += ["", title, *body]
    return "\n".join(lines)
