"""Atrous depthwise convolution: values and gradients against float64, everything torch does around an operator."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _cases import (
    CASES,
    DEVICES,
    DTYPES,
    FEW,
    LAYOUTS,
    Case,
    assert_as_exact_as_torch,
    by_case,
    conv_by_definition,
    conv_of_torch,
    leaves,
    random_conv,
    smaller,
    weight_gradient_magnitude,
)
from _instruction_sets import run_tests_with
from _threads import assert_same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import reference
from deeplab_kernels.ops import atrous_depthwise_conv2d

OP = torch.ops.deeplab_kernels.atrous_depthwise_conv2d.default
BACKWARD = torch.ops.deeplab_kernels.atrous_depthwise_conv2d_backward.default
ROOT = Path(__file__).parent.parent

# The rate is a multiple of the stride: all taps fall on the same places modulo the stride, in the last of all on none.
ON_A_GRID = [
    Case((2, 5, 9, 11), stride=3, padding=3, dilation=3),
    Case((1, 4, 17, 20), stride=2, padding=(1, 3), dilation=(2, 4)),
    Case((2, 3, 16, 9), kernel=5, stride=(1, 3), padding=(9, 7), dilation=(4, 3), multiplier=2),
    Case((1, 2, 1, 1), stride=3, padding=4, dilation=3),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def ours(x, weight, case):
    return atrous_depthwise_conv2d(x, weight, **case.geometry)


# The reference itself: against the definition written as shifted slices, and against torch's convolution.


@pytest.mark.parametrize("case", **by_case())
def test_reference_is_the_definition(case):
    x, weight = random_conv(case, torch.float64)
    y = reference.atrous_depthwise_conv2d(x, weight, *case.normalised)
    grad = torch.randn_like(y)
    expected = conv_by_definition(*(copy := leaves(x, weight)), case)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(y, conv_of_torch(x, weight, case))
    expected.backward(grad)
    grads = reference.atrous_depthwise_conv2d_backward(grad, x.detach(), weight.detach(), *case.normalised, True, True)
    for ours, exact in zip(grads, copy, strict=True):
        torch.testing.assert_close(ours, exact.grad)


# The operator.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case([*CASES, *ON_A_GRID]))
def test_values_and_gradients(case, layout, dtype, device):
    x, weight = random_conv(case, DTYPES[dtype], layout, device)
    plain, exact = leaves(x, weight), leaves(x, weight, dtype=torch.float64)
    y = ours(x, weight, case)
    results = [y, conv_of_torch(*plain, case), conv_by_definition(*exact, case)]
    grad = torch.randn_like(y)
    assert y.shape == case.out_size
    for result in results:
        result.backward(grad.to(result.dtype))
    assert_as_exact_as_torch(*results, "y")
    magnitude = weight_gradient_magnitude(x, grad, case)
    assert_as_exact_as_torch(x.grad, plain[0].grad, exact[0].grad, "gradient of x")
    assert_as_exact_as_torch(weight.grad, plain[1].grad, exact[1].grad, "gradient of weight", magnitude)
    if layout == "nhwc" and min(case.size) > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def geometries():
    axis = st.fixed_dictionaries(
        {
            "size": st.integers(1, 20),
            "kernel": st.integers(1, 5),
            "stride": st.integers(1, 4),
            "dilation": st.integers(1, 9),
            "before": st.integers(0, 12),
            "after": st.integers(0, 12),
        }
    )
    return st.tuples(axis, axis)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    axes=geometries(),
    batch=st.integers(1, 2),
    channels=st.integers(1, 19),
    multiplier=st.integers(1, 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_random_geometry(axes, batch, channels, multiplier, layout, dtype):
    for a in axes:
        assume(a["size"] + a["before"] + a["after"] > a["dilation"] * (a["kernel"] - 1))
    vertical, horizontal = axes
    case = Case(
        (batch, channels, vertical["size"], horizontal["size"]),
        (vertical["kernel"], horizontal["kernel"]),
        (vertical["stride"], horizontal["stride"]),
        (vertical["before"], vertical["after"], horizontal["before"], horizontal["after"]),
        (vertical["dilation"], horizontal["dilation"]),
        multiplier,
    )
    x, weight = random_conv(case, dtype, layout)
    exact = leaves(x, weight, dtype=torch.float64)
    y, expected = ours(x, weight, case), conv_by_definition(*exact, case)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact[0].grad, **tolerance)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, **tolerance)


# Maps of several bands of rows, of columns that fill no vector; rows taken rate by rate, rate and stride together.
LARGE = [
    Case((2, 8, 600, 257), padding="same", dilation=5),
    Case((1, 16, 150, 1031), padding="same", dilation=(24, 7)),
    Case((2, 24, 37, 21), padding="same", dilation=(7, 2)),
    Case((1, 17, 51, 66), padding="same", dilation=36),
    Case((2, 24, 37, 21), stride=(2, 1), padding=(3, 2), dilation=(3, 2)),
    Case((3, 9, 7, 40), padding=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", **by_case(LARGE))
def test_large_maps(case, layout, dtype):
    inputs = random_conv(case, DTYPES[dtype], layout, requires_grad=False)
    expected = conv_by_definition(*(t.double() for t in inputs), case)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == "fp32" else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(ours(*inputs, case).double(), expected, **tolerance)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    files = ["test_atrous_depthwise.py", "test_atrous_depthwise_bn_act.py"]
    selection = "(test_values_and_gradients and cpu and not fp16) or test_random_geometry or test_large_maps"
    run_tests_with(isa, files, selection, tmp_path)


@pytest.mark.parametrize("name", ["sliced", "transposed", "expanded", "offset", "flipped", "negated"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_any_strides(name, dtype):
    base = torch.randn(2, 6, 12, 10, dtype=torch.float64).to(DTYPES[dtype])
    x = {
        "sliced": base.to(memory_format=torch.channels_last)[:, ::2, 1:, ::3],
        "transposed": base.transpose(2, 3)[:, :3],
        "expanded": base[:1, :1, :, :1].expand(2, 3, 12, 7),
        "offset": base.flatten()[1 : 1 + 2 * 3 * 5 * 7].view(2, 3, 5, 7),  # not aligned to a vector
        "flipped": base[:, :3].flip(3).transpose(0, 1).contiguous().transpose(0, 1),
        "negated": torch._neg_view(base[:, :3]),
    }[name]
    weight = torch.randn(3, 1, 6, 3, dtype=torch.float64).to(x.dtype)[:, :, ::2]
    grad_base = torch.randn(2, 3, x.shape[3], x.shape[2], dtype=torch.float64).to(x.dtype)
    case = Case(tuple(x.shape), padding=1)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    exact = leaves(x, weight, dtype=torch.float64)
    y, expected = ours(x, weight, case), conv_by_definition(*exact, case)
    y.backward(grad_base.transpose(2, 3))
    expected.backward(grad_base.transpose(2, 3).double())
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == "fp32" else {"atol": 2e-2, "rtol": 2e-3}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact[0].grad, **tolerance)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, **tolerance)


def test_expanded_gradient():
    case = Case((1, 3, 9, 9), padding=1)
    x, weight = random_conv(case, torch.float64)
    exact = leaves(x, weight)
    ours(x, weight, case).sum().backward()  # the gradient of a sum has stride 0
    conv_by_definition(*exact, case).sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), (exact[0].grad, exact[1].grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dilation", [1, 2, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_inf_propagate(layout, dtype, dilation, stride):
    case = Case((1, 16, 17, 19), stride=stride, padding="same", dilation=dilation)
    x, weight = random_conv(case, DTYPES[dtype], layout)
    weight.data[3] = 0  # 0 * inf is NaN
    for channel, value in ((0, float("nan")), (1, float("inf")), (3, float("inf")), (15, -float("inf"))):
        x.data[0, channel, 8, 9] = value
        x.data[0, channel, 0, 18] = value
    exact = leaves(x, weight, dtype=torch.float64)
    y, expected = ours(x, weight, case), conv_by_definition(*exact, case)
    torch.testing.assert_close(y.double(), expected, atol=0.1, rtol=2e-2, equal_nan=True)
    assert expected.isnan().any()
    assert expected.isinf().any()
    grad = torch.randn_like(y)
    grad[0, 2, 3, 3], grad[0, 5, 0, 0] = float("nan"), float("inf")
    y.backward(grad)
    expected.backward(grad.double())
    for tensor, correct in zip((x, weight), exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), correct.grad, atol=0.5, rtol=2e-2, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_taps_in_the_padding_contribute_nothing(layout, dtype, dilation):
    """Not even where the weight is infinite: padding is left out of the sum, not added as 0 * inf."""
    case = Case((1, 9, 11, 13), padding="same", dilation=dilation)
    x, weight = random_conv(case, DTYPES[dtype], layout)
    x.data.abs_().add_(1)
    weight.data[:, 0, 0, 0] = float("inf")
    y = ours(x, weight, case).detach()
    assert not y.isnan().any()
    assert y[:, :, :dilation].isfinite().all()
    assert y[:, :, :, :dilation].isfinite().all()
    assert y[:, :, dilation:, dilation:].isinf().all()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_requires_grad_of_each_argument(wanted):
    case = FEW[0]
    x, weight = random_conv(case, torch.float64)
    exact = leaves(x, weight)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    y = ours(x, weight, case)
    assert y.requires_grad == any(wanted)
    if y.requires_grad:
        y.square().sum().backward()
        conv_by_definition(*exact, case).square().sum().backward()
    for tensor, correct, want in zip((x, weight), exact, wanted, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, correct.grad)


def test_no_grad_and_inference_mode():
    x, weight = random_conv(FEW[0], torch.float32)
    expected = ours(x, weight, FEW[0]).detach()
    with torch.no_grad():
        y = ours(x, weight, FEW[0])
    assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        y = ours(x, weight, FEW[0])
    assert y.is_inference()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case([smaller(c) for c in FEW]))
def test_gradcheck(case, layout):
    inputs = random_conv(case, torch.float64, layout)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, case), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: ours(x, w, case), inputs, fast_mode=True)


def test_gradcheck_every_element():
    case = Case((2, 2, 4, 3), padding=(1, 0, 2, 1), stride=(1, 2), multiplier=2)
    inputs = random_conv(case, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, case), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: ours(x, w, case), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case([FEW[0], FEW[5], Case((0, 3, 5, 5)), Case((1, 1, 3, 3), multiplier=2)]))
def test_opcheck(case, layout):
    x, weight = random_conv(case, torch.float32, layout)
    torch.library.opcheck(OP, (x, weight, *case.normalised))
    grad = torch.randn_like(ours(x, weight, case))
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(BACKWARD, (grad, x, weight, *case.normalised, *need))


def test_autocast():
    case = FEW[1]
    x, weight = random_conv(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x, weight, case)
        mixed = ours(x.bfloat16(), weight, case)  # as between two layers under autocast
        exact = ours(x.double(), weight.double(), case)
        under_transform = torch.func.vmap(lambda t: ours(t, weight, case))(x[None])[0]
        assert torch.nn.functional.conv2d(x, weight, groups=8).dtype == y.dtype
    assert y.dtype == mixed.dtype == under_transform.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    assert torch.equal(y, mixed)
    assert torch.equal(y, ours(x.bfloat16(), weight.bfloat16(), case))
    torch.testing.assert_close(under_transform, y)
    y.float().square().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_flop_formula():
    case = Case((2, 6, 17, 19), kernel=(3, 5), stride=(1, 2), padding=1, multiplier=2)
    x, weight = random_conv(case, torch.float32)
    with FlopCounterMode(display=False) as torchs, torch.no_grad():
        conv_of_torch(x, weight, case)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        ours(x, weight, case)
    with FlopCounterMode(display=False) as both:
        ours(x, weight, case).sum().backward()
    with FlopCounterMode(display=False) as weight_only:
        ours(x.detach(), weight, case).sum().backward()
    flops = 2 * 3 * 5 * torch.Size(case.out_size).numel()
    assert torchs.get_total_flops() == forward.get_total_flops() == flops
    assert both.get_total_flops() == 3 * flops
    assert weight_only.get_total_flops() == 2 * flops


@pytest.mark.parametrize("case", **by_case([FEW[1], FEW[4]]))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, layout, dynamic):
    x, weight = random_conv(case, torch.float32, layout)
    copies = leaves(x, weight)
    compiled = torch.compile(lambda x, w: ours(x, w, case) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, expected = compiled(x, weight), ours(*copies, case) * 2
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, copies[0].grad)
    assert torch.equal(weight.grad, copies[1].grad)


def test_compile_inductor():
    case = FEW[1]
    x, weight = random_conv(case, torch.float32)
    copies = leaves(x, weight)
    y = torch.compile(lambda x, w: ours(x * 2, w, case).relu(), fullgraph=True)(x, weight)
    expected = ours(copies[0] * 2, copies[1], case).relu()
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), (copies[0].grad, copies[1].grad))


class Layer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return atrous_depthwise_conv2d(x, self.weight, padding="same", dilation=2)


def test_export():
    x, weight = random_conv(Case((2, 5, 9, 11)), torch.float32, requires_grad=False)
    layer = Layer(weight)
    batch, height = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch, 2: height}})
    assert any(node.target == OP for node in program.graph.nodes)
    for size in ((2, 5, 9, 11), (3, 5, 33, 11)):
        other = torch.randn(size)
        assert torch.equal(program.module()(other), layer(other))


def test_functional_transforms():
    case = Case((3, 2, 5, 7), padding=1, dilation=2)
    x, weight = random_conv(case, torch.float64, requires_grad=False)

    def loss(function):
        return lambda w, t: function(t[None], w, case).square().sum()

    single = Case((1, *case.size[1:]), padding=1, dilation=2)
    per_sample = torch.func.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(loss(conv_of_torch))(weight, t) for t in x])
    torch.testing.assert_close(per_sample, expected)
    primal, tangent = torch.func.jvp(lambda t: ours(t, weight, case), (x,), (x + 1,))
    torch.testing.assert_close(tangent, conv_by_definition(x + 1, weight, case))
    torch.testing.assert_close(primal, conv_by_definition(x, weight, case))
    weights = torch.randn(4, *weight.shape, dtype=torch.float64)
    batched = torch.func.vmap(lambda w: ours(x[:1], w, single))(weights)
    torch.testing.assert_close(batched, torch.stack([ours(x[:1], w, single) for w in weights]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, weights[0])
        tangent = torch.autograd.forward_ad.unpack_dual(ours(x, dual, case)).tangent
    torch.testing.assert_close(tangent, conv_by_definition(x, weights[0], case))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functional_transforms_under_compile(transform):
    case = Case((3, 2, 5, 7), padding=1)
    x, weight = random_conv(case, torch.float64, requires_grad=False)
    function = {
        "vmap": lambda w: torch.func.vmap(lambda t: ours(t[None], w, case)[0])(x),
        "grad": torch.func.grad(lambda w: ours(x, w, case).square().sum()),
        "jvp": lambda w: torch.func.jvp(lambda t: ours(x, t, case), (w,), (w,))[1],
    }[transform]
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(weight), function(weight))


def test_functional_call():
    x, weight = random_conv(Case((2, 5, 9, 11)), torch.float32, requires_grad=False)
    layer = Layer(torch.zeros_like(weight))
    assert torch.equal(torch.func.functional_call(layer, {"weight": weight}, (x,)), Layer(weight)(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_bits_with_any_number_of_threads(layout, dtype):
    for case in FEW:
        inputs = random_conv(case, DTYPES[dtype], layout)
        grad = torch.randn(case.out_size).to(DTYPES[dtype])

        def results(case=case, inputs=inputs, grad=grad):
            x, weight = leaves(*inputs)
            y = ours(x, weight, case)
            y.backward(grad)
            return y.detach(), x.grad, weight.grad

        assert_same_bits(results, (1, 2, 3, 4), case)


def test_saved_for_backward():
    """x and the weight, nothing else."""
    case = FEW[3]
    x, weight = random_conv(case, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, weight, case)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_output(layout):
    """Follows x alone; a tensor that is dense in both orders counts as contiguous."""
    x, weight = random_conv(Case((2, 3, 5, 7)), torch.float32, layout)
    for w in (weight, weight.detach().to(memory_format=torch.channels_last)):
        y = atrous_depthwise_conv2d(x, w, padding=1)
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert y.stride() == F.conv2d(x, weight, padding=1, groups=3).stride()
    both = torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last)
    assert atrous_depthwise_conv2d(both, weight, padding=2).is_contiguous()


def test_meta_device():
    for case in CASES:
        x, weight = random_conv(case, torch.bfloat16, device="meta")
        y = ours(x, weight, case)
        assert (y.device.type, tuple(y.shape), y.dtype) == ("meta", case.out_size, torch.bfloat16)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert weight.grad.shape == weight.shape
    huge = torch.empty(1, 2048, 2**20, 2**20, device="meta", dtype=torch.float16)  # 2^51 elements
    weight = torch.empty(2048, 1, 3, 3, device="meta", dtype=torch.float16)
    assert atrous_depthwise_conv2d(huge, weight, stride=2, padding=1).shape == (1, 2048, 2**19, 2**19)


def test_plain_torch_serves_other_kinds_of_tensors():
    """The definition is registered as the operator's fallback for devices and backends without a kernel."""
    schema = "deeplab_kernels::atrous_depthwise_conv2d"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema, "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(schema, "XPU")


@pytest.mark.big
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_31_elements_in(layout):
    size = (1, 2, 32768, 32800)  # pages of zeros that are never written cost no memory
    x = torch.zeros(size, dtype=torch.bfloat16)
    if layout == "nhwc":
        x = torch.zeros(size[0], *size[2:], size[1], dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[:, :, -2:, -2:] = 1
    x[:, :, 0, 0] = 2
    x.requires_grad_()
    weight = torch.ones(2, 1, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = atrous_depthwise_conv2d(x, weight, stride=2, padding=1)
    assert y[0, :, -1, -1].tolist() == [4, 4]
    assert y[0, :, 0, 0].tolist() == [2, 2]
    assert y.count_nonzero() == 4
    grad = torch.zeros_like(y)
    grad[0, :, -1, -1] = 1
    y.backward(grad)
    assert x.grad[0, :, -3:, -3:].eq(1).all()
    assert x.grad.count_nonzero() == 2 * 9
    assert weight.grad[:, 0].tolist() == [[[0, 0, 0], [0, 1, 1], [0, 1, 1]]] * 2


@pytest.mark.big
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_31_elements_out(layout):
    x = torch.zeros(1, 2, 16384, 16400, dtype=torch.bfloat16).to(memory_format=LAYOUTS[layout])
    x[0, :, -1, -1] = 1
    weight = torch.arange(1, 11, dtype=torch.bfloat16).view(10, 1, 1, 1)
    y = atrous_depthwise_conv2d(x, weight)
    assert y.numel() > 2**31
    assert y[0, :, -1, -1].tolist() == list(range(1, 11))
    assert y[0, :, -1, -2].count_nonzero() == 0
