"""The Triton kernel of the whole separable block against float64. Collected by test_triton_atrous_separable.py in a
process of its own; see triton_cases.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _cases import LAYOUTS, Case, by_case, conv_by_definition
from _separable import Problem
from triton_cases import DEVICE, INTERPRETED, _fast_interpreter, assert_exact, assert_layout  # noqa: F401 (a fixture)

from deeplab_kernels import reference
from deeplab_kernels.triton import _tiling
from deeplab_kernels.triton import atrous_separable as kernels

CASES = [
    Case((2, 3, 5, 5), padding=1),
    Case((1, 1, 1, 1), kernel=1),
    Case((1, 33, 7, 5), stride=2, padding=1),  # one channel more than two steps
    Case((1, 9, 13, 5), padding="same", dilation=(3, 2)),
    Case((1, 3, 5, 5), padding="same", dilation=40),  # only the centre tap meets the image
    Case((1, 3, 16, 8), padding=1),  # rows and columns of tiles where the layout has them
    Case((1, 4, 32, 8), padding="same", dilation=2),  # the same in each phase of the rate
    Case((1, 3, 9, 17), kernel=(3, 5), padding=(1, 2)),
    Case((1, 3, 9, 7), stride=(3, 1), padding=(2, 0, 0, 5), dilation=(1, 2)),
    Case((1, 2, 33, 3), kernel=5, padding=2),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _small_tiles_in_full_precision(monkeypatch):
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    if INTERPRETED:
        for name in ("_BLOCK_M", "_IEEE_BLOCK_M"):
            monkeypatch.setattr(kernels, name, (32, 16))
        for name in ("_MAX_BLOCK_N", "_IEEE_MAX_BLOCK_N"):
            monkeypatch.setattr(kernels, name, 64)
    yield
    conv.fp32_precision = before


def check(problem):
    out = kernels.atrous_separable_conv2d(*problem.raw())
    dtype = problem.x.dtype
    plain = problem.composed(torch.float32, between=dtype).to(dtype)
    assert_exact(out, plain, problem.composed(torch.float64), "out", dtype)
    assert_layout(out, problem.x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case(CASES))
def test_against_the_definition(case, layout):
    check(Problem(case, 5, torch.float32, layout, device=DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_channels", [1, 16, 33, 130])
def test_number_of_results(out_channels, layout):
    check(Problem(Case((1, 19, 5, 3), padding=1), out_channels, torch.float32, layout, device=DEVICE))


# The interpreter multiplies bfloat16 as integers.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout, dtype):
    check(Problem(Case((2, 40, 7, 5), padding="same", dilation=2), 33, dtype, layout, device=DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_optional(layout):
    case = Case((1, 5, 7, 5), padding=1)
    problem = Problem(case, 6, torch.float32, layout, residual=False, device=DEVICE)
    exact = conv_by_definition(problem.x.double(), problem.depthwise_weight.double(), case)
    exact = F.conv2d(exact, problem.pointwise_weight.double())
    arguments = list(problem.raw())
    arguments[3:17] = [None] * 9 + [0.0, 0.0, 0, 0, 0]
    torch.testing.assert_close(kernels.atrous_separable_conv2d(*arguments).double(), exact, rtol=1e-5, atol=1e-5)
    shift = torch.randn(6, device=DEVICE)  # a bias comes as beta alone
    arguments[9] = shift
    out = kernels.atrous_separable_conv2d(*arguments).double()
    torch.testing.assert_close(out, exact + shift.double().view(-1, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_and_other_tiles(layout, monkeypatch):
    """64-bit offsets give the bits of 32-bit ones; other tiles and columns, the same sums in another cut."""
    problem = Problem(Case((2, 18, 5, 7), padding=1), 40, torch.float32, layout, device=DEVICE)
    out = kernels.atrous_separable_conv2d(*problem.raw())
    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    assert torch.equal(kernels.atrous_separable_conv2d(*problem.raw()), out)
    for name in ("_BLOCK_M", "_IEEE_BLOCK_M"):
        monkeypatch.setattr(kernels, name, (64,))
    for name in ("_MAX_BLOCK_N", "_IEEE_MAX_BLOCK_N"):
        monkeypatch.setattr(kernels, name, 16)
    torch.testing.assert_close(kernels.atrous_separable_conv2d(*problem.raw()), out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_propagates_and_stays_where_it_belongs(layout):
    problem = Problem(Case((1, 9, 7, 9), padding=1), 17, torch.float32, layout, residual=False, device=DEVICE)
    problem.x[0, 3, 2, 4] = torch.nan
    touched = kernels.atrous_separable_conv2d(*problem.raw()).isnan()
    expected = torch.zeros_like(touched)
    expected[:, :, 1:4, 3:6] = True
    assert torch.equal(touched, expected)


def test_strided_tensors_are_copied():
    problem = Problem(Case((1, 3, 9, 9), padding=1), 5, torch.float32, "nhwc", device=DEVICE)
    expected = reference.atrous_separable_conv2d(*problem.raw())
    problem.residual = problem.residual.contiguous()
    problem.norms = [
        norm._replace(mean=torch.stack([norm.mean, norm.mean], 1)[:, 0], var=norm.var.repeat(2)[: len(norm.var)])
        for norm in problem.norms
    ]
    torch.testing.assert_close(kernels.atrous_separable_conv2d(*problem.raw()), expected, rtol=1e-4, atol=1e-5)
    problem.x = problem.x.transpose(2, 3).contiguous().transpose(2, 3)
    out = kernels.atrous_separable_conv2d(*problem.raw())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case((1, 3, 5, 5), padding=1), torch.float64),
        (Case((0, 3, 5, 5), padding=1), torch.float32),
        (Case((2, 0, 5, 5), padding=1), torch.float32),
        (Case((1, 2, 5, 5), padding=1, multiplier=2), torch.float32),
    ],
    ids=str,
)
def test_the_reference_serves_the_rest(case, dtype):
    problem = Problem(case, 4, dtype, "nchw", device=DEVICE)
    out = kernels.atrous_separable_conv2d(*problem.raw())
    assert torch.equal(out, reference.atrous_separable_conv2d(*problem.raw()))


def test_integers_are_refused():
    problem = Problem(Case((1, 3, 5, 5), padding=1), 4, torch.float32, "nchw", device=DEVICE)
    problem.x = problem.x.int()
    with pytest.raises(TypeError, match="x must be float32, float16, bfloat16 or float64"):
        kernels.atrous_separable_conv2d(*problem.raw())
