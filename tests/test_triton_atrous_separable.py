"""Triton kernel of the whole separable block: exact in the interpreter, and it compiles for real GPUs.

As test_triton_atrous_depthwise.py: the interpreted cases (triton_separable_cases.py) run in a process of their own.
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

# Shared memory of one block that every supported GPU has (sm_120: 99 KB).
SHARED_BYTES = 99 << 10


@needs_interpreter
@pytest.mark.parametrize("part", ["definition", "not definition"])
def test_in_the_interpreter(part: str) -> None:
    run_cases("triton_separable_cases.py", interpreted=True, selection=part)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("triton_separable_cases.py", interpreted=False)


def compiled(arch: int, *block: Any, precision: str = "ieee", **options: Any) -> tuple[dict[str, int], str]:
    """What the kernel needs, and its PTX."""
    import triton_resources

    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, precision
    try:
        (launch,) = triton_resources.separable_launches(*block, **options)
    finally:
        conv.fp32_precision = before
    code = triton_resources.compile_launch(launch, arch)
    return triton_resources.inspect(code), code.asm["ptx"]


@compiled_here
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "precision", "tensor_cores"),
    [(torch.bfloat16, "ieee", True), (torch.float32, "tf32", True), (torch.float32, "ieee", False)],
    ids=str,
)
def test_compiles_without_spills(dtype: torch.dtype, precision: str, tensor_cores: bool, layout: str) -> None:
    block = (8, 728, 33, 728)
    usage, ptx = compiled(90, *block, precision=precision, dtype=dtype, channels_last=layout == "nhwc")
    assert usage["spill_bytes"] == 0
    assert usage["shared_bytes"] <= SHARED_BYTES
    assert ("wgmma" in ptx) == tensor_cores
    if layout == "nhwc":
        assert (usage["widest_load_bits"], usage["widest_store_bits"]) == (128, 128)


@compiled_here
@pytest.mark.parametrize("arch", [80, 120])
def test_compiles_for_other_gpus(arch: int) -> None:
    usage, ptx = compiled(arch, 8, 2048, 33, 256, rate=12, dtype=torch.float16)
    assert usage["spill_bytes"] == 0
    assert usage["shared_bytes"] <= SHARED_BYTES
    assert "mma" in ptx


@compiled_here
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_sizes_of_one_and_odd_sizes_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton turns arguments that are 1 into constants; 64-bit offsets, a large kernel and a stride."""
    from deeplab_kernels.triton import _tiling

    channels_last = layout == "nhwc"
    assert compiled(90, 1, 1, 1, 1, kernel=1, dtype=torch.float16, channels_last=channels_last)[0]["registers"] > 0
    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    usage, _ = compiled(90, 2, 37, 33, 19, kernel=5, stride=2, dtype=torch.float16, channels_last=channels_last)
    assert usage["registers"] > 0


def tiles(*size: int, rate: int = 1, channels_last: bool = True) -> tuple[int, int, int, int]:
    """(rows, columns, results of a tile, programs) in 16 bits."""
    import triton_resources

    (launch,) = triton_resources.separable_launches(*size, rate=rate, channels_last=channels_last)
    constants = dict(launch.constants)
    return constants["TILE_H"], constants["TILE_W"], constants["BLOCK_C"], launch.grid[0]


@compiled_here
def test_tiles_follow_the_model_of_costs() -> None:
    assert tiles(8, 728, 33, 728) == (1, 128, 256, 216)  # the depthwise half three times, not eleven
    assert tiles(8, 2048, 33, 256, rate=12) == (1, 128, 256, 72)
    assert tiles(1, 2048, 33, 256, rate=12)[3] >= 64  # few pixels: smaller tiles, more programs
    assert tiles(8, 128, 257, 128)[:3] == (8, 16, 128)  # rows share what their taps read
    assert tiles(8, 128, 257, 128, channels_last=False)[:2] == (1, 128)
    assert tiles(8, 256, 65, 19)[2] == 32


def test_it_is_the_backend_of_cuda_devices() -> None:
    from deeplab_kernels.triton import atrous_separable

    assert _backends.OPERATORS["atrous_separable_conv2d"] == "atrous_separable"
    assert callable(atrous_separable.atrous_separable_conv2d)
