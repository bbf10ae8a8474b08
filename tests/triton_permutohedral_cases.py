"""The Triton passes of the permutohedral lattice against float64. Collected by test_triton_permutohedral.py in a
process of its own; see triton_cases.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from triton_cases import DEVICE, _fast_interpreter  # noqa: F401 (a fixture)

from deeplab_kernels import reference

# The packages' attributes of these names are the functions.
lattice = importlib.import_module("deeplab_kernels.triton.permutohedral")
crf = importlib.import_module("deeplab_kernels.triton.dense_crf")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    monkeypatch.setattr(lattice, "_BLOCK_ROWS", 64)


def assert_near(ours, expected, tolerance):
    assert ours.shape == expected.shape
    if expected.numel():
        error, scale = (ours.double().cpu() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(scale, 1e-2), f"error {error:.2e}, magnitude {scale:.2e}"


def random(*sizes, dtype):
    return [torch.randn(size, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


@pytest.mark.parametrize(
    ("batch", "channels", "dimension", "points", "spread", "dtype"),
    [
        (2, 5, 2, 9, 1.0, torch.float32),
        (1, 3, 3, 5, 0.5, torch.float64),
        (1, 70, 2, 5, 0.3, torch.float32),  # more channels than a program takes
        (1, 1, 4, 3, 0.5, torch.float32),
        (1, 3, 2, 127, 0.0, torch.float32),  # all points in one simplex
        (1, 4, 1, 1, 1.0, torch.float32),
        (1, 3, 2, 0, 1.0, torch.float32),
    ],
)
def test_filter(batch, channels, dimension, points, spread, dtype):
    tolerance = 2e-4 if dtype == torch.float32 else 1e-12
    values, features, grad = random(
        (batch, channels, points), (batch, dimension, points), (batch, channels, points), dtype=dtype
    )
    features *= spread
    wide = [t.double().cpu() for t in (grad, values, features)]
    for normalization, transpose in ((0, False), (1, True), (2, False), (3, True)):
        args = (None, normalization, transpose)
        out = lattice.permutohedral_filter(values, features, *args)
        assert_near(out, reference.permutohedral_filter(*wide[1:], *args), tolerance)
        assert torch.equal(out, lattice.permutohedral_filter(values, features, *args))
        grads = lattice.permutohedral_filter_backward(grad, values, features, *args, True, True)
        expected = reference.permutohedral_filter_backward(*wide, *args, True, True)
        for ours, wanted in zip(grads, expected, strict=True):
            assert_near(ours, wanted, tolerance)


def test_built_lattice():
    values, features = random((2, 5, 9), (2, 2, 9), dtype=torch.float32)
    packed = lattice.permutohedral_lattice(features)
    one, other = (lattice.permutohedral_filter(values, features, given, 3, False) for given in (packed, None))
    assert torch.equal(one, other)


def test_mean_field():
    unary, grad, first, second = random((2, 5, 5), (2, 5, 5), (2, 2, 5), (2, 1, 5), dtype=torch.float32)
    matrices = [-2 * torch.eye(5, device=DEVICE), torch.randn(5, 5, device=DEVICE)]
    mask = torch.rand(2, 5, device=DEVICE) < 0.7
    args = (unary, [first, second], [], matrices, mask, [3, 1], 2)
    wide = [
        [t.double().cpu() if isinstance(t, torch.Tensor) else t for t in a] if isinstance(a, list)
        else a.double().cpu() if a is unary else a.cpu() if a is mask else a
        for a in args
    ]  # fmt: skip
    energy, saved = crf.dense_crf_mean_field(*args, True)
    wanted = reference.dense_crf_mean_field(*wide, True)
    assert_near(energy, wanted[0], 1e-4)
    assert_near(saved, wanted[1], 1e-4)
    results = crf.dense_crf_mean_field_backward(grad, saved, *args, True, True)
    expected = reference.dense_crf_mean_field_backward(grad.double().cpu(), wanted[1], *wide, True, True)
    assert_near(results[0], expected[0], 1e-3)
    for ours, theirs in zip([*results[1], *results[2]], [*expected[1], *expected[2]], strict=True):
        assert_near(ours, theirs, 1e-3)
