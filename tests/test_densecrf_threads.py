"""The numpy module's thread pool (csrc/numpy/thread_pool.cpp) by itself, under ThreadSanitizer and AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_thread_pool(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [str(ROOT / "tests" / "core" / "thread_pool.cpp"), str(ROOT / "csrc" / "numpy" / "thread_pool.cpp")]
    program = tmp_path / "thread_pool"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True, timeout=120)
    # ThreadSanitizer does not follow a process with threads into its child.
    arguments = [] if sanitizer == "thread" else ["--fork"]
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
