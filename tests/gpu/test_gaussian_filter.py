"""The Gaussian filters on a GPU, through the public functions: values and gradients against float64.

Skipped without a GPU. DEEPLAB_KERNELS_REHEARSE=1 runs the same bodies on the CPU kernels instead, small cases only, so
that a mistake in this file shows before a GPU is at hand.
"""

from __future__ import annotations

import os

import pytest
import torch

from deeplab_kernels import reference
from deeplab_kernels.ops import gaussian_filter, local_gaussian_filter

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
NORMALIZATIONS = ["none", "before", "after", "symmetric"]
PRECISIONS = {"highest": 5e-6, "high": 2e-3}  # of a sum's largest magnitude; the second is TF32

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")


@pytest.fixture(params=PRECISIONS)
def tolerance(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield PRECISIONS[request.param]
    torch.set_float32_matmul_precision(before)


def random(size, d, dtype=torch.float32, spread=1.0):
    values = torch.randn(size, device=DEVICE).to(dtype).requires_grad_()
    features = (torch.randn(size[0], d, *size[2:], device=DEVICE) * spread).requires_grad_()
    return values, features


def assert_near(ours, expected, tolerance, what):
    assert ours.shape == expected.shape, what
    assert ours.isfinite().all(), what
    error, scale = (ours.double() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"{what}: error {error:.2e}, magnitude {scale:.2e}"


def check(function, values, features, tolerance):
    exact = [t.detach().double().requires_grad_() for t in (values, features)]
    out, expected = function(values, features), function(*exact)
    assert_near(out, expected, tolerance, "out")
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for name, ours, theirs in zip(("values", "features"), (values, features), exact, strict=True):
        assert_near(ours.grad, theirs.grad, 2 * tolerance, f"gradient of {name}")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("case", [((1, 1, 1), 1), ((2, 21, 127), 5), ((1, 65, 1000), 3), ((1, 2, 333), 16)], ids=str)
def test_exact(case, normalization, tolerance):
    check(lambda v, f: gaussian_filter(v, f, normalization), *random(*case), tolerance)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("case", [((1, 1, 1, 1), 1), ((2, 21, 33, 127), 5), ((1, 65, 5, 33), 16)], ids=str)
def test_local(case, normalization):
    check(lambda v, f: local_gaussian_filter(v, f, (2, 3), normalization), *random(*case), PRECISIONS["highest"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision(normalization, dtype, tolerance):
    check(lambda v, f: gaussian_filter(v, f, normalization), *random((2, 21, 500), 3, dtype), tolerance)


def test_far_tiles_are_skipped_within_the_bound():
    n = 3000 if REHEARSAL else 60_000
    t = torch.arange(n, device=DEVICE)
    features = torch.stack((t / 20, (t / 9).sin()))[:, torch.randperm(n, device=DEVICE)][None].float()
    values = torch.rand(1, 3, n, device=DEVICE)
    out = gaussian_filter(values, features)
    at = torch.linspace(0, n - 1, 500).long().to(DEVICE)
    square = (features.double()[:, :, at, None] - features.double()[:, :, None, :]).square().sum(1)
    expected = values.double() @ torch.exp(-square / 2).mT
    allowed = 2**-24 * values.double().mean(-1, keepdim=True) + 5e-6 * expected
    assert ((out.double()[:, :, at] - expected).abs() <= allowed).all()


def test_repeats_bit_for_bit():
    values, features = (t.detach() for t in random((2, 21, 2000), 5))
    grad = torch.randn_like(values)
    operator = torch.ops.deeplab_kernels.gaussian_filter.default
    backward = torch.ops.deeplab_kernels.gaussian_filter_backward.default
    first, second = ((operator(values, features), *backward(grad, values, features, True, True)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")
def test_cuda_graph():
    values, features = (t.detach() for t in random((1, 21, 1000), 5))
    gaussian_filter(values, features, "symmetric")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gaussian_filter(values, features, "symmetric")
    values.copy_(torch.randn_like(values))
    features.copy_(torch.randn_like(features))
    graph.replay()
    expected = reference.gaussian_filter(torch.ones_like(values[:, :1]).double(), features.double()).rsqrt()
    expected = expected * reference.gaussian_filter(values.double() * expected, features.double())
    assert_near(out, expected, 5e-6, "replayed")
