"""The whole separable block on a GPU: the Triton kernel against float64.

Skipped without a GPU; DEEPLAB_KERNELS_REHEARSE=1 runs what can run on the CPU kernel (see test_atrous_depthwise.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cases import DTYPES, LAYOUTS, Case
from _cuda_graph import captured
from _separable import Problem
from torch import Tensor

from deeplab_kernels import _library
from deeplab_kernels.ops import atrous_separable

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")

# (geometry, results)
BLOCKS = {
    "middle flow": (Case((2, 728, 33, 33), padding=2, dilation=2), 728),
    "aspp": (Case((1, 512, 33, 33), padding=12, dilation=12), 256),
    "entry flow": (Case((1, 64, 129, 127), padding=1), 128),
    "stride 2": (Case((2, 64, 65, 63), stride=2, padding=1), 64),
    "decoder": (Case((1, 304, 65, 65), padding=1), 256),
    "odd channels": (Case((2, 37, 33, 5), padding=1), 19),
    "one pixel": (Case((4, 16, 1, 1), padding=1), 21),
    "kernel 7": (Case((2, 24, 17, 19), kernel=7, padding=3), 40),
    "sides": (Case((1, 8, 21, 23), padding=(0, 3, 2, 5), dilation=2), 300),
}
if REHEARSAL:
    BLOCKS = {name: block for name, block in BLOCKS.items() if max(block[0].size) < 64}


@pytest.fixture(autouse=True)
def _poisoned_and_in_full_precision() -> Iterator[None]:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before
    torch.use_deterministic_algorithms(False)


def triton(problem: Problem) -> Tensor:
    if REHEARSAL:
        return torch.ops.deeplab_kernels.atrous_separable_conv2d(*problem.raw())
    if "triton" in _library.missing():
        pytest.fail(f"Triton kernels are missing: {_library.missing()['triton']}")
    from deeplab_kernels.triton import atrous_separable as kernels

    return kernels.atrous_separable_conv2d(*problem.raw())


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_triton_agrees_with_float64_and_repeats(block: str, dtype: str, layout: str) -> None:
    if dtype == "tf32":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    storage = DTYPES["fp32" if dtype == "tf32" else dtype]
    case, out_channels = BLOCKS[block]
    problem = Problem(case, out_channels, storage, layout, device=DEVICE)
    out = triton(problem)
    assert out.dtype == storage
    exact = problem.composed(torch.float64)
    two_steps = problem.composed(torch.float64, between=storage).to(storage)
    floor = {"fp32": 3e-6, "tf32": 3e-3, "fp16": 2e-3, "bf16": 1.6e-2}[dtype]
    assert error(out, exact) <= max(2 * error(two_steps, exact), floor)
    assert torch.equal(triton(problem), out)
    if out.shape[1] > 1 and out.shape[2:].numel() > 1:
        assert out.is_contiguous(memory_format=LAYOUTS[layout])


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_in_a_cuda_graph(layout: str) -> None:
    problem = Problem(BLOCKS["aspp"][0], 256, torch.bfloat16, layout, device=DEVICE)
    graph, out = captured(lambda: triton(problem))
    problem.x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, triton(problem))


@needs_gpu
def test_triton_serves_whole_and_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Case((1, 64, 33, 33), padding=1), 64, torch.float16, "nhwc", device=DEVICE)
    called: list[Any] = []
    original = atrous_separable._whole
    monkeypatch.setattr(atrous_separable, "_whole", lambda *a: called.append(a) or original(*a))
    expected = triton(problem)
    assert torch.equal(problem.run("whole"), expected)
    assert torch.equal(problem.run("auto"), expected)
    assert len(called) == 2
    torch.testing.assert_close(problem.run("two_kernels"), expected, atol=2e-2, rtol=2e-2)
