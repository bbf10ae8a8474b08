"""The 1x1 convolution of training, alone and with the batch normalisation after it: values and gradients against torch
in float64, with any number of threads and every instruction set, and by itself under AddressSanitizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _cases import DTYPES, LAYOUTS, assert_as_exact_as_torch
from _instruction_sets import run_tests_with
from _sanitizers import run_sanitized
from _threads import assert_same_bits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import ops, reference
from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.nn.functional import norm_act, pointwise, pointwise_norm_act
from deeplab_kernels.ops import _pointwise
from deeplab_kernels.ops._pointwise import pointwise_bn_act, pointwise_conv2d

FORWARD = torch.ops.deeplab_kernels.pointwise_conv2d.default
BACKWARD = torch.ops.deeplab_kernels.pointwise_conv2d_backward.default
NORM_ACT = torch.ops.deeplab_kernels.pointwise_bn_act_training.default
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


# With the batch normalisation that follows.


def norm_inputs(size, out_channels, dtype=torch.float32, layout="nchw", mean=0.0):
    """x, weight, residual, gamma, beta; z has about this mean."""
    x, weight, residual = inputs(size, out_channels, dtype, layout)
    x[:, 0], weight[:, 0] = 1, mean
    vectors = (torch.randn(out_channels, dtype=torch.promote_types(dtype, torch.float32)) + 1 for _ in range(2))
    return [t.requires_grad_() for t in (x, weight, residual, *vectors)]


def in_turn(x, weight, residual, gamma, beta, running=(None, None), activation="relu"):
    out = F.batch_norm(F.conv2d(x, weight), *running, gamma, beta, True, 0.1, 1e-5)
    out = out if residual is None else out + residual
    return {"relu": F.relu, "relu6": F.relu6, None: lambda t: t}[activation](out)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics(layout, dtype, mean):
    """Of the values that are kept, as exact as torch's own; out is batch_norm_act's."""
    for size, out_channels in SIZES:
        tensors = [t.detach() for t in norm_inputs(size, out_channels, DTYPES[dtype], layout, mean)]
        out, z, *found = NORM_ACT(*tensors, 1e-5, 1)
        assert torch.equal(z, FORWARD(*tensors[:2]))
        assert out.stride() == z.stride() == tensors[2].stride()
        values = z.to(found[0].dtype)
        plain, exact = (torch.var_mean(v, (0, 2, 3), correction=0) for v in (values, values.double()))
        magnitudes = 16 * exact[0].max().item(), values.abs().max().item()
        for name, *three, magnitude in zip(("var", "mean"), reversed(found), plain, exact, magnitudes, strict=True):
            assert_as_exact_as_torch(*three, f"{name}, {size}, {out_channels}", magnitude)
        normalised = torch.ops.deeplab_kernels.batch_norm_act_training(z, *tensors[2:], 1e-5, 1)[0]
        torch.testing.assert_close(out, normalised, atol=1e-4, rtol=1e-4 if dtype in ("fp32", "fp64") else 1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_map_that_starts_far_from_the_rest(layout):
    """Where the first values of every group are zero and the others nearly equal, nothing cancels."""
    x = torch.full((1, 1, 64, 512), 100.0) + torch.randn(1, 1, 64, 512)
    x.view(-1, 64)[:, 0] = 0
    weight = torch.ones(3, 1, 1, 1)
    x = x.repeat(1, 2, 1, 1)[:, :1].contiguous() if layout == "nchw" else torch.cat([x, x], 1)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = weight.expand(3, x.shape[1], 1, 1).contiguous()
    _, z, mean, var = NORM_ACT(x, weight, None, None, None, 1e-5, 0)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_have_the_same_bits_with_any_number_of_threads(layout):
    for size, out_channels in SIZES:
        tensors = [t.detach() for t in norm_inputs(size, out_channels, layout=layout)]
        assert_same_bits(lambda tensors=tensors: NORM_ACT(*tensors, 1e-5, 1), (1, 2, 3, 4), size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinity_and_nan_reach_their_channels(layout):
    x, weight, *_ = (t.detach() for t in norm_inputs((2, 9, 14, 45), 7, layout=layout))
    weight[3:] = 0
    weight[5, 4] = torch.inf
    running, expected = ([torch.zeros(7), torch.ones(7)] for _ in range(2))
    weight.requires_grad_()
    mine = pointwise_bn_act(x, weight, None, None, *running)
    torch.testing.assert_close(mine, in_turn(x, weight, None, None, None, expected), equal_nan=True)
    assert mine[:, 5].isnan().all()
    for channels in (slice(0, 5), slice(6, 7)):
        for one, other in zip(running, expected, strict=True):
            torch.testing.assert_close(one[channels], other[channels])
    assert not any(t[5].isfinite() for t in running)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu6", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_autograd(layout, activation, residual):
    tensors = norm_inputs((2, 5, 3, 4), 6, torch.float64, layout)
    if not residual:
        tensors[2] = None
    given = [t for t in tensors if t is not None]
    running, expected = ([torch.zeros(6).double(), torch.ones(6).double()] for _ in range(2))

    def function(*given, running=(None, None)):
        x, weight, *middle, gamma, beta = given
        return pointwise_bn_act(
            x, weight, gamma, beta, *running, activation=activation, residual=next(iter(middle), None)
        )

    out, other = function(*given, running=running), in_turn(*tensors, expected, activation)
    assert "pointwise_bn_act" in out.grad_fn.name()
    torch.testing.assert_close(out, other)
    for one, another in zip(running, expected, strict=True):
        torch.testing.assert_close(one, another)
    grad = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, given, grad, retain_graph=True), torch.autograd.grad(other, given, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)
    for frozen in given:
        frozen.requires_grad_(False)
        assert not any(
            g is None for g in torch.autograd.grad(function(*given).sum(), [t for t in given if t is not frozen])
        )
        frozen.requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_opcheck_compile_and_transforms(layout):
    tensors = norm_inputs((2, 5, 3, 4), 6, layout=layout)
    for residual in (tensors[2], None):
        torch.library.opcheck(NORM_ACT, (*tensors[:2], residual, *tensors[3:], 1e-5, 1))

    def function(x, weight, residual, gamma, beta):
        return pointwise_bn_act(x, weight, gamma, beta, residual=residual) * 2

    expected = in_turn(*tensors) * 2
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), expected)
    raw = torch.compile(lambda *t: NORM_ACT(*t, 1e-5, 1)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(raw(*tensors), expected)
    for mine, theirs in zip(
        torch.autograd.grad(raw(*tensors).sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    x, weight = (t.detach() for t in tensors[:2])
    tangents = [
        torch.func.jvp(lambda t, f=f: f(t, weight, None, None), (x,), (torch.randn_like(x),))[1].shape
        for f in (pointwise_bn_act, lambda t, w, *_: in_turn(t, w, None, None, None))
    ]
    assert tangents[0] == tangents[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pointwise_bn_act(*tensors[:2], *tensors[3:], residual=tensors[2]).dtype == torch.bfloat16
        assert NORM_ACT(*tensors, 1e-5, 1)[0].dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        pointwise_bn_act(*tensors[:2], *tensors[3:]).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 5 * 6 * 12


def test_reference_of_the_norm_is_torch():
    tensors = [t.detach() for t in norm_inputs((2, 5, 3, 4), 6, torch.float64)]
    out, z, mean, var = reference.pointwise_bn_act_training(*tensors, 1e-5, 1)
    torch.testing.assert_close(out, in_turn(*tensors))
    torch.testing.assert_close(z, F.conv2d(*tensors[:2]))
    torch.testing.assert_close((var, mean), torch.var_mean(z, (0, 2, 3), correction=0))


def test_norm_serves_every_choice(monkeypatch):
    """The rule, bad input and one value a channel: as batch_norm_act after the product."""
    tensors = norm_inputs((2, 5, 3, 4), 6)
    results = []
    for many in (1, 10**6):
        monkeypatch.setattr(_pointwise, "_MANY_CHANNELS", many)
        results.append(pointwise_bn_act(*tensors[:2], *tensors[3:], residual=tensors[2]))
    assert ["pointwise_bn_act" in r.grad_fn.name() for r in results] == [False, True]
    torch.testing.assert_close(*results)
    x, weight, residual, gamma, _ = tensors
    for error, pattern, args, options in (
        (ValueError, "gamma must have shape", (x, weight, gamma[:2], None), {}),
        (ValueError, "activation must be", (x, weight, None, None), {"activation": "gelu"}),
        (ValueError, "eps must be positive", (x, weight, None, None), {"eps": 0.0}),
        (ValueError, "residual must have the output's shape", (x, weight, None, None), {"residual": residual[:1]}),
        (ValueError, "more than 1 value per channel", (x[:1, :, :1, :1], weight, None, None), {}),
    ):
        with pytest.raises(error, match=pattern):
            pointwise_bn_act(*args, **options)
    for args in ((x[0], weight, None, None, None), (x, weight, residual[:1], None, None),
                 (x, weight, residual.double(), None, None), (x, weight, None, gamma[:2], None)):  # fmt: skip
        with pytest.raises(RuntimeError, match="must"):
            NORM_ACT(*args, 1e-5, 1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_modules_use_it(track, momentum):
    x, residual = torch.randn(2, 5, 6, 7), torch.randn(2, 8, 6, 7)
    conv = nn.Conv2d(5, 8, 1, bias=False)
    norms = [nn.BatchNorm2d(8, momentum=momentum, track_running_stats=track) for _ in range(2)]
    for training in (True, True, False):
        for norm in norms:
            norm.train(training)
        out = pointwise_norm_act(conv, norms[0], "relu", x, residual)
        assert ("pointwise_bn_act" in out.grad_fn.name()) == (training or not track)
        torch.testing.assert_close(out, F.relu(norms[1](conv(x)) + residual))
    for mine, theirs in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    called = []
    handle = norms[0].register_forward_hook(lambda m, *_: called.append(type(m)))
    pointwise_norm_act(conv, norms[0], None, x)
    handle.remove()
    pointwise_norm_act(nn.Conv2d(5, 8, 1), norms[0], None, x)
    group = nn.GroupNorm(2, 8)
    torch.testing.assert_close(pointwise_norm_act(conv, group, None, x), group(conv(x)))
    assert called == [nn.BatchNorm2d]
    across = nn.SyncBatchNorm(8)
    out = pointwise_norm_act(conv, across, None, x)  # asked itself: it knows about the other processes
    assert "pointwise_bn_act" not in out.grad_fn.name()
    torch.testing.assert_close(out, across(conv(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_separable_block_is_two_operators_in_training(layout):
    block = AtrousSeparableConv2d(6, 9, padding="same", depthwise_norm=True, pointwise_norm=True)
    x = torch.randn(2, 6, 9, 7).contiguous(memory_format=LAYOUTS[layout])
    out = block(x)
    assert "pointwise_bn_act" in out.grad_fn.name()
    y = block.depthwise_norm(block.depthwise(x))
    torch.testing.assert_close(out, norm_act(block.pointwise_norm, None, pointwise(block.pointwise, y)))
    norms = {f"{half}_norm": ops.BatchNorm(None, None, eps=norm.eps) for half, norm in (
        ("depthwise", block.depthwise_norm), ("pointwise", block.pointwise_norm)
    )}  # fmt: skip
    weights = block.depthwise.weight, block.pointwise.weight
    for bias in (None, torch.ones(9)):  # which the norm takes away
        same = ops.atrous_separable_conv2d(x, *weights, **norms, padding="same", training=True, pointwise_bias=bias)
        assert ("pointwise_bn_act" in same.grad_fn.name()) == (bias is None)
        torch.testing.assert_close(same, out, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    run_tests_with(isa, ["test_pointwise.py"], "values_and_gradients or same_bits or nothing or statistics", tmp_path)


def test_sanitizers(tmp_path):
    run_sanitized("pointwise", ["pointwise/pointwise.cpp", "pointwise/kernels.cpp"], tmp_path)
