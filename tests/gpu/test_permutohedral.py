"""The permutohedral filter on a GPU, against the definition in float64.

Skipped without a GPU. DEEPLAB_KERNELS_REHEARSE=1 runs the same bodies on the CPU kernels instead (what needs a GPU
stays skipped), so that a mistake in this file shows before a GPU is at hand.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from _cuda_graph import assert_replays, captured
from torch import Tensor

from deeplab_kernels import _library, ops, reference

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")
needs_library = pytest.mark.skipif("cuda" in _library.missing(), reason="needs the CUDA library")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
# Of the largest magnitude. 16-bit values are rounded on the way in and out only.
TOLERANCE = {"fp32": 1e-4, "fp64": 1e-11, "fp16": 2**-9, "bf16": 2**-6}
_ops = torch.ops.deeplab_kernels


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    dimension: int
    points: int
    spread: float = 1.0  # standard deviation of the features
    offset: float = 0.0


CASES = {
    "image": Case(1, 21, 5, 4000),
    "positions": Case(2, 19, 2, 3001, spread=4.0),
    "one channel": Case(3, 1, 3, 127),
    "one point": Case(1, 5, 5, 1),
    "one simplex": Case(1, 8, 2, 5000, spread=0.0, offset=0.37),
    "long lists": Case(1, 24, 3, 20_000, spread=0.2),
    "isolated points": Case(1, 7, 4, 500, spread=100.0),
    "16 dimensions": Case(1, 3, 16, 300, spread=0.1),
    "many channels": Case(1, 600, 2, 65),
    "empty": Case(0, 3, 2, 10),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """values, features, grad_out"""
    g = torch.Generator().manual_seed(2)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(channels: int) -> Tensor:
        return torch.randn(case.batch, channels, case.points, generator=g, dtype=torch.float64)

    features = normal(case.dimension) * case.spread + case.offset
    values, grad = normal(case.channels), normal(case.channels)
    return values.to(DEVICE, dtype), features.to(DEVICE, compute), grad.to(DEVICE, dtype)


def assert_close(result: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert result.shape == wanted.shape
    if wanted.numel():
        assert not result.isnan().any()
        error = (result.double().cpu() - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), 1e-2), f"error {error:.2e}"


@pytest.mark.parametrize("normalization", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition_and_repeats_bit_for_bit(case: str, dtype: str, normalization: int) -> None:
    values, features, grad = tensors(CASES[case], DTYPES[dtype])
    wide = [t.double().cpu() for t in (grad, values, features)]
    for transpose in (False, True):
        arguments = (values, features, None, normalization, transpose)
        wanted = reference.permutohedral_filter(*wide[1:], None, normalization, transpose)
        out = _ops.permutohedral_filter(*arguments)
        assert_close(out, wanted, TOLERANCE[dtype])
        assert torch.equal(out, _ops.permutohedral_filter(*arguments))
        grads = _ops.permutohedral_filter_backward(grad, *arguments, True, True)
        expected = reference.permutohedral_filter_backward(*wide, None, normalization, transpose, True, True)
        again = _ops.permutohedral_filter_backward(grad, *arguments, True, True)
        for ours, theirs, repeated in zip(grads, expected, again, strict=True):
            assert_close(ours, theirs, 10 * TOLERANCE[dtype])
            assert torch.equal(ours, repeated)


@pytest.mark.parametrize("need", list(itertools.product((True, False), repeat=2)))
def test_unneeded_gradients_are_empty(need: tuple[bool, bool]) -> None:
    values, features, grad = tensors(CASES["positions"], torch.float32)
    full = _ops.permutohedral_filter_backward(grad, values, features, None, 3, False, True, True)
    some = _ops.permutohedral_filter_backward(grad, values, features, None, 3, False, *need)
    for wanted, result, needed in zip(full, some, need, strict=True):
        if needed:
            torch.testing.assert_close(result, wanted)
        else:
            assert result.shape == (0,)


def test_built_lattice_gives_the_same_bits() -> None:
    values, features, _ = tensors(CASES["image"], torch.float32)
    lattice = ops.PermutohedralLattice(features)
    for normalization in ("none", "before", "after", "symmetric"):
        direct = ops.permutohedral_filter(values, features, normalization=normalization)
        assert torch.equal(lattice(values, normalization=normalization), direct)


def test_strided_values_and_features() -> None:
    values, features, _ = tensors(CASES["image"], torch.float32)
    wanted = ops.permutohedral_filter(values, features)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (values, features)]
    assert not strided[0].is_contiguous()
    assert torch.equal(ops.permutohedral_filter(*strided), wanted)


def test_gradients_in_double() -> None:
    values, features, _ = tensors(Case(1, 2, 3, 12, spread=0.7), torch.float64)
    inputs = (values.requires_grad_(), features.requires_grad_())
    for normalization in ("none", "before", "after", "symmetric"):
        assert torch.autograd.gradcheck(lambda v, f, n=normalization: ops.permutohedral_filter(v, f, n), inputs)


@needs_gpu
@needs_library
def test_features_that_are_not_finite_give_nan_where_they_are() -> None:
    values, features, _ = tensors(CASES["image"], torch.float32)
    features[0, 2, 100] = float("nan")
    features[0, 4, 200] = float("inf")
    out = _ops.permutohedral_filter(values, features, None, 3, False)
    bad = torch.zeros(out.shape[-1], dtype=torch.bool, device=DEVICE)
    bad[[100, 200]] = True
    assert out[..., bad].isnan().all()
    alone = _ops.permutohedral_filter(values[..., ~bad], features[..., ~bad], None, 3, False)
    torch.testing.assert_close(out[..., ~bad], alone, rtol=1e-4, atol=1e-5)


@needs_gpu
@needs_library
def test_cuda_graph_and_no_synchronisation() -> None:
    values, features, grad = tensors(CASES["long lists"], torch.float32)

    def call() -> tuple[Tensor, ...]:
        out = _ops.permutohedral_filter(values, features, None, 3, False)
        return (out, *_ops.permutohedral_filter_backward(grad, values, features, None, 3, False, True, True))

    graph, out = captured(call, synchronises=False)
    features.mul_(0.7)  # another lattice, of another size
    values.add_(1)
    assert_replays(graph, out, call)


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    values, features, _ = tensors(CASES["image"], torch.float32)
    wanted = ops.permutohedral_filter(values, features)
    late = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would run before the copy
        late.copy_(values)
        out = ops.permutohedral_filter(late, features)
    torch.cuda.synchronize()
    torch.testing.assert_close(out, wanted)


@needs_gpu
def test_a_photograph_sized_lattice_agrees_with_the_cpu() -> None:
    height, width = 375, 500
    g = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.arange(height) / 80, torch.arange(width) / 80, indexing="ij")
    colours = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=g), (height, width), mode="bicubic")[0]
    colours = (colours * 255 + torch.randn(3, height, width, generator=g) * 4) / 13
    features = torch.cat([torch.stack([x, y]), colours]).reshape(1, 5, -1)
    values = torch.rand(1, 21, height * width, generator=g)
    wanted = ops.permutohedral_filter(values, features, "symmetric")
    out = ops.permutohedral_filter(values.cuda(), features.cuda(), "symmetric").cpu()
    # Points on the face of a simplex may fall to either side, which leaves out or adds vertices of no weight.
    assert (out - wanted).norm() <= 1e-3 * wanted.norm()
