"""Runs Triton cases in a pytest of their own: with TRITON_INTERPRET=1 in the interpreter, without it on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent

compiled_here = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set")
needs_interpreter = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason=f"the interpreter of Triton {triton.__version__} needs NumPy < 2.4",
)


def run_cases(file: str, interpreted: bool, selection: str = "") -> None:
    """All cases of tests/``file``, or those that pytest's ``-k selection`` takes, must pass; none may be skipped."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, file]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
