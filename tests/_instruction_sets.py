"""Tests once more with the kernels of another instruction set, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deeplab_kernels import _library

TESTS = Path(__file__).resolve().parent
SETS = ("portable", "avx2", "avx512")


def run_tests_with(isa: str, files: Sequence[str], selection: str, folder: Path) -> None:
    """The tests of ``files`` that ``selection`` (of pytest's -k) names, run in ``folder``. Skips where this process
    uses the set already, and where the CPU or the build does not have it."""
    if isa == _library.cpu_instruction_set():
        pytest.skip("the set that the other tests use")
    missing = f"this CPU or this build has no {isa} kernels"
    # Unless told otherwise this process uses the best there is.
    if "DEEPLAB_KERNELS_CPU_ISA" not in os.environ and SETS.index(isa) > SETS.index(_library.cpu_instruction_set()):
        pytest.skip(missing)
    program = (
        "import sys, pytest; from deeplab_kernels import _library;"
        f"sys.exit(77 if _library.cpu_instruction_set() != {isa!r} else pytest.main(sys.argv[1:]))"
    )
    options = ["-c", TESTS.parent / "pyproject.toml", f"--rootdir={TESTS.parent}", "-q", "-x", "-p", "no:cacheprovider"]
    arguments = [*options, "-k", selection, *(TESTS / name for name in files)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment | {"DEEPLAB_KERNELS_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"},
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip(missing)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
