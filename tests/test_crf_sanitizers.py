"""The lattice and the mean field of csrc/cpu by themselves, under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    "tests/core/dense_crf.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in (
            "dense_crf",
            "instruction_set",
            "permutohedral",
            "permutohedral_build",
            "permutohedral_embed_portable",
            "permutohedral_portable",
            "workspace",
        )
    ),
]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_lattice_and_mean_field(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "dense_crf"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter", "-pthread"]
    flags += ["-DDEEPLAB_KERNELS_PORTABLE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    sources = [str(ROOT / source) for source in SOURCES]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True, timeout=400)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
