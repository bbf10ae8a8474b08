"""The Triton kernels against float64. Collected by test_triton_atrous_depthwise.py in a process of its own.

On CPU tensors the kernels run in Triton's interpreter, about a tenth of a second per program: tensors are tiny, and
every geometry is there for one path through the kernels or the host code.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
from _cases import LAYOUTS, Case, activate, by_case, conv_by_definition, conv_of_torch, leaves, random_conv

from deeplab_kernels import reference
from deeplab_kernels.triton import _tiling
from deeplab_kernels.triton import atrous_depthwise as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
EPS = 1e-3

CONVOLUTIONS = [
    Case((2, 3, 5, 5), padding=1),
    Case((1, 1, 1, 1), kernel=1),
    Case((1, 3, 13, 5), stride=2, padding=1),
    Case((1, 9, 7, 5), padding="same", dilation=(3, 2)),
    Case((1, 3, 5, 5), padding="same", dilation=40),  # only the centre tap meets the image
    Case((1, 65, 5, 3), padding=1),
    Case((1, 3, 9, 17), kernel=(3, 5), padding=(1, 2)),  # more taps than one program sums
    Case((1, 3, 5, 3), kernel=9, padding=4),  # more taps than are unrolled
    Case((2, 3, 5, 7), padding=1, multiplier=2),
    Case((1, 1, 5, 7), kernel=5, stride=(2, 1), padding="same", multiplier=3),
    Case((1, 3, 9, 7), stride=(3, 1), padding=(2, 0, 0, 5), dilation=(1, 2)),
    Case((1, 3, 127, 3), padding=1),
    Case((2, 1, 3, 33), padding=(1, 0)),
]
BLOCKS = [CONVOLUTIONS[i] for i in (0, 3, 10)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _fast_interpreter(monkeypatch):
    # Two things make most of the interpreter's time: it checks every integer operation for overflow, and it patches
    # triton.language anew at each call of a helper, although the kernel that calls it has it patched already.
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder, call = interpreter.interpreter_builder, interpreter.InterpretedFunction.__call__

    def call_patched(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("deeplab_kernels.triton.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_patched)


def assert_exact(ours, torchs, exact, what, storage=torch.float32):
    """At most twice plain torch's error in the same dtype. In the interpreter bfloat16 stores truncate: four times."""
    assert ours.dtype == torchs.dtype, what
    assert ours.shape == exact.shape, what
    eps = torch.finfo(ours.dtype).eps
    floor = 4 * eps * max(exact.abs().max().item(), 1e-3)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, torchs))
    factor = 4 if INTERPRETED and storage == torch.bfloat16 else 2
    assert error <= factor * allowed + floor, f"{what}: error {error:.3e}, plain torch {allowed:.3e}, floor {floor:.3e}"


def block(x, weight, gamma, beta, mean, var, conv, case, *, training, activation):
    y = conv(x, weight, case)
    return activate(F.batch_norm(y, mean, var, gamma, beta, training, 0.1, EPS), activation)


def assert_layout(out, x):
    assert out.is_contiguous(memory_format=reference.atrous_depthwise.output_memory_format(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case(CONVOLUTIONS))
def test_convolution(case, layout):
    check_convolution(case, layout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_in_half_precision(layout, dtype):
    check_convolution(Case((1, 11, 9, 7), padding="same", dilation=2), layout, dtype)


def check_convolution(case, layout, dtype):
    inputs = random_conv(case, dtype, layout, DEVICE)
    plain, exact = leaves(*inputs), leaves(*inputs, dtype=torch.float64)
    x, weight = (t.detach() for t in inputs)
    y = kernels.atrous_depthwise_conv2d(x, weight, *case.normalised)
    results = [conv_of_torch(*plain, case), conv_by_definition(*exact, case)]
    assert_exact(y, *results, "y", dtype)
    assert_layout(y, x)
    grad = torch.randn_like(y)
    for result in results:
        result.backward(grad.to(result.dtype))
    both = kernels.atrous_depthwise_conv2d_backward(grad, x, weight, *case.normalised, True, True)
    for name, ours, torchs, true in zip(("grad_x", "grad_weight"), both, plain, exact, strict=True):
        assert_exact(ours, torchs.grad, true.grad, name, dtype)
    assert_layout(both[0], x)
    grad_x, nothing = kernels.atrous_depthwise_conv2d_backward(grad, x, weight, *case.normalised, True, False)
    assert nothing.shape == (0,)
    torch.testing.assert_close(grad_x, both[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "activation"), list(zip(BLOCKS, ACTIVATIONS, strict=True)), ids=str)
def test_block(case, activation, layout):
    check_block(case, layout, activation, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_in_half_precision(layout, dtype):
    check_block(Case((1, 5, 7, 5), padding="same", dilation=2), layout, "relu", dtype)


def check_block(case, layout, activation, dtype):
    """Inference, training, and the backward pass of both: with the convolution kept and recomputed."""
    code, geometry, c = ACTIVATIONS[activation], case.normalised, case.out_channels
    conv_inputs = random_conv(case, dtype, layout, DEVICE)
    gamma = None if activation == "relu6" else torch.randn(c, device=DEVICE) * 2
    beta = None if activation == "none" else torch.randn(c, device=DEVICE) + 1
    mean, var = torch.randn(c, device=DEVICE), torch.rand(c, device=DEVICE) * 4 + 0.1
    inputs = [*conv_inputs, gamma, beta]
    raw = [None if t is None else t.detach() for t in inputs]
    for training in (False, True):
        plain, exact = leaves(*inputs), leaves(*inputs, dtype=torch.float64)
        options = {"case": case, "training": training, "activation": activation}
        torchs = block(*plain, mean.clone(), var.clone(), conv_of_torch, **options)
        true = block(*exact, mean.double(), var.double(), conv_by_definition, **options)
        # Where an output sits on an activation's kink, rounding decides the gradient: leave those out.
        z = block(*exact, mean.double(), var.double(), conv_by_definition, **options | {"activation": None})
        grad = torch.randn_like(torchs).masked_fill((z.abs() < 0.05) | ((z - 6).abs() < 0.05), 0)
        torchs.backward(grad)
        true.backward(grad.double())
        if training:
            runs = []
            for save_conv in (True, False):
                out, y, *statistics = kernels.atrous_depthwise_bn_act_training(*raw, EPS, code, *geometry, save_conv)
                conv = conv_by_definition(*(t.detach() for t in exact[:2]), case)
                if save_conv:
                    assert_exact(y, conv_of_torch(*raw[:2], case), conv, "y", dtype)
                else:
                    assert y.shape == (0,)
                torch.testing.assert_close(statistics[0].double(), conv.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(
                    statistics[1].double(), conv.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6
                )
                runs.append((out, y, *statistics))
        else:
            out = kernels.atrous_depthwise_bn_act_inference(*raw, mean, var, EPS, code, *geometry)
            runs = [(out, raw[0].new_empty(0), mean, var)]
        for out, y, run_mean, run_var in runs:
            what = f"{'training' if training else 'inference'}, y {tuple(y.shape)}: "
            assert_exact(out, torchs, true, what + "out", dtype)
            assert_layout(out, raw[0])
            grads = kernels.atrous_depthwise_bn_act_backward(
                grad, *raw[:2], y, *raw[2:], run_mean, run_var, EPS, code, training, *geometry, True, True
            )
            for name, ours, a, b in zip(("x", "weight", "gamma", "beta"), grads, plain, exact, strict=True):
                if a is not None:
                    assert_exact(ours, a.grad, b.grad, f"{what}grad {name}", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_far_from_zero_over_many_tiles(layout, monkeypatch):
    case = Case((2, 3, 9, 11), padding=1)
    x, weight = random_conv(case, torch.float32, layout, DEVICE, requires_grad=False)
    weight = weight * 0
    weight[:, :, 1, 1] = 1  # y = x
    x += 1000
    for enough in (10**9, 3, 1):  # one tile a program, several, all
        monkeypatch.setattr(_tiling, "_ENOUGH_PROGRAMS", enough)
        _, _, mean, var = kernels.atrous_depthwise_bn_act_training(
            x, weight, None, None, EPS, 0, *case.normalised, False
        )
        true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), true_mean, rtol=2e-7, atol=0)
        torch.testing.assert_close(var.double(), true_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tiles_a_program_and_wide_offsets(layout, monkeypatch):
    """Programs that take a run of tiles, and 64-bit offsets: the results of one tile a program and 32-bit ones."""
    case = Case((2, 3, 11, 13), padding="same", dilation=2)
    x, weight = random_conv(case, torch.float32, layout, DEVICE, requires_grad=False)
    grad = torch.randn_like(x)

    def run():
        forward = kernels.atrous_depthwise_bn_act_training(x, weight, None, None, EPS, 1, *case.normalised, True)
        backward = kernels.atrous_depthwise_bn_act_backward(
            grad, x, weight, forward[1], None, None, *forward[2:], EPS, 1, True, *case.normalised, True, True
        )
        return [*forward, *backward]

    single = run()
    monkeypatch.setattr(_tiling, "_ENOUGH_PROGRAMS", 2)
    several = run()
    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    for a, b, c in zip(single, several, run(), strict=True):
        torch.testing.assert_close(b, a)
        assert torch.equal(c, b)


def test_nan_and_infinity_propagate():
    case = Case((1, 2, 5, 5), padding=1)
    x, weight = random_conv(case, torch.float32, device=DEVICE, requires_grad=False)
    x[0, 0, 2, 2], x[0, 1, 0, 0] = float("nan"), float("inf")
    one = torch.ones(2, device=DEVICE)
    arguments = (x, weight, None, None, 0 * one, one, EPS, 2, *case.normalised)
    torch.testing.assert_close(
        kernels.atrous_depthwise_bn_act_inference(*arguments),
        reference.atrous_depthwise_bn_act_inference(*arguments),
        equal_nan=True,
    )


@pytest.mark.parametrize(
    "make", [lambda x: x[:, :, ::2, 1:], lambda x: x.transpose(2, 3), lambda x: x[:, :1].expand_as(x)]
)
def test_strided_input_is_copied(make):
    x, weight = make(torch.randn(1, 3, 9, 9, device=DEVICE)), torch.randn(3, 1, 3, 3, device=DEVICE)
    geometry = Case((*x.shape,), padding=1).normalised
    y = kernels.atrous_depthwise_conv2d(x, weight, *geometry)
    torch.testing.assert_close(y, reference.atrous_depthwise_conv2d(x, weight, *geometry))
    assert y.is_contiguous()


def test_gradient_in_the_other_layout_and_strided_vectors():
    case = Case((1, 3, 5, 7), padding=1)
    x, weight = random_conv(case, torch.float32, "nhwc", DEVICE, requires_grad=False)
    y = torch.randn(x.shape, device=DEVICE)
    gamma, beta, mean, var = torch.rand(3, 4, device=DEVICE).unbind(1)
    arguments = (y + 1, x, weight, y, gamma, beta, mean, var, EPS, 1, True, *case.normalised, True, True)
    ours, exact = (
        kernels.atrous_depthwise_bn_act_backward(*arguments),
        reference.atrous_depthwise_bn_act_backward(*arguments),
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(0, 3, 5, 5), (2, 0, 5, 5)])
def test_empty(size):
    case = Case(size, padding=1)
    x, weight = random_conv(case, torch.float32, device=DEVICE, requires_grad=False)
    y = kernels.atrous_depthwise_conv2d(x, weight, *case.normalised)
    assert y.shape == size
    grad_x, grad_weight = kernels.atrous_depthwise_conv2d_backward(y, x, weight, *case.normalised, True, True)
    assert grad_x.shape == size
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    out = kernels.atrous_depthwise_bn_act_training(x, weight, None, None, EPS, 1, *case.normalised, True)[0]
    assert out.shape == size


def test_double_is_served_by_the_reference():
    case = Case((1, 3, 5, 5), padding=1)
    x, weight = random_conv(case, torch.float64, device=DEVICE, requires_grad=False)
    y = kernels.atrous_depthwise_conv2d(x, weight, *case.normalised)
    assert torch.equal(y, reference.atrous_depthwise_conv2d(x, weight, *case.normalised))


def test_other_dtypes_are_refused():
    x = torch.ones(1, 1, 3, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(TypeError, match=r"x must be float32, float16, bfloat16 or float64, got torch\.int32"):
        kernels.atrous_depthwise_conv2d(x, x, (1, 1), (0, 0, 0, 0), (1, 1))
