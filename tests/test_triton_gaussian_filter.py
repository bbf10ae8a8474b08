"""Triton kernels of the Gaussian filters: exact in the interpreter, and they compile for real GPUs.

As test_triton_atrous_depthwise.py: the interpreted cases (triton_gaussian_cases.py) run in a process of their own.
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

# Shared memory of one block that every supported GPU has (sm_120: 99 KB).
SHARED_BYTES = 99 << 10


@needs_interpreter
def test_in_the_interpreter() -> None:
    run_cases("triton_gaussian_cases.py", interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("triton_gaussian_cases.py", interpreted=False)


@compiled_here
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_exact_compiles_without_spills(dtype: torch.dtype, precision: str) -> None:
    import triton_resources

    values = torch.empty(1, 21, 375 * 500, dtype=dtype, device="meta")
    features = torch.empty(1, 5, 375 * 500, device="meta")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = triton_resources.filter_launches(values, features)
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.kernel.__name__ for launch in found} == {"_morton_kernel", "_filter_kernel", "_grad_features_kernel"}
    for launch in found:
        compiled = triton_resources.compile_launch(launch, 90)
        usage = triton_resources.inspect(compiled)
        assert usage["spill_bytes"] == 0, launch.kernel
        assert usage["shared_bytes"] <= SHARED_BYTES, launch.kernel
        if launch.kernel.__name__ == "_filter_kernel":
            tensor_cores = "mma" in compiled.asm["ptx"]
            assert tensor_cores == (
                dict(launch.constants)["PRECISION"] == "tf32" or "*fp16" in dict(launch.signature)["rows"]
            )


@compiled_here
@pytest.mark.parametrize("arch", [80, 100, 120])
def test_exact_compiles_for_other_gpus(arch: int) -> None:
    import triton_resources

    for launch in triton_resources.filter_launches(*(torch.empty(2, 1, 1, device="meta") for _ in range(2))):
        usage = triton_resources.inspect(triton_resources.compile_launch(launch, arch))
        assert usage["spill_bytes"] == 0
        assert usage["shared_bytes"] <= SHARED_BYTES


@compiled_here
@pytest.mark.parametrize("arch", [90, 120])
def test_local_compiles_without_spills(arch: int) -> None:
    import triton_resources

    values, features = torch.empty(1, 21, 99, 101, device="meta"), torch.empty(1, 5, 99, 101, device="meta")
    for launch in triton_resources.filter_launches(values, features, (5, 5)):
        assert triton_resources.inspect(triton_resources.compile_launch(launch, arch))["spill_bytes"] == 0


def test_every_operator_is_there() -> None:
    from deeplab_kernels.ops import _backends

    for operator, stem in _backends.OPERATORS.items():
        if stem in ("gaussian_filter", "local_gaussian_filter"):
            assert callable(getattr(importlib.import_module(f"deeplab_kernels.triton.{stem}"), operator))
            assert _backends.implementation(operator, "triton").__name__ == operator
