"""Triton passes of the permutohedral lattice: exact in the interpreter, and they compile for real GPUs.

As test_triton_atrous_depthwise.py: the interpreted cases (triton_permutohedral_cases.py) run in a process of their own.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from _triton import compiled_here, needs_interpreter, run_cases

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))


@needs_interpreter
def test_in_the_interpreter() -> None:
    run_cases("triton_permutohedral_cases.py", interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("triton_permutohedral_cases.py", interpreted=False)


@compiled_here
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles_without_spills(arch: int) -> None:
    import triton_resources

    found = [
        launch for dtype in (torch.float32, torch.float64) for launch in triton_resources.permutohedral_launches(dtype)
    ]
    assert {launch.kernel.__name__ for launch in found} == {"_splat_kernel", "_blur_kernel", "_slice_kernel"}
    for launch in found:
        assert triton_resources.inspect(triton_resources.compile_launch(launch, arch))["spill_bytes"] == 0


def test_every_operator_is_there() -> None:
    from deeplab_kernels.ops import _backends

    for operator, stem in _backends.OPERATORS.items():
        if stem in ("permutohedral", "dense_crf"):
            assert callable(getattr(importlib.import_module(f"deeplab_kernels.triton.{stem}"), operator))
