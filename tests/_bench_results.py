"""Made-up results files of the benchmarks, for the tests of what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deeplab_kernels.timing import Timing

MACHINE = {"cpu": "Tiny <CPU> & co", "cores": 2, "threads": 2, "copy_gb_per_s": 20.0, "matrix_gflop_per_s": 100.0}


def timing(ms: float, spread: float = 0.05, rounds: int = 5) -> dict[str, float]:
    return {"median_ms": ms, "min_ms": ms, "iqr_ms": spread * ms, "rounds": rounds}


def separable(**times: float) -> dict[str, Any]:
    timings = {name.replace("__", " "): timing(ms) for name, ms in times.items()}
    record = {"name": "A12:2048x33r12->relu->256", "madds": 10**9, "bytes": 10**7, "threads": 2, "timings": timings}
    return {"machine": MACHINE, "commit": "abc", "date": "2026-11-21", "records": [record]}


def models(ours: float = 800.0) -> dict[str, Any]:
    def record(stride: int, madds: int, scale: float) -> dict[str, Any]:
        return {
            "name": f"deeplabv3plus_xception65, output stride {stride}, 513 x 513, N = 1",
            "mode": "inference",
            "case": {"output_stride": stride, "model": "deeplabv3plus_xception65"},
            "madds": madds,
            "gemm_madds_per_s": 50e9,
            "timings": {"ours nchw": timing(ours * scale), "eager nchw": timing(900 * scale)},
            "peak_bytes": {"ours": 3 * 10**8, "eager": 4 * 10**8},
            "threads": 2,
            "commit": "abc",
            "date": "2026-11-21",
        }

    return {"machine": MACHINE, "records": [record(16, 54 * 10**9, 1), record(8, 177 * 10**9, 3)]}


def write(folder: Path, **documents: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def contenders(device: str = "cpu", subject: str = "separable", what: str = "A12:2048x33r12->relu->256", dtype="fp32",
               **times: float) -> dict[str, Any]:  # fmt: skip
    """A file of bench_contenders with one case."""
    case = {"subject": subject, "what": what, "mode": "inference", "batch": 8, "dtype": dtype}
    record = {
        "name": f"{what}/N8 {dtype}", "subject": subject, "mode": "inference", "case": case, "device": device,
        "madds": 10**9, "bytes": 10**7, "threads": 2, "allocator": "tuned",
        "timings": {name.replace("__", " ").replace("_", "-"): full_timing(ms) for name, ms in times.items()},
        "peak_bytes": {"ours nhwc": 5 * 10**6}, "commit": "abc", "date": "2026-11-21",
        "unavailable": {"max-autotune nhwc": "no <compiler>"},
    }  # fmt: skip
    machine = {**MACHINE, "matrix_gflop_per_s_of": {"fp32": 100.0, "bf16": 1000.0}}
    left_out = ["728x33->728/N1 fp16, training"]
    return {"machine": machine, "unavailable": {"tf32": "CUDA only"}, "left_out": left_out, "records": [record]}


def full_timing(ms: float) -> dict[str, float]:
    return Timing((0.9 * ms, ms, 1.2 * ms)).summary()
