"""Everything that needs a GPU, in one call of ten minutes at most: builds the CUDA library, runs its tests, then times
layers, separable blocks, the ASPP stage and whole networks against cuDNN, PyTorch's native kernels and torch.compile,
and the dense CRF: one case at least for each bar of GPUs in bars.py.

    python benchmarks/gpu_suite.py                 # on a machine with a GPU and nvcc; no network needed
    python benchmarks/gpu_suite.py --rehearse      # without a GPU: the same steps, tiny and on the CPU; writes nothing
    python benchmarks/report.py --readme           # afterwards: README's status from the files

Writes results/<gpu>/: gpu_suite.json (steps, tests file by file, layers, CRF), contenders.json, report.html; with
versions and the commit. The most important comes first, every step has its share of the time and is a process of its
own, and what it measured is on disk after every case, so that a run that is cut short still counts. The library is
built in a temporary copy; the source tree is not touched.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from gpu_report import Report

ROOT = Path(__file__).resolve().parent.parent
FILE = "gpu_suite.json"
GRACE_SECONDS = 20.0  # after which a script that does not keep to its time is stopped


@dataclass(frozen=True)
class Step:
    """share: of the time that is left when it starts. what: of a "test", a pytest selection of ``where``; of a
    "measure", the script."""

    kind: str
    where: str
    share: float
    what: str = ""
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.where}" + (f" ({self.what})" if self.kind == "test" else "")


STEPS = (
    Step("test", "tests/gpu", 0.3, "not triton"),
    Step("measure", "contenders", 0.6, "bench_contenders.py", ("--device", "cuda", "--plan", "gpu-bars")),
    Step("measure", "crf", 0.4, "gpu_crf.py"),
    Step("test", "tests/gpu", 0.6, "triton"),
    Step("test", "tests/test_triton_atrous_separable.py", 0.4, "gpu"),
    Step("test", "tests/test_triton_atrous_spatial_pyramid.py", 0.4, "gpu"),
    Step("test", "tests/test_triton_atrous_depthwise.py", 0.4, "gpu"),
    Step("measure", "pyramid", 0.4, "gpu_pyramid.py"),
    Step("measure", "layers", 0.9, "gpu_layers.py"),
)
REHEARSAL = (
    Step("test", "tests/gpu", 0.4, "one or kernel or opcheck or views or empty or trains"),
    Step("measure", "contenders", 0.6, "bench_contenders.py", ("--device", "rehearsal", "--plan", "gpu-rehearsal")),
    Step("measure", "crf", 0.5, "gpu_crf.py"),
    Step("measure", "pyramid", 0.5, "gpu_pyramid.py"),
    Step("measure", "layers", 0.9, "gpu_layers.py"),
)


def run(command: list[str], timeout: float, cwd: Path, **environment: str) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(timeout, 1),
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        parts = [o.decode(errors="replace") if isinstance(o, bytes) else o or "" for o in (error.stdout, error.stderr)]
        output, code = "".join(parts), "timed out"
    return {"ok": code == 0, "exit": code, "seconds": round(time.monotonic() - start, 1), "tail": output[-4000:]}


def build(report: Report, folder: Path, rehearse: bool) -> Path:
    """Builds a copy of the package for this machine's GPU; returns the tree to work in."""
    if rehearse:
        report.step("build", ok=True, skipped="rehearsal: the installed package serves")
        return ROOT
    import torch

    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "*.egg-info", "demo")
    shutil.copytree(ROOT, tree, ignore=ignore)
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "DEEPLAB_KERNELS_CUDA": "1",
        "DEEPLAB_KERNELS_CUDA_ARCHITECTURES": f"{major}{minor}",
        "MAX_JOBS": str(os.cpu_count() or 2),
    }
    # Only what torch, ninja and a compiler need: no package is fetched.
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], report.left, tree, **environment)
    report.step("build", **result)
    if not result["ok"]:
        raise SystemExit("the build failed; see the report")
    return tree


def test(report: Report, step: Step, tree: Path, limit: float, rehearse: bool) -> None:
    if importlib.util.find_spec("pytest") is None:
        report.step(step.name, ok=False, skipped="pytest is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", step.where, "-k", step.what]
        command += [f"--junitxml={log}", "-o", "junit_family=xunit1"]
        if not rehearse and importlib.util.find_spec("xdist"):
            command += ["-n", "8"]  # most of the time goes into the float64 reference, which runs on the CPU
        environment = (
            {"DEEPLAB_KERNELS_REHEARSE": "1"} if rehearse else {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"}
        )
        result = run(command, limit, tree, **environment)
        report.step(step.name, **result, files=counts(log))


def counts(log: Path) -> dict[str, dict[str, int]]:
    """Tests passed, failed and skipped, by file; from pytest's XML."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(log).iter("testcase") if log.exists() else ():
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(case.get("file", "?"), Counter())[outcome] += 1
    return {file: dict(counter) for file, counter in found.items()}


def measured(report: Report, step: Step, tree: Path, limit: float, rehearse: bool) -> None:
    """Runs a script of benchmarks/ and takes over what it wrote."""
    folder = report.path.parent
    part = folder / f"{step.where}.part.json"
    command = [sys.executable, str(tree / "benchmarks" / step.what), *step.options]
    if step.where == "contenders":
        command += ["--minutes", f"{limit / 60:.2f}", "--compile-limit", f"{limit / 2:.0f}"]
    else:
        command += ["--output", str(part), "--seconds", f"{limit:.0f}", *(["--rehearse"] if rehearse else [])]
    environment = {"DEEPLAB_KERNELS_RESULTS": str(folder), "DEEPLAB_KERNELS_COMMIT": report.data["commit"]}
    if not rehearse:
        environment["PYTHONPATH"] = str(tree)
    # It watches the time itself; what it has written by then is on disk.
    result = run(command, limit + GRACE_SECONDS, tree, **environment)
    if part.exists():
        found = json.loads(part.read_text())
        report.data |= {key: value for key, value in found.items() if key not in ("steps", "elapsed_s")}
        part.unlink()
    report.step(step.name, **result)


def machine() -> dict[str, Any]:
    import torch

    info: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy"):
        if importlib.util.find_spec(package):
            info[package] = importlib.import_module(package).__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def failures(data: dict[str, Any]) -> list[str]:
    failed = [step["step"] for step in data["steps"] if not step.get("ok")]
    failed += [f"{r['layer']} {r['dtype']} {r['layout']}" for r in data.get("layers", []) if "failed" in r]
    failed += [f"{r['pyramid']} {r['dtype']} {r['layout']}" for r in data.get("pyramids", []) if "failed" in r]
    return failed + [r["picture"] for r in data.get("crf", []) if "failed" in r]


def write_page(folder: Path) -> None:
    from suite import page, stored

    (folder / "report.html").write_text(page.render(stored.read(folder)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: results/<gpu>; of a rehearsal a temporary one"
    )
    parser.add_argument("--seconds", type=float, default=570, help="stop in good order before this many (default: 570)")
    parser.add_argument("--rehearse", action="store_true", help="everything but the GPU")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only those whose name contains one of these")
    args = parser.parse_args(arguments)
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --rehearse")
    with tempfile.TemporaryDirectory() as temporary:
        info = machine()
        folder = args.output or (Path(temporary, "results") if args.rehearse else measure.results_folder(info["gpu"]))
        folder.mkdir(parents=True, exist_ok=True)
        report = Report(folder.resolve() / FILE, args.seconds)
        report.data |= {"machine": info, **measure.stamp(), "rehearsal": args.rehearse}
        tree = build(report, Path(temporary), args.rehearse)
        for step in REHEARSAL if args.rehearse else STEPS:
            if args.steps and not any(word in step.name for word in args.steps):
                continue
            limit = step.share * (report.left - 10)
            if limit < 10:
                report.step(step.name, ok=False, skipped="out of time")
                continue
            (test if step.kind == "test" else measured)(report, step, tree, limit, args.rehearse)
        write_page(folder)
        failed = failures(report.data)
    print("failed: " + (", ".join(failed) or "nothing"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
