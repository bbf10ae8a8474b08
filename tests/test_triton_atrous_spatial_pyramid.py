"""Triton kernels of the atrous spatial pyramid: exact in the interpreter, and they compile for real GPUs.

As test_triton_atrous_depthwise.py: the interpreted cases (triton_pyramid_cases.py) run in a process of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _triton import compiled_here, needs_interpreter, run_cases

from deeplab_kernels.ops import _backends

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))


@needs_interpreter
@pytest.mark.parametrize("part", ["definition", "not definition"])
def test_in_the_interpreter(part: str) -> None:
    run_cases("triton_pyramid_cases.py", interpreted=True, selection=part)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("triton_pyramid_cases.py", interpreted=False)


def resources(arch: int, *size: Any, **options: Any) -> list[tuple[str, dict[str, int]]]:
    """(operator, what its own kernel needs) of every launch."""
    import triton_resources

    return [
        (launch.operator, triton_resources.inspect(triton_resources.compile_launch(launch, arch)))
        for launch in triton_resources.pyramid_launches(*size, **options)
        if "pyramid" in launch.kernel.__name__
    ]


@compiled_here
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_compiles_without_spills(layout: str) -> None:
    found = resources(90, 8, 2048, 33, channels_last=layout == "nhwc")
    assert len({operator for operator, _ in found}) == 3
    for operator, usage in found:
        assert usage["spill_bytes"] == 0, operator
        assert layout == "nchw" or usage["widest_load_bits"] == 128, operator


@compiled_here
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_sizes_of_one_large_kernels_and_wide_offsets_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton turns arguments that are 1 into constants, which have fewer methods than values."""
    from deeplab_kernels.triton import _tiling

    options: dict[str, Any] = {"channels_last": layout == "nhwc", "dtype": torch.float16}
    assert all(usage["registers"] > 0 for _, usage in resources(80, 1, 1, 1, (1,), kernel=1, **options))
    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    assert all(usage["registers"] > 0 for _, usage in resources(120, 2, 37, 17, (2,), kernel=5, **options))


def test_it_is_a_backend_of_cuda_devices() -> None:
    from deeplab_kernels.triton import atrous_spatial_pyramid

    own = {name for name, stem in _backends.OPERATORS.items() if stem == "atrous_spatial_pyramid"}
    assert len(own) == 3
    assert own <= set(dir(atrous_spatial_pyramid))
