"""The 1x1 convolution of training: values and gradients against torch in float64, with any number of threads and
every instruction set, and by itself under AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _cases import DTYPES, LAYOUTS
from _instruction_sets import run_tests_with
from _threads import assert_same_bits
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels.ops import _pointwise
from deeplab_kernels.ops._pointwise import pointwise_conv2d

ROOT = Path(__file__).parent.parent
FORWARD = torch.ops.deeplab_kernels.pointwise_conv2d.default
BACKWARD = torch.ops.deeplab_kernels.pointwise_conv2d_backward.default
# (N, C, H, W), C': ends of panels, runs, tiles and chunks on every side
SIZES = [
    ((2, 3, 5, 7), 4),
    ((1, 1, 1, 1), 1),
    ((2, 37, 9, 1), 6),
    ((1, 259, 3, 43), 100),
    ((3, 24, 33, 33), 19),
    ((1, 800, 2, 3), 780),
    ((2, 64, 31, 37), 300),
    ((2, 16, 47, 61), 13),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(size, out_channels, dtype=torch.float32, layout="nchw"):
    """x, weight and grad_out."""
    torch.manual_seed(sum(size) + out_channels)
    n, c, h, w = size
    x, grad = (torch.randn(n, k, h, w).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for k in (c, out_channels))
    return x, torch.randn(out_channels, c, 1, 1).to(dtype), grad


def exact(x, weight, grad):
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = F.conv2d(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "out_channels"), SIZES, ids=str)
def test_values_and_gradients(size, out_channels, layout, dtype):
    x, weight, grad = inputs(size, out_channels, DTYPES[dtype], layout)
    results = [FORWARD(x, weight), *BACKWARD(grad, x, weight, True, True)]
    terms = (x.shape[1], out_channels, x.numel() // x.shape[1])
    for mine, theirs, count, like in zip(results, exact(x, weight, grad), terms, (grad, x, weight), strict=True):
        assert mine.dtype == x.dtype
        assert mine.stride() == like.stride()
        summed = (3 * count + 12) * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        torch.testing.assert_close(mine.double(), theirs, atol=summed, rtol=torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_with_any_number_of_threads(layout):
    for size, out_channels in SIZES:
        x, weight, grad = inputs(size, out_channels, layout=layout)
        assert_same_bits(
            lambda x=x, weight=weight, grad=grad: [FORWARD(x, weight), *BACKWARD(grad, x, weight, True, True)],
            (1, 2, 4),
        )


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3)], ids=str)
def test_nothing_to_add_up(size):
    x, weight, grad = inputs(size, 5)
    for mine, like in zip([FORWARD(x, weight), *BACKWARD(grad, x, weight, True, True)], (grad, x, weight), strict=True):
        assert mine.shape == like.shape
        assert not mine.any()


def test_layouts_that_differ_and_views():
    x, weight, grad = inputs((2, 12, 6, 9), 8)
    strided = torch.randn(2, 12, 6, 18)[..., ::2].copy_(x)
    for first in (x, strided, x.contiguous(memory_format=torch.channels_last)):
        for second in (grad, grad.contiguous(memory_format=torch.channels_last), grad[:, :1].expand_as(grad)):
            mine = BACKWARD(second, first, weight.transpose(0, 1).contiguous().transpose(0, 1), True, True)
            for a, b in zip(mine, exact(x, weight, second)[1:], strict=True):
                torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    only_x, nothing = BACKWARD(grad, x, weight, True, False)
    assert nothing.shape == (0,)
    assert BACKWARD(grad, x, weight, False, True)[0].shape == (0,)
    torch.testing.assert_close(only_x.double(), exact(x, weight, grad)[1], atol=1e-5, rtol=1e-5)


def test_infinity_and_nan_stay_where_they_belong():
    x, weight, _ = inputs((1, 9, 4, 5), 7)
    x[0, 3, 1, 2], x[0, 0, 3, 4] = torch.inf, torch.nan
    for layout in LAYOUTS.values():
        out = FORWARD(x.contiguous(memory_format=layout), weight)
        torch.testing.assert_close(out, F.conv2d(x, weight), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("many", [1, 10**6], ids=["torch for the large", "own"])
def test_autograd(layout, many, monkeypatch):
    monkeypatch.setattr(_pointwise, "_MANY_CHANNELS", many)
    x, weight, _ = inputs((2, 5, 3, 4), 6, torch.float64, layout)
    tensors = x.requires_grad_(), weight.requires_grad_()
    assert "Pointwise" in type(pointwise_conv2d(*tensors).grad_fn).__name__
    assert torch.autograd.gradcheck(pointwise_conv2d, tensors)
    assert torch.autograd.gradgradcheck(pointwise_conv2d, tensors)
    for frozen in tensors:
        (one,) = (t for t in tensors if t is not frozen)
        frozen.requires_grad_(False)
        pointwise_conv2d(*tensors).square().sum().backward()
        expected = torch.autograd.grad(F.conv2d(*tensors).square().sum(), one)[0]
        torch.testing.assert_close(one.grad, expected)
        assert frozen.grad is None
        frozen.requires_grad_()
        one.grad = None


def test_torch_serves_the_rest():
    x, weight, _ = inputs((2, 5, 3, 4), 6)
    weight.requires_grad_()
    with torch.no_grad():
        assert pointwise_conv2d(x, weight).grad_fn is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pointwise_conv2d(x, weight).dtype == torch.bfloat16
    tangents = torch.func.jvp(lambda t: pointwise_conv2d(t, weight), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangents, F.conv2d(torch.ones_like(x), weight))
    assert pointwise_conv2d(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, weight, grad = inputs((2, 5, 3, 4), 6, layout=layout)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(FORWARD, (x, weight), test_utils=checks)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(BACKWARD, (grad, x, weight, *needs), test_utils=checks)


def test_bad_input_of_the_raw_operators():
    x, weight, grad = inputs((2, 5, 3, 4), 6)
    for bad in ((x[0], weight), (x, weight[:, :4]), (x, weight.expand(6, 5, 3, 3)), (x, weight.double())):
        with pytest.raises(RuntimeError, match="weight"):
            FORWARD(*bad)
    for bad in (grad[:, :5], grad.double(), grad[0]):
        with pytest.raises(RuntimeError, match="grad_out"):
            BACKWARD(bad, x, weight, True, True)
    with pytest.raises(RuntimeError, match="float"):
        FORWARD(x.long(), weight.long())


def test_flops():
    x, weight, _ = inputs((2, 5, 3, 4), 6)
    x.requires_grad_(), weight.requires_grad_()
    counts = []
    for convolve in (pointwise_conv2d, F.conv2d):
        with FlopCounterMode(display=False) as counter:
            convolve(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 5 * 6 * 12


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    run_tests_with(isa, ["test_pointwise.py"], "values_and_gradients or same_bits or nothing", tmp_path)


def test_sanitizers(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "pointwise"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", "-DDEEPLAB_KERNELS_PORTABLE"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    names = ("pointwise", "pointwise_portable", "workspace", "instruction_set")
    sources = [ROOT / "tests/core/pointwise.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in names)]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
