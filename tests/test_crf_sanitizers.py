"""The lattice and the mean field of csrc/cpu by themselves, under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from _sanitizers import run_sanitized

SOURCES = [
    "dense_crf/dense_crf.cpp",
    *(f"permutohedral/{name}.cpp" for name in ("permutohedral", "build", "embed_kernels", "kernels")),
]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_lattice_and_mean_field(tmp_path: Path, sanitizer: str) -> None:
    run_sanitized("dense_crf", SOURCES, tmp_path, sanitizer)
