"""C++ of csrc/cpu without torch, compiled with a sanitizer and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_sanitized(driver: str, sources: Sequence[str], directory: Path, sanitizer: str = "address,undefined") -> None:
    """Compiles tests/core/<driver>.cpp with these files of csrc/cpu (portable kernels), and runs it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = directory / driver
    # To optimise the checks of UBSan takes minutes, more than they then save.
    optimisation = "-O1" if sanitizer == "thread" else "-O0"
    flags = ["-std=c++20", optimisation, "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter", "-pthread"]
    flags += ["-DDEEPLAB_KERNELS_PORTABLE", "-DDK_ISA=portable"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    shared = ("instruction_set.cpp", "workspace.cpp")
    files = [ROOT / "tests" / "core" / f"{driver}.cpp", *(ROOT / "csrc" / "cpu" / name for name in (*sources, *shared))]
    subprocess.run([compiler, *flags, *map(str, files), "-o", str(program)], check=True, timeout=1200)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
