"""Batch normalisation + residual + activation in training: against torch's operators in float64, and everything torch
does around an operator; the modules' use of it, and of the 1x1 convolution's own kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _cases import DTYPES, LAYOUTS, activate, assert_as_exact_as_torch, leaves
from _instruction_sets import run_tests_with
from _threads import assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_kernels import reference
from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.nn.functional import norm_act, pointwise
from deeplab_kernels.ops import atrous_depthwise_bn_act, batch_norm_act
from deeplab_kernels.ops._pointwise import pointwise_bn_act

TRAINING = torch.ops.deeplab_kernels.batch_norm_act_training.default
BACKWARD = torch.ops.deeplab_kernels.batch_norm_act_backward.default
CODES = {None: 0, "relu": 1, "relu6": 2}
SIZES = [(2, 3, 5, 5), (1, 40, 33, 33), (3, 8, 1, 127), (2, 37, 9, 1), (1, 1, 5, 3), (2, 65, 31, 17), (1, 3, 65, 71)]
NAMES = ("z", "residual", "gamma", "beta")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random_inputs(size, dtype=torch.float32, layout="nchw", residual=True, mean=3.0):
    """z, residual or None, gamma, beta: some of gamma negative, both kinks of relu6 met."""
    z, other = (torch.randn(size).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta = (torch.randn(size[1]) * 2).to(vector), (torch.randn(size[1]) + 1).to(vector)
    tensors = [z * 2 + mean, other if residual else None, gamma, beta]
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def statistics(channels, dtype=torch.float32):
    return [torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.1]


def ours(inputs, running=(None, None), **options):
    z, residual, gamma, beta = inputs
    return batch_norm_act(z, gamma, beta, *running, residual=residual, **options)


def composed(inputs, running=(None, None), activation="relu", momentum=0.1, eps=1e-5):
    z, residual, gamma, beta = inputs
    out = F.batch_norm(z, *running, gamma, beta, True, momentum, eps)
    return activate(out if residual is None else out + residual, activation)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, layout, dtype, residual):
    activation = list(CODES)[SIZES.index(size) % 3]
    options = {"activation": activation, "eps": 1e-3, "momentum": 0.2}
    inputs = random_inputs(size, DTYPES[dtype], layout, residual)
    running = statistics(size[1], inputs[2].dtype)
    plain, exact = leaves(*inputs), leaves(*inputs, dtype=torch.float64)
    plain_running, exact_running = [r.clone() for r in running], [r.double() for r in running]
    results = [ours(inputs, running, **options), composed(plain, plain_running, **options),
               composed(exact, exact_running, **options)]  # fmt: skip
    before = composed([None if t is None else t.detach().double() for t in inputs], eps=1e-3, activation=None)
    grad = torch.randn(size).masked_fill((before.abs() < 0.05) | ((before - 6).abs() < 0.05), 0)
    grad = grad.contiguous(memory_format=LAYOUTS[layout])
    for result in results:
        result.backward(grad.to(result.dtype))
    assert_as_exact_as_torch(*results, "out")
    for name, tensors in zip(NAMES, zip(inputs, plain, exact, strict=True), strict=True):
        if tensors[0] is not None:
            assert_as_exact_as_torch(*(t.grad for t in tensors), f"gradient of {name}")
    for name, vectors in zip(("mean", "var"), zip(running, plain_running, exact_running, strict=True), strict=True):
        assert_as_exact_as_torch(*vectors, f"running {name}")
    assert results[0].stride() == inputs[0].stride() == inputs[0].grad.stride()


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("residual", [False, True])
def test_reference_is_batch_norm_and_activation(residual, activation):
    inputs = random_inputs((2, 3, 5, 4), torch.float64, residual=residual)
    expected = composed(inputs, activation=activation)
    z, other, gamma, beta = (t if t is None else t.detach() for t in inputs)
    out, mean, var = reference.batch_norm_act_training(z, other, gamma, beta, 1e-5, CODES[activation])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    expected.backward(grad)
    told = out if residual and activation else None
    grads = reference.batch_norm_act_backward(grad, z, told, gamma, beta, mean, var, 1e-5, CODES[activation])
    for name, mine, t in zip(NAMES, grads, inputs, strict=True):
        if name == "residual" and told is None:
            assert mine.shape == (0,)
        else:
            torch.testing.assert_close(mine, t.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_large_mean():
    """The variance of values far from zero is not lost in their squares."""
    for layout in LAYOUTS:
        inputs = random_inputs((2, 24, 40, 40), layout=layout, mean=1e4)
        plain, exact = leaves(*inputs), leaves(*inputs, dtype=torch.float64)
        assert_as_exact_as_torch(ours(inputs), composed(plain), composed(exact), "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_arguments(layout):
    z = torch.randn(2, 5, 6, 7).contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(batch_norm_act(z, None, None), F.relu(F.batch_norm(z, None, None, None, None, True)))
    strided, residual = z[:, :, ::2], torch.randn(2, 5, 7, 3).transpose(2, 3)
    expected = F.relu(F.batch_norm(strided, None, None, None, None, True) + residual)
    torch.testing.assert_close(batch_norm_act(strided, None, None, residual=residual), expected)
    constant = batch_norm_act(torch.full_like(z, 3.0), None, None, activation=None)
    torch.testing.assert_close(constant, torch.zeros_like(z), atol=1e-3, rtol=0)
    for size in ((0, 5, 6, 7), (2, 0, 6, 7)):
        empty = torch.randn(size, requires_grad=True)
        out = batch_norm_act(empty, None, None)
        out.sum().backward()
        assert out.shape == empty.grad.shape == size
    poisoned = z.clone()
    poisoned[1, 2, 3, 4] = float("nan")
    out = batch_norm_act(poisoned, None, None)
    assert out[:, 2].isnan().all()
    assert not out[:, [0, 1, 3, 4]].isnan().any()


def test_bad_input():
    z, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
    for error, pattern, args, options in (
        (TypeError, "z must be a torch.Tensor", ([1], None, None), {}),
        (TypeError, "z must be float32", (z.int(), None, None), {}),
        (ValueError, r"z must have shape \(N, C, H, W\), got \(2, 3\)", (z[:, :, 0, 0], None, None), {}),
        (ValueError, r"gamma must have shape \(3,\), got \(2,\)", (z, vector[:2], None), {}),
        (ValueError, "both be given", (z, None, None, vector), {}),
        (ValueError, "eps must be positive", (z, None, None), {"eps": 0.0}),
        (ValueError, "momentum must be in", (z, None, None), {"momentum": 2}),
        (ValueError, "activation must be", (z, None, None), {"activation": "gelu"}),
        (TypeError, "residual must be a torch.Tensor", (z, None, None), {"residual": 1}),
        (TypeError, "residual must have z's dtype", (z, None, None), {"residual": z.double()}),
        (ValueError, "residual must have the output's shape", (z, None, None), {"residual": z[:1]}),
        (ValueError, "more than 1 value per channel", (z[:1, :, :1, :1], None, None), {}),
    ):
        with pytest.raises(error, match=pattern):
            batch_norm_act(*args, **options)
    for args in ((z[0], None, None, None), (z, z.double(), None, None), (z, z[:1], None, None),
                 (z, None, vector.double(), None), (z, None, vector[:2], None)):  # fmt: skip
        with pytest.raises(RuntimeError, match="must"):
            TRAINING(*args, 1e-5, 1)
        with pytest.raises(RuntimeError, match="must"):
            BACKWARD(z, args[0], *args[1:], vector, vector, 1e-5, 1)


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_twice(residual, activation):
    inputs = random_inputs((2, 2, 3, 2), torch.float64, residual=residual)
    tensors = [t for t in inputs if t is not None]

    def function(*tensors):
        z, *middle, gamma, beta = tensors
        return ours([z, middle[0] if middle else None, gamma, beta], activation=activation)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    z, residual, gamma, beta = (t.detach() for t in random_inputs((2, 9, 5, 3), layout=layout))
    for other in (residual, None):
        torch.library.opcheck(TRAINING, (z, other, gamma, beta, 1e-5, 1))
        out, mean, var = TRAINING(z, other, gamma, beta, 1e-5, 1)
        torch.library.opcheck(BACKWARD, (z, z, None if other is None else out, gamma, None, mean, var, 1e-5, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_and_transforms(layout):
    inputs = random_inputs((2, 9, 7, 5), layout=layout)
    running = statistics(9)
    copies, copied = leaves(*inputs), [r.clone() for r in running]
    compiled = torch.compile(lambda running, *t: ours(t, running) * 2, fullgraph=True, backend="aot_eager")
    out, expected = compiled(running, *inputs), ours(copies, copied) * 2
    assert torch.equal(out, expected)
    assert all(map(torch.equal, running, copied))
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, eager in zip(inputs, copies, strict=True):
        torch.testing.assert_close(mine.grad, eager.grad)
    z = inputs[0].detach()
    along = z - z.mean((0, 2, 3), True)
    _, tangent = torch.func.jvp(lambda t: batch_norm_act(t, None, None, activation=None), (z,), (along,))
    assert tangent.abs().max() < 1e-3  # batch normalisation does not see a common factor


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_with_any_number_of_threads(layout, dtype):
    for size in ((2, 37, 41, 19), (1, 3, 9, 9)):
        inputs = random_inputs(size, DTYPES[dtype], layout)
        grad = torch.randn(size).to(DTYPES[dtype])

        def results(inputs=inputs, grad=grad):
            copies, running = leaves(*inputs), [torch.zeros(inputs[2].shape), torch.ones(inputs[2].shape)]
            out = ours(copies, running)
            out.backward(grad)
            return out.detach(), *running, *(t.grad for t in copies)

        assert_same_bits(results, (1, 2, 3, 4), size)


def test_saved_for_backward():
    """z, and out only where a residual comes before an activation; the residual's gradient is grad_out itself."""
    for residual, activation, kept in ((False, "relu", 1), (True, None, 1), (True, "relu", 2)):
        inputs, saved = random_inputs((2, 16, 9, 9), residual=residual), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = ours(inputs, activation=activation)
        assert len({t.data_ptr() for t in saved if t.numel() == out.numel()}) == kept
        if residual and activation is None:
            grad = torch.randn_like(out)
            assert torch.autograd.grad(out, inputs[1], grad)[0].data_ptr() == grad.data_ptr()


def test_backward_fills_nothing_with_zeros():
    """Statistics and what is kept for backward are outputs without gradients: no zeros are made in their place."""
    ran: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    x, _, gamma, beta = random_inputs((2, 16, 9, 9))
    norm = {"gamma": gamma, "beta": beta, "running_mean": None, "running_var": None}
    depthwise, pointwise_weight = torch.randn(16, 1, 3, 3), torch.randn(16, 16, 1, 1)
    for out in (
        batch_norm_act(x, **norm),
        pointwise_bn_act(x, pointwise_weight, **norm),
        atrous_depthwise_bn_act(x, depthwise, **norm, training=True, padding=1, save_conv=True),
    ):
        grad = torch.randn_like(out)
        with Record():
            torch.autograd.grad(out, x, grad)
    assert sum("backward" in name for name in ran) >= 3
    assert not [name for name in ran if "zeros" in name or "fill" in name]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    run_tests_with(
        isa, ["test_batch_norm_act.py"], "test_values_and_gradients or test_large_mean or same_bits", tmp_path
    )


# The modules.


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_norm_act_is_the_module(track, momentum):
    z, residual = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
    norms = [nn.BatchNorm2d(5, momentum=momentum, track_running_stats=track) for _ in range(2)]
    for training in (True, True, False):
        for norm in norms:
            norm.train(training)
        out = norm_act(norms[0], "relu", z.clone(), residual)
        torch.testing.assert_close(out, F.relu(norms[1](z) + residual))
    for mine, theirs in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hooks_and_other_types_are_called():
    z = torch.randn(2, 256, 6, 7).contiguous(memory_format=torch.channels_last)
    norm, conv, called = nn.BatchNorm2d(256), nn.Conv2d(256, 256, 1, bias=False), []
    for module in (norm, conv):
        module.register_forward_hook(lambda m, *_: called.append(type(m)))
    norm_act(norm, "relu", pointwise(conv, z))
    assert called == [nn.Conv2d, nn.BatchNorm2d]
    group = nn.GroupNorm(2, 256)
    torch.testing.assert_close(norm_act(group, None, z), group(z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm_act(nn.BatchNorm2d(256), "relu", pointwise(nn.Conv2d(256, 256, 1, bias=False), z), z)
    assert out.dtype == torch.float32  # bfloat16 + float32, as torch adds them


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_gradients(layout):
    x = torch.randn(2, 256, 5, 7).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    conv = nn.Conv2d(256, 260, 1, bias=False)
    exact = [x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()]
    grad = torch.randn(2, 260, 5, 7)
    pointwise(conv, x).backward(grad)
    F.conv2d(*exact).backward(grad.double())
    for mine, theirs in zip((x, conv.weight), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)
        assert mine.grad.stride() == mine.stride()
    for tensors in ((x, conv.weight), exact):
        out = pointwise(conv, x) if tensors[0] is x else F.conv2d(*tensors)
        (first,) = torch.autograd.grad(out.square().mean(), tensors[0], create_graph=True)
        tensors[1].grad = None
        first.square().mean().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact[1].grad, atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_separable_block_in_training(activation, layout):
    block = AtrousSeparableConv2d(
        256, 264, padding="same", depthwise_norm=True, pointwise_norm=True, pointwise_activation=activation,
        pre_activation="relu", save_conv=activation is None,
    ).to(memory_format=LAYOUTS[layout])  # fmt: skip
    x = torch.randn(2, 256, 9, 7).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    residual = torch.randn(2, 264, 9, 7).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    copies = leaves(x, residual, dtype=torch.float64)
    exact = AtrousSeparableConv2d(
        256, 264, padding="same", depthwise_norm=True, pointwise_norm=True, dtype=torch.float64
    )
    exact.load_state_dict(block.state_dict())
    out = block(x, residual)
    y = exact.depthwise_norm(F.conv2d(F.relu(copies[0]), exact.depthwise.weight, padding=1, groups=256))
    expected = activate(exact.pointwise_norm(exact.pointwise(y)) + copies[1], activation)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(out).masked_fill(expected.abs() < 1e-3, 0)
    out.backward(grad)
    expected.backward(grad.double())
    pairs = [(x, copies[0]), (residual, copies[1]), *zip(block.parameters(), exact.parameters(), strict=True)]
    for mine, theirs in pairs:
        # The second norm hides the first one's shift, whose gradient is rounding alone.
        scale = max(theirs.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4 * scale, rtol=1e-3)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(buffer, exact.get_buffer(name).to(buffer.dtype), atol=1e-4, rtol=1e-4)
