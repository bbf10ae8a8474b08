"""Mean-field inference of the dense CRF on a GPU, against the definition in float64. Skipped without a GPU;
DEEPLAB_KERNELS_REHEARSE=1 as in test_permutohedral.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cuda_graph import assert_replays, captured
from torch import Tensor

from deeplab_kernels import _library, nn, ops, reference

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")
needs_library = pytest.mark.skipif("cuda" in _library.missing(), reason="needs the CUDA library")

_ops = torch.ops.deeplab_kernels
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
KERNELS: dict[str, list[tuple[int, int]]] = {  # (feature dimension, normalization)
    "image": [(5, 3), (2, 3)],
    "all normalizations": [(3, 0), (2, 1), (5, 2)],
    "more than a step takes": [(2, n % 4) for n in range(5)],
    "none": [],
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(
    kernels: list[tuple[int, int]], dtype: torch.dtype, batch: int, labels: int, points: int, masked: bool, full: bool
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(4)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    unary = normal(batch, labels, points).to(DEVICE, dtype)
    features = [normal(batch, d, points).to(DEVICE, compute) for d, _ in kernels]
    scale = 1 / (5.0 * points**0.5)  # unnormalised filters sum over all points
    matrices = [normal(labels, labels) / 3 if full else -2 * torch.eye(labels).double() for _ in kernels]
    matrices = [m * (scale if n == 0 else 1) for m, (_, n) in zip(matrices, kernels, strict=True)]
    mask = (torch.rand(batch, points, generator=g) < 0.8).to(DEVICE) if masked else None
    return unary, features, [], [m.to(DEVICE, compute) for m in matrices], mask, [n for _, n in kernels], 3


def widened(value: Any) -> Any:
    if isinstance(value, list):
        return [widened(v) for v in value]
    if isinstance(value, Tensor):
        return value.cpu() if value.dtype == torch.bool else value.double().cpu()
    return value


def flat(results: Any) -> list[Tensor]:
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]


def assert_close(result: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert result.shape == wanted.shape
    if wanted.numel():
        assert not result.isnan().any()
        error = (result.double().cpu() - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), 1e-2), f"error {error:.2e}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("labels", "points", "full"), [(21, 2001, False), (5, 127, True), (1, 33, True), (40, 65, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", KERNELS)
def test_agrees_with_the_definition_and_repeats_bit_for_bit(
    kernels: str, dtype: torch.dtype, labels: int, points: int, full: bool, masked: bool
) -> None:
    call = arguments(KERNELS[kernels], dtype, 2, labels, points, masked, full)
    wide = tuple(map(widened, call))
    energy, saved = _ops.dense_crf_mean_field(*call, True)
    wanted = reference.dense_crf_mean_field(*wide, True)
    assert_close(energy, wanted[0], TOLERANCE[dtype])
    assert_close(saved, wanted[1], TOLERANCE[dtype])
    assert torch.equal(energy, _ops.dense_crf_mean_field(*call, False)[0])
    grad = torch.randn(call[0].shape, dtype=torch.float64).to(DEVICE, dtype)
    expected = flat(reference.dense_crf_mean_field_backward(widened(grad), wanted[1], *wide, True, True))
    kept = flat(_ops.dense_crf_mean_field_backward(grad, saved, *call, True, True))
    recomputed = flat(_ops.dense_crf_mean_field_backward(grad, saved.new_empty(0), *call, True, True))
    for ours, theirs, again in zip(kept, expected, recomputed, strict=True):
        assert_close(ours, theirs, 10 * TOLERANCE[dtype])
        assert torch.equal(ours, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_unary(dtype: torch.dtype) -> None:
    call = arguments(KERNELS["image"], dtype, 1, 21, 500, False, False)
    energy, saved = _ops.dense_crf_mean_field(*call, True)
    assert energy.dtype == dtype
    assert saved.dtype == torch.float32
    wanted, _ = reference.dense_crf_mean_field(*map(widened, call), False)
    assert_close(energy, wanted, 2**-6)


def test_layer_trains() -> None:
    torch.manual_seed(0)
    layer = nn.DenseCRF(5, iterations=3, trainable=True).to(DEVICE)
    logits = torch.randn(2, 5, 17, 23, device=DEVICE, requires_grad=True)
    image = (torch.rand(2, 3, 17, 23, device=DEVICE) * 255).requires_grad_()
    layer(logits, image).square().mean().backward()
    for leaf in (logits, image, *layer.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


@needs_gpu
@needs_library
def test_cuda_graph_and_no_synchronisation() -> None:
    call = arguments(KERNELS["image"], torch.float32, 1, 21, 3000, False, False)
    grad = torch.randn_like(call[0])

    def both() -> list[Tensor]:
        energy, saved = _ops.dense_crf_mean_field(*call, True)
        return flat([energy, *_ops.dense_crf_mean_field_backward(grad, saved, *call, True, True)])

    graph, out = captured(both, synchronises=False)
    call[1][0].mul_(0.8)
    call[0].add_(torch.randn_like(call[0]))
    assert_replays(graph, out, both)


@needs_gpu
def test_agrees_with_the_cpu_kernels_on_a_picture() -> None:
    torch.manual_seed(1)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 10, 14) * 255, (160, 200), mode="bicubic").clamp(0, 255)
    logits = torch.nn.functional.interpolate(torch.randn(1, 21, 10, 14), (160, 200), mode="bilinear") * 3
    layer = nn.DenseCRF(21)
    with torch.no_grad():
        wanted = layer(logits, image)
        out = layer.to(DEVICE)(logits.to(DEVICE), image.to(DEVICE)).cpu()
    assert (out.argmax(1) == wanted.argmax(1)).float().mean() >= 0.999
    assert (out.softmax(1) - wanted.softmax(1)).abs().mean() <= 1e-3


@needs_gpu
@needs_library
def test_too_many_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="labels"):
        ops.dense_crf_mean_field(
            torch.zeros(1, 3000, 4, device="cuda"), [torch.zeros(1, 2, 4, device="cuda")],
            [torch.zeros(3000, 3000, device="cuda")],
        )  # fmt: skip
