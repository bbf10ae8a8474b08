"""Gaussian filter with a window: values and gradients against a masked kernel matrix in float64, and everything torch
does around an operator."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from _filters import NORMALIZATIONS, assert_compiles, assert_near, assert_parts, by_needed, by_opcheck, weighted_sums
from _instruction_sets import run_tests_with
from _threads import assert_same_bits
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import reference
from deeplab_kernels.ops import gaussian_filter, local_gaussian_filter

OP = torch.ops.deeplab_kernels.local_gaussian_filter.default
BACKWARD = torch.ops.deeplab_kernels.local_gaussian_filter_backward.default
# (B, C, H, W), d, radius
CASES = [
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 3, 5, 5), 2, (1, 1)),
    ((1, 21, 9, 33), 5, (2, 3)),
    ((1, 7, 17, 16), 3, (0, 5)),
    ((2, 2, 33, 7), 16, (3, 0)),
    ((1, 4, 6, 127), 5, (6, 5)),  # more neighbours than one pass takes
    ((1, 65, 3, 5), 2, (1, 2)),
    ((1, 2, 5, 4), 3, (100, 2**31 - 1)),  # the whole image
    ((1, 5, 7, 9), 3, (0, 0)),
]
EMPTY = [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def images(size, dimensions, dtype=torch.float32, spread=1.0):
    values = torch.randn(size, dtype=torch.float64)
    features = torch.randn(size[0], dimensions, *size[2:], dtype=torch.float64) * spread
    return [t.to(dtype).requires_grad_() for t in (values, features)]


def by_matrix(values, features, radius, normalization="none"):
    """The definition: the kernel matrix of all pixels, with zeros outside the windows."""
    v, f = values.flatten(2), features.flatten(2)
    y, x = (t.flatten() for t in torch.meshgrid(*map(torch.arange, values.shape[2:]), indexing="ij"))
    inside = ((y[:, None] - y).abs() <= radius[0]) & ((x[:, None] - x).abs() <= radius[1])
    matrix = torch.exp(-(f[:, :, :, None] - f[:, :, None, :]).square().sum(1) / 2) * inside
    return weighted_sums(v, matrix, normalization).view(values.shape)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, tolerance, normalization):
    size, dimensions, radius = case
    values, features = images(size, dimensions, dtype)
    exact_values, exact_features = (t.detach().double().requires_grad_() for t in (values, features))
    out = local_gaussian_filter(values, features, radius, normalization)
    exact = by_matrix(exact_values, exact_features, radius, normalization)
    assert out.dtype == dtype
    assert_near(out, exact, tolerance, "out")
    grad = torch.randn_like(out)
    out.backward(grad)
    exact.backward(grad.double())
    assert_near(values.grad, exact_values.grad, tolerance, "gradient of values")
    assert_near(features.grad, exact_features.grad, 2 * tolerance, "gradient of features")


def test_window_of_the_whole_image_is_the_exact_filter():
    values, features = (t.detach() for t in images((2, 3, 9, 11), 3))
    expected = gaussian_filter(values.flatten(2), features.flatten(2)).view(values.shape)
    torch.testing.assert_close(local_gaussian_filter(values, features, (8, 10)), expected)


@pytest.mark.parametrize("size", EMPTY, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_empty(size, normalization):
    values, features = images(size, 2)
    out = local_gaussian_filter(values, features, 2, normalization)
    assert out.shape == values.shape
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision(normalization, dtype):
    values, features = (t.detach() for t in images((1, 5, 9, 10), 3))
    values = values.to(dtype).requires_grad_()
    features.requires_grad_()
    exact = by_matrix(values.detach().double(), features.detach().double(), (2, 1), normalization)
    out = local_gaussian_filter(values, features, (2, 1), normalization)
    assert out.dtype == dtype
    assert_near(out, exact, 2 * torch.finfo(dtype).eps, "out")
    out.float().sum().backward()
    assert values.grad.dtype == dtype
    assert features.grad.dtype == torch.float32


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(normalization):
    values, features = images((1, 2, 4, 3), 2, torch.float64)
    assert torch.autograd.gradcheck(lambda v, f: local_gaussian_filter(v, f, (1, 2), normalization), (values, features))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradgradcheck(normalization):
    values, features = images((1, 1, 3, 2), 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda v, f: local_gaussian_filter(v, f, 1, normalization), (values, features))


@by_needed
def test_one_gradient(needs):
    values, features = (t.detach() for t in images((2, 3, 6, 7), 2))
    assert_parts(partial(BACKWARD, torch.randn_like(values), values, features, [2, 1]), needs)


@by_opcheck
def test_opcheck(dtypes, utility):
    inputs = zip(images((2, 3, 4, 5), 2), dtypes, strict=True)
    values, features = (t.detach().to(dtype).requires_grad_() for t, dtype in inputs)
    torch.library.opcheck(OP, (values, features, [1, 2]), test_utils=utility)
    grad = torch.randn(values.shape, dtype=torch.promote_types(dtypes[0], torch.float32))
    arguments = (grad, values.detach(), features.detach(), [1, 2], True, False)
    torch.library.opcheck(BACKWARD, arguments, test_utils=utility)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compile(normalization):
    assert_compiles(local_gaussian_filter, *images((1, 3, 5, 6), 2), (1, 2), normalization)


def test_autocast_computes_in_single_precision():
    values, features = (t.detach() for t in images((1, 3, 5, 6), 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = local_gaussian_filter(values.bfloat16(), features, 1, "symmetric")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, local_gaussian_filter(values.bfloat16().float(), features, 1, "symmetric"))


def test_transforms_and_forward_mode():
    values, features = (t.detach() for t in images((2, 3, 4, 5), 2, torch.float64))

    def filtered(v, f):
        return local_gaussian_filter(v, f, 1)

    torch.testing.assert_close(
        torch.vmap(filtered)(values[:, None], features[:, None])[:, 0], filtered(values, features)
    )
    _, tangent = torch.func.jvp(lambda v: filtered(v, features), (values,), (values,))
    torch.testing.assert_close(tangent, filtered(values, features))


def test_flops_count_neighbours_inside_the_image():
    values, features = images((2, 3, 4, 5), 6)
    pairs = 2 * (2 + 3 + 3 + 2) * (3 + 4 + 5 + 4 + 3)
    with FlopCounterMode(display=False) as counter:
        out = local_gaussian_filter(values, features, (1, 2))
    assert counter.get_total_flops() == 2 * pairs * (3 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (6 + 3 + 2 * 3 + 6)


def test_strided_inputs():
    values, features = (t.detach() for t in images((2, 6, 9, 10), 4))
    values = values.contiguous(memory_format=torch.channels_last)[:, ::2, :, 1:]
    features = features[:1, 1:3, :, 1:].expand(2, 2, 9, 9)
    expected = local_gaussian_filter(values.contiguous(), features.contiguous(), (1, 2))
    torch.testing.assert_close(local_gaussian_filter(values, features, (1, 2)), expected)


def test_same_bits_for_any_number_of_threads():
    values, features = (t.detach() for t in images((2, 7, 15, 20), 3))
    grad = torch.randn_like(values)
    assert_same_bits(lambda: [OP(values, features, [3, 3]), *BACKWARD(grad, values, features, [3, 3], True, True)])


def test_constant_image():
    values = torch.full((1, 1, 6, 7), 3.0)
    features = torch.full((1, 2, 6, 7), 1e6)
    n = local_gaussian_filter(torch.ones_like(values), features, (1, 2))
    rows, columns = torch.tensor([2, 3, 3, 3, 3, 2]), torch.tensor([3, 4, 5, 5, 5, 4, 3])
    assert torch.equal(n[0, 0], (rows[:, None] * columns).float())
    torch.testing.assert_close(local_gaussian_filter(values, features, (1, 2), "after"), values)


VALUES, FEATURES = torch.ones(1, 2, 4, 5), torch.ones(1, 3, 4, 5)
# Arguments that replace good ones, the exception, and what its message must say.
BAD = {
    "values without width": (
        {"values": VALUES[..., 0]},
        ValueError,
        r"values must have shape \(B, C, H, W\), got \(1, 2",
    ),
    "other width": ({"features": FEATURES[..., :3]}, ValueError, r"must have the B and H, W of values \(1, 2, 4, 5\)"),
    "17 dimensions": ({"features": torch.ones(1, 17, 4, 5)}, ValueError, "must have 1 to 16 dimensions, got 17"),
    "double features": ({"features": FEATURES.double()}, TypeError, "features must be torch.float32 where values are"),
    "NaN": ({"features": FEATURES * float("nan")}, ValueError, "features must be finite, got NaN or infinity"),
    "negative radius": ({"radius": -1}, ValueError, "radius must be at least 0, got -1"),
    "huge radius": ({"radius": (1, 2**31)}, ValueError, "radius must be at most 2147483647, got"),
    "three radii": (
        {"radius": (1, 1, 1)},
        ValueError,
        r"radius must be an int or \(vertical, horizontal\), got \(1, 1, 1",
    ),
    "no radius": ({"radius": None}, TypeError, "radius must be an int or a pair of ints, got None"),
    "fraction": ({"radius": 1.5}, TypeError, "radius must be an int or a pair of ints, got 1.5"),
    "unknown normalization": ({"normalization": "all"}, ValueError, "normalization must be one of .*, got 'all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    arguments = {"values": VALUES, "features": FEATURES, "radius": 1, "normalization": "none"} | changed
    with pytest.raises(error, match=message):
        local_gaussian_filter(**arguments)


def test_not_finite_values_show_in_their_window():
    values, features = (t.detach() for t in images((1, 2, 9, 9), 2))
    values[0, 1, 4, 4] = float("nan")
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected[0, 1, 3:6, 2:7] = True
    assert torch.equal(local_gaussian_filter(values, features, (1, 2)).isnan(), expected)
    assert torch.equal(reference.local_gaussian_filter(values, features, (1, 2)).isnan(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_features_make_their_image_nan_where_nobody_looks(bad):
    values, features = (t.detach() for t in images((2, 3, 9, 10), 2))
    features[1, 0, 5, 5] = bad
    grad = torch.randn_like(values)
    for function, backward in (
        (OP, BACKWARD),
        (reference.local_gaussian_filter, reference.local_gaussian_filter_backward),
    ):
        for out in (function(values, features, [1, 1]), *backward(grad, values, features, [1, 1], True, True)):
            assert out[1].isnan().all()
            assert out[0].isfinite().all()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    """The portable kernels: sanitizers."""
    run_tests_with(isa, [Path(__file__).name], "values_and_gradients or one_gradient", tmp_path)
