"""Triton kernels of the atrous depthwise operators: exact in the interpreter, and they compile for real GPUs.

Whether Triton interprets or compiles is fixed for a process when its kernels are defined. So the interpreted cases
(triton_cases.py) run in a pytest of their own with TRITON_INTERPRET=1, in parts that pytest-xdist can spread, and no
test here or elsewhere sees the variable. On a machine with a GPU the same cases also run there, compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).parent
# Substrings of the names in triton_cases.py; together they select everything.
PARTS = {
    "convolution": "test_convolution",
    "block": "test_block",
    "other": "not test_convolution and not test_block",
}


def run_cases(selection: str, interpreted: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, "triton_cases.py"]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    run_cases(PARTS[part], interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("test", interpreted=False)
