"""csrc/core/atrous_depthwise.h, the one definition of the tap geometry, by itself: enumerated, and at 64-bit bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def test_tap_geometry(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).parent / "core" / "tap_geometry.cpp"
    program = tmp_path / "tap_geometry"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
