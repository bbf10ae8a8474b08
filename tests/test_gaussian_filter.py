"""Exact Gaussian filter: values and gradients against the whole kernel matrix in float64, and everything torch does
around an operator."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from _filters import NORMALIZATIONS, assert_compiles, assert_near, assert_parts, by_needed, by_opcheck, weighted_sums
from _instruction_sets import run_tests_with
from _sanitizers import run_sanitized
from _threads import assert_same_bits
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import reference
from deeplab_kernels.ops import gaussian_filter

OP = torch.ops.deeplab_kernels.gaussian_filter.default
BACKWARD = torch.ops.deeplab_kernels.gaussian_filter_backward.default
# B, C, N, d
SIZES = [(1, 1, 1, 1), (2, 3, 5, 2), (1, 4, 33, 16), (2, 21, 127, 5), (1, 2, 1000, 3), (1, 65, 40, 3), (1, 1, 700, 1)]
EMPTY = [(0, 3, 5, 2), (2, 0, 5, 2), (2, 3, 0, 2)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def points(size, dtype=torch.float32, spread=2.0):
    batch, channels, n, d = size
    values = torch.randn(batch, channels, n, dtype=torch.float64)
    features = torch.randn(batch, d, n, dtype=torch.float64) * spread
    return [t.to(dtype).requires_grad_() for t in (values, features)]


def by_matrix(values, features, normalization="none"):
    """The definition, with all N x N numbers."""
    square = (features[:, :, :, None] - features[:, :, None, :]).square().sum(1)
    matrix = torch.exp(-square / 2)
    return weighted_sums(values, matrix, normalization)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype, tolerance, normalization):
    values, features = points(size, dtype)
    exact_values, exact_features = (t.detach().double().requires_grad_() for t in (values, features))
    out = gaussian_filter(values, features, normalization)
    exact = by_matrix(exact_values, exact_features, normalization)
    assert out.dtype == dtype
    assert_near(out, exact, tolerance, "out")
    grad = torch.randn_like(out)
    out.backward(grad)
    exact.backward(grad.double())
    assert_near(values.grad, exact_values.grad, tolerance, "gradient of values")
    assert_near(features.grad, exact_features.grad, 2 * tolerance, "gradient of features")


@pytest.mark.parametrize("size", EMPTY, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_empty(size, normalization):
    values, features = points(size)
    out = gaussian_filter(values, features, normalization)
    assert out.shape == values.shape
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision(normalization, dtype):
    values, features = points((1, 5, 200, 3), spread=0.2)
    values = values.detach().to(dtype).requires_grad_()
    exact = by_matrix(values.detach().double(), features.detach().double(), normalization)
    out = gaussian_filter(values, features, normalization)
    assert out.dtype == dtype
    assert_near(out, exact, 2 * torch.finfo(dtype).eps, "out")
    out.float().sum().backward()
    assert values.grad.dtype == dtype
    assert features.grad.dtype == torch.float32
    half = features.detach().to(dtype)
    assert_near(gaussian_filter(values, half), by_matrix(values.detach().double(), half.double()), 8e-3, "half")


def test_half_precision_does_not_overflow_when_normalised():
    values, features = torch.full((1, 1, 3000), 60, dtype=torch.float16), torch.zeros(1, 1, 3000)
    for normalization in NORMALIZATIONS[1:]:
        torch.testing.assert_close(gaussian_filter(values, features, normalization), values)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(normalization):
    values, features = points((2, 3, 9, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda v, f: gaussian_filter(v, f, normalization), (values, features))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradgradcheck(normalization):
    values, features = points((1, 2, 5, 2), torch.float64)
    assert torch.autograd.gradgradcheck(lambda v, f: gaussian_filter(v, f, normalization), (values, features))


@by_needed
def test_one_gradient(needs):
    values, features = (t.detach() for t in points((2, 3, 40, 2)))
    assert_parts(partial(BACKWARD, torch.randn_like(values), values, features), needs)


@by_opcheck
def test_opcheck(dtypes, utility):
    values, features = points((2, 3, 17, 2))
    values, features = (
        t.detach().to(dtype).requires_grad_() for t, dtype in zip((values, features), dtypes, strict=True)
    )
    torch.library.opcheck(OP, (values, features), test_utils=utility)
    grad = torch.randn(values.shape, dtype=torch.promote_types(dtypes[0], torch.float32))
    torch.library.opcheck(BACKWARD, (grad, values.detach(), features.detach(), True, False), test_utils=utility)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compile(normalization):
    assert_compiles(gaussian_filter, *points((1, 3, 20, 2)), normalization)


def test_autocast_computes_in_single_precision():
    values, features = (t.detach() for t in points((1, 3, 50, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        out = gaussian_filter(values.bfloat16(), features, "symmetric")
        raw = OP(values.bfloat16(), features.half())
    assert out.dtype == raw.dtype == torch.float32
    torch.testing.assert_close(out, gaussian_filter(values.bfloat16().float(), features, "symmetric"))
    torch.testing.assert_close(raw, gaussian_filter(values.bfloat16().float(), features.half().float()))


def test_transforms_and_forward_mode():
    values, features = (t.detach() for t in points((2, 3, 9, 2), torch.float64))
    batched = torch.vmap(gaussian_filter)(values[:, None], features[:, None])[:, 0]
    torch.testing.assert_close(batched, gaussian_filter(values, features))
    _, tangent = torch.func.jvp(lambda v: gaussian_filter(v, features), (values,), (values,))
    torch.testing.assert_close(tangent, gaussian_filter(values, features))


def test_flops():
    values, features = points((2, 3, 10, 5))
    with FlopCounterMode(display=False) as counter:
        out = gaussian_filter(values, features)
    assert counter.get_total_flops() == 2 * 2 * 100 * (3 + 5)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 100 * (5 + 3 + 2 * 3 + 5)


def test_strided_inputs():
    values, features = (t.detach() for t in points((2, 6, 31, 6)))
    values, features = values.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2], features[:1, 1:4].expand(2, 3, 31)
    expected = gaussian_filter(values.contiguous(), features.contiguous())
    torch.testing.assert_close(gaussian_filter(values, features), expected)


def test_large_offset_does_not_cancel():
    """Only differences of features count: far from the origin they are as exact as the features themselves."""
    values, features = (t.detach() for t in points((1, 3, 200, 3)))
    features = (features * 64).round() / 64
    torch.testing.assert_close(gaussian_filter(values, features + 4096), gaussian_filter(values, features))


def test_normalised_sums():
    _, features = (t.detach() for t in points((1, 1, 300, 3)))
    ones = torch.ones(1, 1, 300)
    torch.testing.assert_close(gaussian_filter(ones, features, "after"), ones)
    torch.testing.assert_close(gaussian_filter(ones, features, "before").sum(), torch.tensor(300.0))


def test_far_pairs_are_left_out_within_the_bound():
    """Clusters at all distances around the cutoff; the values of the far ones are large, so that leaving them out shows
    against the bound: 2^-24 of the mean |v|, besides the rounding of the sum."""
    n = 1500
    angle = torch.arange(n, dtype=torch.float64)
    features = (torch.stack((angle / 50, (angle / 7).sin())) + 0.1 * torch.randn(2, n, dtype=torch.float64)).float()[
        None
    ]
    values = (torch.rand(1, 2, n) * torch.tensor([1.0, 1000.0])[:, None]).float()
    exact = by_matrix(values.double(), features.double())
    error = (gaussian_filter(values, features).double() - exact).abs()
    allowed = 2**-24 * values.double().abs().mean(-1, keepdim=True) + 2e-6 * exact
    assert (error <= allowed).all()
    exact = by_matrix(values.double(), features.double())
    assert_near(gaussian_filter(values.double(), features.double()), exact, 1e-15 * 8, "float64")


def test_most_of_a_long_line_is_skipped():
    """Time that does not grow with N^2: 200000 points on a line, each near 40 others, against their band alone."""
    n = 200_000
    features = torch.arange(n, dtype=torch.float32)[torch.randperm(n)] / 2
    values = torch.randn(1, 1, n)
    out = gaussian_filter(values, features[None, None])
    order = features.argsort()
    line = values[0, 0, order].double()
    expected = torch.zeros(n, dtype=torch.float64)
    for shift in range(-24, 25):
        kernel = torch.exp(torch.tensor(-(shift**2) / 8, dtype=torch.float64))
        rolled = line.roll(shift)
        if shift > 0:
            rolled[:shift] = 0
        elif shift < 0:
            rolled[shift:] = 0
        expected += kernel * rolled
    torch.testing.assert_close(out[0, 0, order].double(), expected, rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_number_of_threads():
    values, features = (t.detach() for t in points((2, 7, 900, 3)))
    grad = torch.randn_like(values)
    assert_same_bits(lambda: [OP(values, features), *BACKWARD(grad, values, features, True, True)])


def test_equal_points():
    """Nothing to sort, and a point's kernel with its copies is exactly 1."""
    values = torch.ones(1, 1, 130)
    assert (gaussian_filter(values, torch.full((1, 2, 130), 3.25)) == 130).all()
    assert (gaussian_filter(values.double(), torch.full((1, 2, 130), 3.25, dtype=torch.float64)) == 130).all()


def test_huge_features():
    """Squared distances beyond the largest float are far away, no more."""
    features = torch.tensor([[[-1e30, -1e30, 0.0, 1.0, 3e38]]])
    values = torch.tensor([[[1.0, 2.0, 4.0, 8.0, 16.0]]])
    e = torch.tensor(-0.5).exp().item()
    expected = torch.tensor([[[3.0, 3.0, 4 + 8 * e, 8 + 4 * e, 16.0]]])
    torch.testing.assert_close(gaussian_filter(values, features), expected)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    """The portable kernels: sanitizers."""
    selection = "values_and_gradients or far_pairs or one_gradient or huge"
    run_tests_with(isa, [Path(__file__).name], selection, tmp_path)


def test_kernels_under_sanitizers(tmp_path):
    """Both filters' C++ without torch, in several threads: no access out of bounds, nothing undefined."""
    folders = ("gaussian_filter", "local_gaussian_filter")
    run_sanitized("gaussian_filter", [f"{f}/{name}.cpp" for f in folders for name in (f, "kernels")], tmp_path)


VALUES, FEATURES = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
# Arguments that replace good ones, the exception, and what its message must say.
BAD = {
    "values is a list": ({"values": [[[1.0]]]}, TypeError, "values must be a torch.Tensor, got list"),
    "features is None": ({"features": None}, TypeError, "features must be a torch.Tensor, got NoneType"),
    "integers": ({"values": VALUES.long()}, TypeError, "values must be float32.*got torch.int64"),
    "an image": ({"values": VALUES[..., None]}, ValueError, r"values must have shape \(B, C, N\), got \(1, 2, 4, 1\)"),
    "no batch": ({"features": FEATURES[0]}, ValueError, r"features must have shape \(B, d, N\), got \(3, 4\)"),
    "other N": ({"features": FEATURES[..., :3]}, ValueError, r"must have the B and N of values \(1, 2, 4\), got"),
    "other B": ({"features": FEATURES.repeat(2, 1, 1)}, ValueError, r"B and N of values .*, got \(2, 3, 4\)"),
    "0 dimensions": ({"features": FEATURES[:, :0]}, ValueError, "features must have 1 to 16 dimensions, got 0"),
    "17 dimensions": ({"features": torch.ones(1, 17, 4)}, ValueError, "must have 1 to 16 dimensions, got 17"),
    "double features": ({"features": FEATURES.double()}, TypeError, "features must be torch.float32 where values are"),
    "half features": ({"features": FEATURES.half()}, TypeError, "features must be torch.float32 where values are"),
    "devices differ": ({"features": FEATURES.to("meta")}, ValueError, "must be on the device of values, cpu, got meta"),
    "sparse": ({"values": VALUES.to_sparse()}, TypeError, "values must be a dense tensor, got layout torch.sparse_coo"),
    "NaN": ({"features": FEATURES * float("nan")}, ValueError, "features must be finite, got NaN or infinity"),
    "infinity": ({"features": FEATURES * float("inf")}, ValueError, "features must be finite, got NaN or infinity"),
    "unknown normalization": ({"normalization": "both"}, ValueError, 'one of "none", .*"symmetric", got \'both\''),
    "no normalization": ({"normalization": None}, TypeError, 'normalization must be one of "none", .* got None'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    arguments = {"values": VALUES, "features": FEATURES, "normalization": "none"} | changed
    with pytest.raises(error, match=message):
        gaussian_filter(**arguments)


def test_not_finite_values_show_in_their_channel():
    values, features = (t.detach() for t in points((2, 3, 300, 2), spread=30))
    values[0, 1, 7], values[1, 2, 299] = float("nan"), float("inf")
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected[0, 1] = expected[1, 2] = True
    assert torch.equal(gaussian_filter(values, features).isnan(), expected)
    assert torch.equal(reference.gaussian_filter(values, features).isnan(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_features_make_their_image_nan_where_nobody_looks(bad):
    values, features = (t.detach() for t in points((2, 3, 300, 2)))
    features[1, 0, 5] = bad
    grad = torch.randn_like(values)
    for out in (OP(values, features), *BACKWARD(grad, values, features, True, True)):
        assert out[1].isnan().all()
        assert out[0].isfinite().all()


def test_benchmark(monkeypatch, capsys):
    """It checks, times and tabulates; its plain torch contenders compute the same."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import bench_gaussian_filter as bench

    values, features = bench.problem(6, 7, (3, 30))
    grad = torch.randn_like(values)
    torch.testing.assert_close(bench.plain_torch(values, features, 5), reference.gaussian_filter(values, features))
    ours = reference.gaussian_filter_backward(grad, values, features, True, True)
    for a, b in zip(bench.plain_torch_backward(grad, values, features, 5), ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(bench, "SIZES", {"tiny": (6, 7)})
    monkeypatch.setattr(bench.measure, "use_tuned_allocator", lambda: None)
    assert bench.main(["--rounds", "1", "--no-write"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(rows) == len(bench.SIGMAS) + len(bench.RADII)
    with pytest.raises(bench.measure.CheckFailed):
        bench.check(torch.zeros(3), torch.ones(3), "zeros")
