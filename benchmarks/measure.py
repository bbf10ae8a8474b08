"""What the benchmarks share: facts of the machine, the allocator's settings, checks, and results files.

Large tensors cost page faults under glibc's default allocator, in ours and in PyTorch alike and more than the
arithmetic, so the commands start themselves again with its thresholds raised (`use_tuned_allocator`);
--default-allocator shows the difference.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_kernels.timing import interleaved

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
RESULTS = Path(__file__).parent / "results"
GEMM_SHAPES = ((2048, 2048, 2048), (1089, 2048, 1536), (4225, 728, 728))

TUNED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


class CheckFailed(AssertionError):
    """A contender's result is not what float64 says; it must not be timed."""


class RefusesOurs(TorchDispatchMode):
    """Raises CheckFailed where an operator of ours is called: what ours is compared with must be PyTorch alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deeplab_kernels":
            raise CheckFailed(f"what stands for plain PyTorch calls {func}")
        return func(*args, **(kwargs or {}))


# The machine.


def allocator() -> str:
    return "tuned" if all(os.environ.get(k) == v for k, v in TUNED_ALLOCATOR.items()) else "default"


def use_tuned_allocator() -> None:
    """Starts this very command again with malloc's thresholds raised: glibc reads them only when a process starts."""
    if sys.platform == "linux" and allocator() != "tuned":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **TUNED_ALLOCATOR})


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found.group(1).strip() if found else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the last level cache; 32 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


def results_folder(gpu: str = "") -> Path:
    """results/<machine>/ (of a GPU by its name), or the folder named by DEEPLAB_KERNELS_RESULTS."""
    if folder := os.environ.get("DEEPLAB_KERNELS_RESULTS"):
        return Path(folder)
    slug = re.sub(r"[^a-z0-9]+", "-", (gpu or cpu_name()).lower()).strip("-")
    return RESULTS / (slug if gpu else f"{slug}-{os.cpu_count()}-cores")


def _commit() -> str:
    """Of the sources beside this file; DEEPLAB_KERNELS_COMMIT names that of a copy without git."""
    if given := os.environ.get("DEEPLAB_KERNELS_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_average() -> float:
    """Processes that wanted a core over the last minute; this one counts once it runs."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def stamp() -> dict[str, str]:
    """What was measured when."""
    return {"commit": _commit(), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")}


def copy_bandwidth(megabytes: int = 256) -> float:
    """GB/s of copying a tensor far larger than the caches (bytes read plus bytes written)."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.nbytes / timing.median / 1e6


def matrix_rate(
    dtype: torch.dtype = torch.float32,
    rounds: int = 9,
    shapes: Sequence[tuple[int, int, int]] = GEMM_SHAPES,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> float:
    """Multiply-Adds per second of the fastest matrix product; ``clock`` as in ``interleaved``."""
    best = 0.0
    for m, k, n in shapes:
        a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)
        timing = interleaved({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, rounds=rounds, clock=clock)[
            "mm"
        ]
        best = max(best, m * k * n / timing.minimum * 1e3)
    return best


def machine() -> dict[str, Any]:
    from deeplab_kernels._library import cpu_instruction_set

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": cache_bytes(),
        "copy_gb_per_s": round(copy_bandwidth(), 1),
        "matrix_gflop_per_s": round(2e-9 * matrix_rate(), 1),
        "instruction_set": cpu_instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value of the reference."""
    if not reference.numel():
        return 0.0
    scale = max(float(reference.abs().max()), 1e-30)
    return float((result.detach().double() - reference).abs().max()) / scale


# Results files.


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"machine": {}, "records": []}
    return json.loads(path.read_text())


def save(path: Path, document: Mapping[str, Any], markdown: str = "") -> None:
    """Writes at once or not at all, so that an interrupted run leaves a readable file; ``markdown`` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in ((path, json.dumps(document, indent=1) + "\n"), (path.with_suffix(".md"), markdown)):
        if text:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(file)


def merge(records: Iterable[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """``records`` with ``new`` in place of an earlier measurement of the same thing."""

    def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return record["name"], record.get("what"), record["mode"], record["allocator"], record["threads"]

    return [*(r for r in records if identity(r) != identity(new)), new]
