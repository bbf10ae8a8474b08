"""The Triton kernels of the Gaussian filters against float64. Collected by test_triton_gaussian_filter.py in a process
of its own; see triton_cases.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from _filters import assert_near
from triton_cases import DEVICE, INTERPRETED, _fast_interpreter  # noqa: F401 (a fixture)

from deeplab_kernels import reference

# The packages' attributes of these names are the functions.
exact = importlib.import_module("deeplab_kernels.triton.gaussian_filter")
local = importlib.import_module("deeplab_kernels.triton.local_gaussian_filter")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(exact, "_BLOCK_I", 32)
        monkeypatch.setattr(exact, "_BLOCK_J", 16)
        monkeypatch.setattr(exact, "_MAX_CHANNELS", 32)
        monkeypatch.setattr(local, "_TILE_H", 2)
        monkeypatch.setattr(local, "_TILE_W", 16)


def random(*sizes, spread=1.0, dtype=torch.float32):
    values, features, grad = (torch.randn(sizes[k], dtype=torch.float64) for k in (0, 1, 0))
    return values.to(DEVICE, dtype), (features * spread).to(DEVICE, torch.float32), grad.to(DEVICE, torch.float32)


def check(name, module, sizes, args=(), spread=1.0, dtype=torch.float32, tolerance=3e-6):
    values, features, grad = random(*sizes, spread=spread, dtype=dtype)
    wide = [t.double() for t in (values, features, grad)]
    out = getattr(module, name)(values, features, *args)
    assert out.dtype == torch.float32
    assert_near(out, getattr(reference, name)(*wide[:2], *args), tolerance, "out")
    backward, definition = (getattr(m, f"{name}_backward") for m in (module, reference))
    both = backward(grad, values, features, *args, True, True)
    expected = definition(wide[2], *wide[:2], *args, True, True)
    assert [t.dtype for t in both] == [dtype, torch.float32]
    half = 1 if dtype == torch.float32 else 2e3 if INTERPRETED else 4e3  # compiled: TF32
    assert_near(both[0], expected[0], tolerance if half > 1 else 3e-6, "gradient of values")
    assert_near(both[1], expected[1], 6e-6 * half, "gradient of features")
    for needs in ((True, False), (False, True)) if sizes[0][0] == 2 else ():
        one = backward(grad, values, features, *args, *needs)
        for k in range(2):
            assert torch.equal(one[k], both[k]) if needs[k] else one[k].shape == (0,)


HALF = [(torch.float16, 1e-3), (torch.bfloat16, 1.6e-2)]
# (B, C, N), d
POINTS = [((1, 1, 1), 1), ((2, 3, 33), 2), ((1, 21, 127), 5), ((1, 40, 20), 3), ((1, 2, 40), 16)]


@pytest.mark.parametrize("case", POINTS, ids=str)
def test_exact(case):
    (batch, channels, n), d = case
    check("gaussian_filter", exact, ((batch, channels, n), (batch, d, n)))


# The interpreter multiplies the bit patterns of bfloat16 matrices.
@pytest.mark.parametrize(("dtype", "tolerance"), HALF[:1] if INTERPRETED else HALF, ids=str)
def test_exact_in_half_precision(dtype, tolerance):
    check("gaussian_filter", exact, ((1, 5, 70), (1, 3, 70)), dtype=dtype, tolerance=tolerance)


def test_exact_skips_far_tiles_within_the_bound(monkeypatch):
    """Points along a curve, most pairs far apart: the result is that of no skipping, up to the bound."""
    sizes = ((1, 2, 300), (1, 2, 300))
    values, _, grad = random(*sizes)
    t = torch.arange(300, device=DEVICE)
    features = torch.stack((t / 4, (t / 9).sin())).float()[None, :, torch.randperm(300)].contiguous()
    seen = []
    launch = exact._launch
    monkeypatch.setattr(exact, "_launch", lambda *args: (seen.append(args[2]), launch(*args)))
    out = exact.gaussian_filter(values, features)
    grads = exact.gaussian_filter_backward(grad, values, features, True, True)
    low, high, cutoff = (seen[1][k] for k in ("low", "high", "cutoff"))
    gap = (low[:, :, :, None] - high[:, :, None, :]).clamp(min=0)
    far = ((gap + gap.mT).square().sum(1) > cutoff).float().mean()
    assert far > 0.5
    expected = reference.gaussian_filter(values.double(), features.double())
    error = (out.double() - expected).abs()
    assert (error <= 2**-24 * values.abs().mean(-1, keepdim=True) + 3e-6 * expected.abs().amax()).all()
    expected = reference.gaussian_filter_backward(grad.double(), values.double(), features.double(), True, True)
    for k in range(2):
        assert_near(grads[k], expected[k], 6e-6, str(k))


def test_exact_far_from_the_origin():
    values, features, _ = random((1, 3, 50), (1, 2, 50))
    features = (features * 64).round() / 64
    torch.testing.assert_close(exact.gaussian_filter(values, features + 4096), exact.gaussian_filter(values, features))


def test_not_finite():
    values, features, grad = random((2, 3, 40), (2, 2, 40))
    values[0, 1, 7], features[1, 0, 3] = float("inf"), float("nan")
    out = exact.gaussian_filter(values, features)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()
    assert out[1].isnan().all()
    grad_values, grad_features = exact.gaussian_filter_backward(grad, values, features, True, True)
    assert grad_values[0].isfinite().all()
    assert grad_values[1].isnan().all()
    assert grad_features.isnan().all()


# (B, C, H, W), d, radius
IMAGES = [
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 3, 3, 9), 2, (1, 2)),
    ((1, 40, 3, 5), 5, (100, 1)),
    ((1, 2, 2, 17), 16, (0, 2)),
]


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_local(case):
    size, d, radius = case
    check("local_gaussian_filter", local, (size, (size[0], d, *size[2:])), (radius,))


@pytest.mark.parametrize(("dtype", "tolerance"), HALF, ids=str)
def test_local_in_half_precision(dtype, tolerance):
    check("local_gaussian_filter", local, ((1, 3, 5, 6), (1, 2, 5, 6)), ((1, 2),), dtype=dtype, tolerance=tolerance)


def test_local_not_finite_features():
    values, features, grad = random((2, 1, 3, 4), (2, 2, 3, 4))
    features[1, 0, 0, 0] = float("inf")
    backward = local.local_gaussian_filter_backward(grad, values, features, (1, 1), True, True)
    for out in (local.local_gaussian_filter(values, features, (1, 1)), *backward):
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


@pytest.mark.parametrize("size", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(size):
    values, features, grad = random(size, (size[0], 2, size[2]))
    assert exact.gaussian_filter(values, features).shape == size
    for ours, like in zip(
        exact.gaussian_filter_backward(grad, values, features, True, True), (values, features), strict=True
    ):
        assert torch.equal(ours, torch.zeros_like(like))
    image, image_features = values[..., None], features[..., None]
    assert local.local_gaussian_filter(image, image_features, (1, 1)).shape == image.shape


def test_double_is_served_by_the_reference():
    values, features = (t.double() for t in random((1, 2, 20), (1, 2, 20))[:2])
    assert torch.equal(exact.gaussian_filter(values, features), reference.gaussian_filter(values, features))
    with pytest.raises(TypeError, match=r"values must be float32, .*got torch.int64"):
        exact.gaussian_filter(values.long(), features)
