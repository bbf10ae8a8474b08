"""Atrous depthwise convolution + batch normalisation + activation: against torch's three operators, in both modes."""

from __future__ import annotations

import itertools

import pytest
import torch
from _cases import (
    DEVICES,
    DTYPES,
    FEW,
    LAYOUTS,
    Case,
    activate,
    assert_as_exact_as_torch,
    by_case,
    conv_by_definition,
    conv_of_torch,
    leaves,
    weight_gradient_magnitude,
)
from _depthwise_block import (
    ACTIVATIONS,
    BACKWARD,
    BY_PIXELS,
    NAMES,
    NARROW,
    PIECES,
    TRAINABLE,
    TRAINING,
    as_double,
    composed,
    gradient_of_conv,
    ours,
    random_block,
)
from _threads import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_kernels import reference
from deeplab_kernels.ops import atrous_depthwise_bn_act

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# The reference itself.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", **by_case([c for c in TRAINABLE if c.size[1]]))
def test_reference_is_batch_norm_and_activation(case, training, activation):
    inputs, statistics = random_block(case, torch.float64)
    copy = leaves(*inputs)
    expected = composed(conv_by_definition, copy, as_double(statistics), case, training=training, activation=activation)
    plain = [t.detach() for t in inputs]
    if training:
        out, y, mean, var = reference.atrous_depthwise_bn_act_training(
            *plain, 1e-5, ACTIVATIONS[activation], *case.normalised, True
        )
        torch.testing.assert_close(y, conv_by_definition(*plain[:2], case))
        torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))
    else:
        mean, var = statistics
        out = reference.atrous_depthwise_bn_act_inference(
            *plain, mean, var, 1e-5, ACTIVATIONS[activation], *case.normalised
        )
        y = torch.empty(0, dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    expected.backward(grad)
    for saved in (y, torch.empty(0, dtype=torch.float64)):
        grads = reference.atrous_depthwise_bn_act_backward(
            grad, *plain[:2], saved, *plain[2:], mean, var, 1e-5, ACTIVATIONS[activation], training, *case.normalised,
            True, True,
        )  # fmt: skip
        for name, found, exact in zip(NAMES, grads, copy, strict=True):
            torch.testing.assert_close(found, exact.grad, msg=lambda m, name=name: f"{name}: {m}")


# The operator.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", **by_case(TRAINABLE))
def test_values_and_gradients(case, training, layout, dtype, device):
    check_values_and_gradients(case, list(ACTIVATIONS)[TRAINABLE.index(case) % 3], training, layout, dtype, device)


@pytest.mark.parametrize("case", **by_case(PIECES))
def test_pieces_of_a_map(case):
    check_values_and_gradients(case, list(ACTIVATIONS)[PIECES.index(case) % 3], True, "nchw", "fp32", "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("training", "kept"), [(False, None), (True, False), (True, True)])
@pytest.mark.parametrize("case", **by_case(BY_PIXELS))
def test_values_and_gradients_by_pixels(case, training, kept, dtype):
    activation = list(ACTIVATIONS)[BY_PIXELS.index(case) % 3]
    check_values_and_gradients(case, activation, training, "nhwc", dtype, "cpu", kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case(TRAINABLE))
def test_values_and_gradients_with_the_convolution_kept_on_cpu(case, layout):
    activation = list(ACTIVATIONS)[TRAINABLE.index(case) % 3]
    check_values_and_gradients(case, activation, True, layout, "fp32", "cpu", True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["frozen", "training"])
@pytest.mark.parametrize("case", **by_case(NARROW))
def test_values_and_gradients_of_narrow_maps_on_cpu(case, training, dtype):
    check_values_and_gradients(case, list(ACTIVATIONS)[NARROW.index(case) % 3], training, "nchw", dtype, "cpu")


def check_values_and_gradients(case, activation, training, layout, dtype, device, save_conv=None):
    inputs, statistics = random_block(case, DTYPES[dtype], layout, device)
    options = {"training": training, "activation": activation, "eps": 1e-3, "momentum": 0.2}
    plain, exact = leaves(*inputs), leaves(*inputs, dtype=torch.float64)
    plain_statistics, exact_statistics = [t.clone() for t in statistics], as_double(statistics)
    results = [
        ours(inputs, statistics, case, save_conv=save_conv, **options),
        composed(conv_of_torch, plain, plain_statistics, case, **options),
        composed(conv_by_definition, exact, exact_statistics, case, **options),
    ]
    out = results[0]
    assert out.shape == case.out_size
    # Where an output sits on an activation's kink, rounding decides the gradient: leave those out.
    z = composed(conv_by_definition, as_double(inputs), as_double(statistics), case, **options | {"activation": None})
    kink = (z.abs() < 0.05) | ((z - 6).abs() < 0.05)
    grad = torch.randn_like(out).masked_fill(kink, 0)
    for result in results:
        result.backward(grad.to(result.dtype))
    assert_as_exact_as_torch(*results, "out")
    magnitude = weight_gradient_magnitude(inputs[0], gradient_of_conv(exact, grad, statistics, case, options), case)
    for name, tensors in zip(NAMES, zip(inputs, plain, exact, strict=True), strict=True):
        grads = (t.grad for t in tensors)
        assert_as_exact_as_torch(*grads, f"gradient of {name}", magnitude if name == "weight" else 0)
    for name, tensors in zip(
        ("mean", "var"), zip(statistics, plain_statistics, exact_statistics, strict=True), strict=True
    ):
        assert_as_exact_as_torch(*tensors, f"running {name}")
    if layout == "nhwc" and min(case.size) > 1:
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert inputs[0].grad.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 20), st.integers(2, 20)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    multiplier=st.integers(1, 2),
    activation=st.sampled_from([None, "relu", "relu6"]),
    affine=st.tuples(st.booleans(), st.booleans()),
    training=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_random_geometry(size, kernel, stride, dilation, multiplier, activation, affine, training, layout):
    case = Case(size, kernel, stride, "same", dilation, multiplier)
    training = training and case.values_per_channel > 1
    inputs, statistics = random_block(case, torch.float64, layout)
    inputs[2:] = [v if wanted else None for v, wanted in zip(inputs[2:], affine, strict=True)]
    exact, exact_statistics = leaves(*inputs), as_double(statistics)
    options = {"training": training, "activation": activation}
    out = ours(inputs, statistics, case, **options)
    expected = composed(conv_by_definition, exact, exact_statistics, case, **options)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    tolerance = {"atol": 1e-8, "rtol": 1e-7}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(statistics, exact_statistics, **tolerance)
    for mine, correct in zip(inputs, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, correct.grad, **tolerance)


@pytest.mark.parametrize("affine", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_optional_affine(affine, training, layout):
    case = FEW[0]
    inputs, statistics = random_block(case, torch.float64, layout)
    inputs[2:] = [v if wanted else None for v, wanted in zip(inputs[2:], affine, strict=True)]
    exact, exact_statistics = leaves(*inputs), as_double(statistics)
    out = ours(inputs, statistics, case, training=training)
    expected = composed(conv_by_definition, exact, exact_statistics, case, training=training)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, correct in zip(inputs, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, correct.grad)


@pytest.mark.parametrize("momentum", [0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics(momentum, dtype):
    """(1 - momentum) * running + momentum * batch, with the unbiased variance; the batch's own are left alone."""
    case = Case((2, 5, 7, 9), padding=1)
    inputs, (mean, var) = random_block(case, torch.float32)
    mean, var = mean.to(dtype), var.to(dtype)
    exact_mean, exact_var = mean.double(), var.double()
    addresses = mean.data_ptr(), var.data_ptr()
    for _ in range(3):
        ours(inputs, [mean, var], case, training=True, momentum=momentum)
        composed(conv_by_definition, as_double(inputs), [exact_mean, exact_var], case, training=True, momentum=momentum)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype != torch.bfloat16 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(mean.double(), exact_mean, **tolerance)
    torch.testing.assert_close(var.double(), exact_var, **tolerance)
    assert (mean.data_ptr(), var.data_ptr()) == addresses
    assert mean.dtype == var.dtype == dtype
    assert not mean.requires_grad
    assert not var.requires_grad


def test_inference_leaves_the_running_statistics_alone():
    inputs, statistics = random_block(FEW[0], torch.float32)
    before = [t.clone() for t in statistics]
    ours(inputs, statistics, FEW[0], training=False)
    assert all(map(torch.equal, statistics, before))


def test_training_without_running_statistics():
    inputs, statistics = random_block(FEW[0], torch.float32)
    expected = ours(inputs, statistics, FEW[0], training=True)
    assert torch.equal(ours(inputs, [None, None], FEW[0], training=True), expected)


def test_empty_batch_leaves_the_running_statistics_alone():
    case = Case((0, 3, 5, 5), padding=1)
    inputs, statistics = random_block(case, torch.float32)
    before = [t.clone() for t in statistics]
    for training in (False, True):
        out = ours(inputs, statistics, case, training=training)
        assert out.shape == (0, 3, 5, 5)
        out.sum().backward()
    assert all(map(torch.equal, statistics, before))
    for tensor in inputs:
        assert tensor.grad.count_nonzero() == 0


@pytest.mark.parametrize("case", **by_case([Case((1, 3, 5, 5), dilation=2), Case((1, 1, 1, 1), kernel=1)]))
def test_one_value_per_channel(case):
    inputs, statistics = random_block(case, torch.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        composed(conv_of_torch, inputs, statistics, case, training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(inputs, statistics, case, training=True)
    out = ours(inputs, statistics, case, training=False)
    torch.testing.assert_close(out, composed(conv_of_torch, inputs, statistics, case, training=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_constant_channel(training, layout):
    """Zero variance: eps alone normalises. The sums that cancel must not leave a negative variance behind."""
    case = Case((2, 9, 12, 11), kernel=1)
    inputs, (mean, var) = random_block(case, torch.float32, layout)
    inputs[0].data.copy_(1000 + torch.arange(9.0).view(1, 9, 1, 1))
    inputs[1].data.fill_(1 / 3)
    if not training:
        var.zero_()
        mean.copy_(inputs[0][0, :, 0, 0].detach() / 3)
    exact, exact_statistics = leaves(*inputs, dtype=torch.float64), [mean.double(), var.double()]
    out = ours(inputs, [mean, var], case, training=training, activation=None)
    expected = composed(conv_by_definition, exact, exact_statistics, case, training=training, activation=None)
    assert var.min() >= 0
    # x is 1000 times the standard deviation sqrt(eps) times 300: a rounding error of y becomes 1e-2 of out.
    torch.testing.assert_close(out.double(), expected, atol=0.06, rtol=0)
    torch.testing.assert_close(var.double(), exact_statistics[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout):
    """A mean 1000 times the deviation: the sum of squares in float32 would leave no digit of the variance."""
    case = Case((2, 9, 33, 31), kernel=1)
    inputs, statistics = random_block(case, torch.float32, layout)
    inputs[0].data.add_(1000)
    inputs[1].data.fill_(1)
    exact_statistics = as_double(statistics)
    options = {"training": True, "activation": None, "momentum": 1.0}
    out = ours(inputs, statistics, case, **options)
    expected = composed(conv_by_definition, as_double(inputs), exact_statistics, case, **options)
    torch.testing.assert_close(statistics[1].double(), exact_statistics[1], atol=0, rtol=1e-5)
    # scale * y and shift are each about 1000 * gamma and nearly cancel.
    rounding = torch.finfo(torch.float32).eps * 1000 * inputs[2].abs().max().item()
    torch.testing.assert_close(out.double(), expected, atol=4 * rounding, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_and_beyond_its_edges(activation, layout):
    """Values and gradients exactly as torch's, also at the kinks 0 and 6, at -0.0, at infinities and NaN."""
    values = [-1.0, -0.0, 0.0, 1e-30, 3.0, 6.0, 6.0000005, 7.0, float("inf"), -float("inf"), float("nan")]
    x = torch.tensor(values).view(1, 1, 1, -1).repeat(1, 17, 3, 1).to(memory_format=LAYOUTS[layout])
    weight = torch.ones(17, 1, 1, 1)
    zero, one = torch.zeros(17), torch.ones(17)
    inputs, plain = leaves(x, weight), leaves(x)
    out = atrous_depthwise_bn_act(
        *inputs, None, None, zero, one, training=False, eps=0.0, activation=activation
    )  # scale 1, shift 0: out = act(x)
    expected = activate(plain[0], activation)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(out))
    # At NaN torch's relu6 passes the gradient in the last elements of a tensor and stops it in the others.
    known = slice(0, -1) if activation == "relu6" else slice(None)
    torch.testing.assert_close(inputs[0].grad[..., known], plain[0].grad[..., known], rtol=0, atol=0)
    assert (inputs[0].grad[..., -1] == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [2, 230])  # by planes, by pixels
def test_nan_and_inf_propagate(training, layout, batch):
    case = Case((batch, 17, 13, 11), padding="same", dilation=2)
    inputs, statistics = random_block(case, torch.float32, layout)
    inputs[0].data[0, 0, 4, 4] = float("nan")
    inputs[0].data[1, 5, 0, 10] = float("inf")
    inputs[2].data[7] = float("nan")
    inputs[3].data[9] = float("inf")
    if not training:
        statistics[0][11], statistics[1][13] = float("nan"), float("inf")
    exact, exact_statistics = leaves(*inputs, dtype=torch.float64), as_double(statistics)
    out = ours(inputs, statistics, case, training=training)
    expected = composed(conv_by_definition, exact, exact_statistics, case, training=training)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(as_double(statistics), exact_statistics, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert expected.isnan().sum((0, 2, 3))[[0, 7, 5 if training else 11]].all()


def test_per_channel_vectors_of_any_kind():
    """Other dtypes and strides than the kernels read."""
    case = Case((2, 3, 5, 7), padding=1)
    inputs, statistics = random_block(case, torch.float32)
    expected = {t: ours(inputs, [s.clone() for s in statistics], case, training=t) for t in (False, True)}
    for dtype in (torch.float64, torch.float32):
        strided = [torch.stack([v.detach().to(dtype)] * 2, 1)[:, 0] for v in (*inputs[2:], *statistics)]
        assert not strided[0].is_contiguous()
        strided[0].requires_grad_()
        for training in (False, True):
            out = ours([*inputs[:2], *strided[:2]], [s.clone() for s in strided[2:]], case, training=training)
            assert torch.equal(out, expected[training])
            (grad,) = torch.autograd.grad(out.sum(), strided[0])
            assert grad.dtype == dtype
        ours([*inputs[:2], *strided[:2]], strided[2:], case, training=True)
        assert not torch.equal(strided[2].float(), statistics[0])  # updated through the stride
    scalar = torch.tensor(0.5)
    out = ours(
        [*inputs[:2], scalar.expand(3), scalar.expand(3)], [scalar.expand(3), scalar.expand(3)], case, training=False
    )
    half = torch.full((3,), 0.5)
    assert torch.equal(out, ours([*inputs[:2], half, half], [half, half], case, training=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True])
def test_same_bits_with_any_number_of_threads(training, layout, dtype):
    cases = [(case, None) for case in [*FEW, *PIECES[:2]]]
    if layout == "nhwc":
        cases += [(case, kept) for case in BY_PIXELS[1:5] for kept in ((False, True) if training else (None,))]
    for case, kept in cases:
        inputs, statistics = random_block(case, DTYPES[dtype], layout)
        grad = torch.randn(case.out_size).to(DTYPES[dtype])

        def results(case=case, kept=kept, inputs=inputs, statistics=statistics, grad=grad):
            copies, copied_statistics = leaves(*inputs), [s.clone() for s in statistics]
            out = ours(copies, copied_statistics, case, training=training, save_conv=kept)
            out.backward(grad)
            return out.detach(), *copied_statistics, *(t.grad for t in copies)

        assert_same_bits(results, (1, 2, 3, 4), case)


@pytest.mark.parametrize(
    "case",
    **by_case(
        [
            Case((1, 131, 174, 190), padding="same", dilation=2),
            Case((1, 144, 174, 190), padding="same", dilation=2),
            Case((1, 131, 174, 190), stride=2, padding=(1, 2, 3, 0)),
            Case((1, 200, 130, 190), padding="same", dilation=12),
        ]
    ),
)
@pytest.mark.parametrize(("training", "kept"), [(False, None), (True, False), (True, True)])
def test_chunks_of_channels(training, kept, case):
    """Channels and columns that are taken in several parts, the last channels no whole number of vectors: as in the
    other layout.

    144 channels are whole cache lines of an image beyond most last-level caches, which is written past them.
    """
    inputs, statistics = random_block(case, torch.float32)
    grad = torch.randn(case.out_size)
    results = []
    for layout, save_conv in ((torch.contiguous_format, False), (torch.channels_last, kept)):
        copies, copied_statistics = leaves(*inputs), [s.clone() for s in statistics]
        copies[0] = inputs[0].detach().to(memory_format=layout).requires_grad_()
        out = ours(copies, copied_statistics, case, training=training, activation=None, save_conv=save_conv)
        out.backward(grad)
        results.append([out.detach(), *copied_statistics, *(t.grad for t in copies)])
    for nchw, nhwc in zip(*results, strict=True):
        torch.testing.assert_close(nhwc, nchw, atol=1e-5 * nchw.abs().max().item(), rtol=1e-4)


# Shapes that run by planes and by pixels, at both strides, with channels that fill no vector.
PRE_ACTIVATED = [*TRAINABLE, *NARROW[:8], Case((2, 37, 34, 41), padding="same"),
                 Case((2, 70, 33, 35), stride=2, padding="same"), Case((1, 40, 193, 190), padding="same", dilation=3),
                 Case((1, 40, 193, 190), stride=2, padding=1), *PIECES[1:5:2]]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case(PRE_ACTIVATED))
def test_pre_activation(case, layout, dtype):
    """The same bits as from an activation in front, and x kept instead of what it gives."""
    before = ("relu", "relu6")[PRE_ACTIVATED.index(case) % 2]
    inputs, statistics = random_block(case, DTYPES[dtype], layout)
    with torch.no_grad():
        inputs[0] *= 4
    copies, other = leaves(*inputs), [t.clone() for t in statistics]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = ours(inputs, statistics, case, training=True, pre_activation=before)
    assert case.size[0] * case.size[1] == 0 or inputs[0].data_ptr() in saved
    expected = ours([activate(copies[0], before), *copies[1:]], other, case, training=True)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for mine, theirs in zip((out, *statistics), (expected, *other), strict=True):
        assert torch.equal(mine, theirs)
    for name, mine, theirs in zip(NAMES, inputs, copies, strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_pre_activation_elsewhere():
    """Inference, frozen statistics, the definition, and gradients of gradients."""
    case = Case((2, 3, 7, 9), padding=1)
    inputs, statistics = random_block(case, torch.float64)
    x = inputs[0]
    for training in (False, True):
        out = ours(inputs, [s.clone() for s in statistics], case, training=training, pre_activation="relu")
        expected = ours([x.relu(), *inputs[1:]], [s.clone() for s in statistics], case, training=training)
        assert torch.equal(out, expected)

    def function(*tensors):
        return ours(tensors, (None, None), case, training=True, activation=None, pre_activation="relu6")

    assert torch.autograd.gradgradcheck(function, inputs)
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(TRAINING, (*plain, 1e-5, 1, *case.normalised, False, 1))
    for before in (1, 2):
        out, y, mean, var = TRAINING(*plain, 1e-5, 1, *case.normalised, False, before)
        arguments = (out, *plain[:2], y, *plain[2:], mean, var, 1e-5, 1, True, *case.normalised, True, True, before)
        torch.testing.assert_close(
            reference.atrous_depthwise_bn_act_training(*plain, 1e-5, 1, *case.normalised, False, before)[0], out
        )
        for mine, exact in zip(
            BACKWARD(*arguments), reference.atrous_depthwise_bn_act_backward(*arguments), strict=True
        ):
            torch.testing.assert_close(mine, exact)
