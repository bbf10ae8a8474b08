"""CUDA sources compiled for the CPU with csrc/emulator, under AddressSanitizer and UBSan, and runs of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    "-DDEEPLAB_KERNELS_EMULATOR", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None or not hasattr(os, "posix_spawn"), reason="needs g++ on a POSIX system"
)


def build(folder: Path, driver: str, kernels: Iterable[Path]) -> Path:
    """tests/emulator/``driver`` and the kernels, as a program in ``folder``."""
    sources = [ROOT / "tests/emulator" / driver, CSRC / "emulator/emulator.cpp", *kernels]
    objects = {source: folder / f"{i}.o" for i, source in enumerate(sources)}
    pending = list(sources)
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
    program = folder / "driver"
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
