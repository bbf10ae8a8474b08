"""Atrous depthwise convolution + batch normalisation + activation under torch: autograd, autocast, compile, export."""

from __future__ import annotations

import itertools

import pytest
import torch
from _cases import (
    DTYPES,
    FEW,
    LAYOUTS,
    Case,
    by_case,
    conv_by_definition,
    leaves,
    smaller,
)
from _depthwise_block import (
    ACTIVATIONS,
    BACKWARD,
    INFERENCE,
    TRAINABLE,
    TRAINING,
    as_double,
    composed,
    ours,
    random_block,
)
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels.ops import atrous_depthwise_bn_act

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_requires_grad_of_each_argument(wanted, training):
    case = Case((2, 3, 5, 5), padding=1)
    inputs, statistics = random_block(case, torch.float64)
    exact, exact_statistics = leaves(*inputs), as_double(statistics)
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    out = ours(inputs, statistics, case, training=training)
    assert out.requires_grad == any(wanted)
    if out.requires_grad:
        out.square().sum().backward()
        composed(conv_by_definition, exact, exact_statistics, case, training=training).square().sum().backward()
    for tensor, correct, want in zip(inputs, exact, wanted, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, correct.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", **by_case([smaller(c) for c in FEW[1:5]]))
def test_gradcheck(case, activation, training, layout):
    inputs, statistics = random_block(case, torch.float64, layout)
    # Keeps every pre-activation away from the kinks that finite differences cannot cross.
    if activation == "relu":
        inputs[3].data.fill_(20)
        inputs[3].data[:1] = -20
    elif activation == "relu6":
        inputs[2].data.mul_(0.1)
        inputs[3].data.fill_(3)
        inputs[3].data[:1] = 30
    if not training:
        statistics[1].add_(5)

    def function(*tensors):
        return ours(tensors, [s.clone() for s in statistics], case, training=training, activation=activation)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_penalty(training):
    """A second derivative through the ordinary path: create_graph=True, as a gradient penalty uses it."""
    case = Case((2, 3, 5, 7), padding=1, dilation=2, multiplier=2)
    inputs, statistics = random_block(case, torch.float64)
    exact, exact_statistics = leaves(*inputs), as_double(statistics)
    for out, tensors in (
        (ours(inputs, statistics, case, training=training), inputs),
        (composed(conv_by_definition, exact, exact_statistics, case, training=training), exact),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        grad.square().sum().backward()
    for mine, correct in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad, correct.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case([FEW[0], FEW[5], Case((1, 1, 3, 3), padding=1, multiplier=2)]))
def test_opcheck(case, layout):
    (x, weight, gamma, beta), (mean, var) = random_block(case, torch.float32, layout)
    geometry = case.normalised
    torch.library.opcheck(INFERENCE, (x, weight, gamma, beta, mean, var, 1e-5, 2, *geometry))
    torch.library.opcheck(INFERENCE, (x, weight, None, None, mean, var, 1e-5, 0, *geometry))
    # Batch statistics on one seed only: opcheck compares gradients of every output, and y, mean and var have none.
    plain = [t.detach() for t in (x, weight, gamma, beta)]
    for save in (True, False):
        torch.library.opcheck(TRAINING, (*plain, 1e-5, 1, *geometry, save))
        torch.library.opcheck(
            TRAINING, (x, weight, gamma, beta, 1e-5, 1, *geometry, save),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
    out, y, mean, var = TRAINING(*plain, 1e-5, 1, *geometry, True)
    for saved, batch_statistics, need in ((y, True, (True, True)), (y.new_empty(0), False, (False, True))):
        torch.library.opcheck(
            BACKWARD, (out, *plain[:2], saved, *plain[2:], mean, var, 1e-5, 1, batch_statistics, *geometry, *need)
        )


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_backward_from_kept_or_recomputed_convolution(layout, dtype, batch_statistics):
    case = FEW[1]
    inputs, _ = random_block(case, DTYPES[dtype], layout)
    plain = [t.detach() for t in inputs]
    out, y, mean, var = TRAINING(*plain, 1e-5, 1, *case.normalised, True)
    without = TRAINING(*plain, 1e-5, 1, *case.normalised, False)
    torch.testing.assert_close(out, without[0])
    assert without[1].shape == (0,)
    grads = [
        BACKWARD(out, *plain[:2], saved, *plain[2:], mean, var, 1e-5, 1, batch_statistics, *case.normalised, True, True)
        for saved in (y, without[1])
    ]
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if dtype == "fp32" else {"atol": 0.5, "rtol": 5e-2}
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed, **tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    case = FEW[1]
    inputs, statistics = random_block(case, torch.float32)
    low = [t.bfloat16() for t in inputs[:2]]
    expected = ours([*low, *inputs[2:]], [s.clone() for s in statistics], case, training=training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(inputs, statistics, case, training=training)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert statistics[0].dtype == torch.float32
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def test_flop_formula():
    """The convolution's multiply-adds alone, as torch counts its own operators."""
    case = Case((2, 6, 17, 19), kernel=(3, 5), stride=(1, 2), padding=1, multiplier=2)
    flops = 2 * 3 * 5 * torch.Size(case.out_size).numel()
    for training in (False, True):
        inputs, statistics = random_block(case, torch.float32)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            ours(inputs, statistics, case, training=training)
        with FlopCounterMode(display=False) as both:
            ours(inputs, statistics, case, training=training).sum().backward()
        assert forward.get_total_flops() == flops
        assert both.get_total_flops() == 3 * flops


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(training, layout, dynamic):
    case = FEW[1]
    inputs, statistics = random_block(case, torch.float32, layout)
    copies, copied_statistics = leaves(*inputs), [s.clone() for s in statistics]

    def function(statistics, *tensors):
        return ours(tensors, statistics, case, training=training) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(statistics, *inputs), function(copied_statistics, *copies)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    assert all(map(torch.equal, statistics, copied_statistics))
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, eager in zip(inputs, copies, strict=True):
        torch.testing.assert_close(mine.grad, eager.grad)


class Layer(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        inputs, (mean, var) = random_block(case, torch.float32)
        self.weight, self.gamma, self.beta = (torch.nn.Parameter(t.detach()) for t in inputs[1:])
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.case = case

    def forward(self, x):
        return atrous_depthwise_bn_act(
            x, self.weight, self.gamma, self.beta, self.mean, self.var, training=self.training, **self.case.geometry
        )


def test_export():
    case = Case((2, 5, 9, 11), padding="same", dilation=2)
    layer = Layer(case).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (torch.randn(case.size),), dynamic_shapes={"x": {0: batch}})
    assert any(node.target == INFERENCE for node in program.graph.nodes)
    x = torch.randn(3, 5, 9, 11)
    assert torch.equal(program.module()(x), layer(x))


def test_functional_call_and_transforms():
    case = Case((2, 5, 9, 11), padding="same", dilation=2)
    layer, other = Layer(case), Layer(case)
    x = torch.randn(case.size)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    out = torch.func.functional_call(layer, state, (x,))
    assert torch.equal(out, other(x))
    assert torch.equal(state["mean"], other.mean)  # the update went to the given buffer
    layer.eval()
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        layer.zero_grad()
        layer(x[i : i + 1]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad, atol=1e-3, rtol=1e-4)
    layer.train()
    _, tangent = torch.func.jvp(lambda t: atrous_depthwise_bn_act(
        t, layer.weight, layer.gamma, layer.beta, None, None, training=True, **case.geometry), (x,), (x,))  # fmt: skip
    assert (
        tangent.abs().max() < 1e-3
    )  # batch normalisation does not see a common factor, so the derivative along x is 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_saved_for_backward(training, layout, dtype):
    """Of the activation's size: x, and at most one more."""
    case = Case((2, 16, 17, 19), padding="same")
    inputs, statistics = random_block(case, DTYPES[dtype], layout)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(inputs, statistics, case, training=training)
    large = {t.data_ptr() for t in saved if t.numel() >= inputs[0].numel() // 2}
    assert inputs[0].data_ptr() in large
    assert len(large) <= 2
    rest = [t for t in saved if t.data_ptr() not in large]
    assert max(t.numel() for t in rest) <= inputs[1].numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_training_keeps_is_a_choice(layout):
    """save_conv: the same results, with and without a second tensor of the activation's size."""
    case = Case((2, 16, 17, 19), padding="same")
    inputs, _ = random_block(case, torch.float32, layout)
    results = []
    for save_conv in (False, True, None):
        copies, saved = leaves(*inputs), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = ours(copies, (None, None), case, training=True, save_conv=save_conv)
        assert len({t.data_ptr() for t in saved if t.numel() == out.numel()}) == 1 + (save_conv is True)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in copies)])
    for tensors in zip(*results, strict=True):
        for other in tensors[1:]:
            torch.testing.assert_close(other, tensors[0], atol=1e-3, rtol=1e-3)
    with pytest.raises(TypeError, match="save_conv must be True, False or None, got 1"):
        ours(inputs, (None, None), case, training=True, save_conv=1)


@pytest.mark.parametrize(
    ("size", "options", "layout", "dtype", "kept"),
    [
        ((2, 33, 320, 200), {}, "nhwc", "fp32", True),
        ((2, 33, 170, 190), {"stride": 2}, "nhwc", "fp32", True),
        ((2, 33, 310, 200), {}, "nhwc", "fp32", False),  # x has less than 16 MiB
        ((2, 33, 160, 190), {"stride": 2}, "nhwc", "fp32", False),  # less than 8
        ((2, 270, 80, 100), {}, "nhwc", "fp32", False),  # few pixels
        ((2, 33, 320, 200), {}, "nchw", "fp32", False),
        ((2, 33, 320, 200), {}, "nhwc", "bf16", False),
        ((2, 15, 470, 300), {}, "nhwc", "fp32", False),  # no vector, with AVX-512
        ((2, 33, 320, 200), {"dilation": 5}, "nhwc", "fp32", False),
        ((2, 33, 320, 200), {"stride": 3}, "nhwc", "fp32", False),
        ((2, 33, 320, 200), {"kernel": 5}, "nhwc", "fp32", False),
        ((2, 33, 320, 200), {"multiplier": 2}, "nhwc", "fp32", False),
    ],
)
def test_what_training_keeps_by_default_on_a_cpu(size, options, layout, dtype, kept):
    case = Case(size, padding=5, **options)
    inputs, _ = random_block(case, DTYPES[dtype], layout)

    assert len(kept_of_size(inputs, case)) == 1 + kept


def test_autocast_keeps_its_copy_of_x_alone():
    case = Case((2, 33, 320, 200), padding=1)
    inputs, _ = random_block(case, torch.float32, "nhwc")
    with torch.autocast("cpu", torch.bfloat16):
        (x,) = kept_of_size(inputs, case)
    assert x.dtype == torch.bfloat16


def kept_of_size(inputs, case):
    """The tensors of the activation's size that training keeps for backward."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
        out = ours(inputs, (None, None), case, training=True)
    return [t for t in found.values() if t.numel() >= min(out.numel(), inputs[0].numel())]


def test_meta_device():
    for case in TRAINABLE:
        for training in (False, True):
            inputs, statistics = random_block(case, torch.bfloat16, device="meta")
            out = ours(inputs, statistics, case, training=training)
            assert (out.device.type, tuple(out.shape), out.dtype) == ("meta", case.out_size, torch.bfloat16)
            out.sum().backward()
            assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]
