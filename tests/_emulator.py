"""CUDA sources compiled for the CPU with csrc/emulator, under AddressSanitizer and UBSan, and runs of them."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    "-DDEEPLAB_KERNELS_EMULATOR", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as the drivers number them
# Largest error over the largest magnitude of a result. For 16 bits: one rounding of the result and one of conv(x).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None or not hasattr(os, "posix_spawn"), reason="needs g++ on a POSIX system"
)


def build(temporary: pytest.TempPathFactory, driver: str, kernels: Iterable[Path]) -> Path:
    """The program of tests/emulator/``driver`` and the kernels; sources are compiled once for all tests of a run, in
    whichever process of pytest-xdist comes first."""
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, driver, kernels)


def _build(folder: Path, driver: str, kernels: Iterable[Path]) -> Path:
    program = folder / Path(driver).stem
    if program.exists():
        return program
    sources = [ROOT / "tests/emulator" / driver, CSRC / "emulator/emulator.cpp", *kernels]
    objects = {source: folder / f"{source.name}.o" for source in sources}
    pending = [source for source in sources if not objects[source].exists()]
    running: list[tuple[Path, subprocess.Popen[str]]] = []
    while pending or running:
        while pending and len(running) < 2:
            source = pending.pop()
            command = [CXX, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(objects[source])]
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        source, process = running.pop(0)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "warning" not in errors, errors
    subprocess.run([CXX, "-fsanitize=address,undefined", *map(str, objects.values()), "-o", str(program)], check=True)
    return program


class Run:
    """A driver's output over many calls: the bytes of the results, the barriers that ran, what went wrong."""

    def __init__(
        self, driver: Path, calls: Iterable[bytes], folder: Path, order: str, seed: int = 0, dropped: str = ""
    ) -> None:
        given, results = folder / "calls.bin", folder / f"{order}.bin"
        given.write_bytes(b"".join(calls))
        done = subprocess.run(
            [str(driver), str(given), str(results), order, str(seed), dropped], capture_output=True, text=True,
            timeout=600, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""},
        )  # fmt: skip
        self.error = "" if done.returncode == 0 else done.stderr[-6000:] or f"exit code {done.returncode}"
        self.barriers = done.stdout.split()
        self.data = results.read_bytes()


def assert_barriers_needed(run: Callable[..., Run], barriers: Sequence[str]) -> None:
    """Removing any one of ``barriers`` from the sources changes a result of ``run(order, dropped=barrier)``: the
    emulator would find it missing."""
    assert barriers
    baseline = run("forward")
    for barrier in barriers:
        runs = (run(order, dropped=barrier) for order in ("forward", "reverse"))
        unnoticed = all(found.data == baseline.data and not found.error for found in runs)
        assert not unnoticed, f"without the barrier at {barrier} every result stays the same"


def case_name(case: Any, default: Any, leading: int, text: Callable[[str, Any], str]) -> str:
    """Operator, dtype, layout where the case has one, and what differs from ``default`` after the first ``leading``
    fields, as ``text`` of its name and value."""
    parts = [case.op, str(case.dtype).removeprefix("torch.")]
    if hasattr(case, "channels_last"):
        parts.append("nhwc" if case.channels_last else "nchw")
    for field in list(case.__dataclass_fields__)[leading:]:
        if (value := getattr(case, field)) != getattr(default, field):
            parts.append(f"{field}={text(field, value)}")
    return "-".join(parts)


def generator(name: str) -> torch.Generator:
    """Random numbers of the case of that name."""
    return torch.Generator().manual_seed(sum(ord(ch) * (i + 1) for i, ch in enumerate(name)))


def double(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.bool else t.double()


def encoded(value: Tensor | None, channels_last: bool = False) -> bytes:
    """A tensor as the drivers read it; images (4 dimensions) in (N, H, W, C) order where ``channels_last``."""
    if value is None:
        return struct.pack("<q", -1)
    if channels_last and value.dim() == 4:
        value = value.permute(0, 2, 3, 1)
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


def decoded(
    data: memoryview, offset: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False
) -> tuple[Tensor | None, int]:
    """(what a driver wrote at ``offset``, the offset after it); None where the result was not asked for."""
    (size,) = struct.unpack_from("<q", data, offset)
    offset += 8
    if size < 0:
        return None, offset
    flat = torch.empty(0, dtype=dtype)
    if size:
        flat = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=dtype)
    if channels_last and len(shape) == 4:
        flat = flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    return flat.view(shape) if flat.dim() == 1 else flat, offset + size


def assert_close(results: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float) -> None:
    """The largest error is at most ``tolerance`` of the largest magnitude of a result, or of 1: a weight gradient or a
    sum may cancel, and is judged by the size of what is summed."""
    for i, (result, exact) in enumerate(zip(results, wanted, strict=True)):
        if exact is None:
            assert result is None
            continue
        assert result is not None
        assert result.shape == exact.shape
        if exact.numel() == 0:
            continue
        result = result.double()
        assert torch.equal(result.isnan(), exact.isnan()), f"result {i}"
        exact = exact.nan_to_num(0)
        error = (result.nan_to_num(0) - exact).abs().max().item()
        assert error <= tolerance * max(exact.abs().max().item(), 1.0), f"result {i}"
