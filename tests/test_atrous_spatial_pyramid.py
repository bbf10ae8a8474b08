"""All rates of an atrous spatial pyramid and the image's mean: against torch's convolutions, norms and mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import (
    DEVICES,
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_torch,
    conv_by_definition,
    conv_of_torch,
    weight_gradient_magnitude,
)
from _instruction_sets import run_tests_with
from _pyramid import (
    Inputs,
    Pyramid,
    away_from_kinks,
    backpropagate,
    composed,
    double_convolutions,
    ours,
    random_inputs,
)
from _threads import assert_same_bits
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import reference
from deeplab_kernels.ops import BatchNorm, atrous_depthwise_bn_act, atrous_depthwise_conv2d, atrous_spatial_pyramid

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INFERENCE = torch.ops.deeplab_kernels.atrous_spatial_pyramid.default
TRAINING = torch.ops.deeplab_kernels.atrous_spatial_pyramid_training.default
BACKWARD = torch.ops.deeplab_kernels.atrous_spatial_pyramid_backward.default


PYRAMIDS = [
    Pyramid((1, 8, 33, 33), (6, 12, 18)),  # one task per channel, by planes
    Pyramid((2, 65, 17, 19), (2, (3, 1), 40)),  # also in NHWC; a partial vector of channels; taps outside the image
    Pyramid((3, 9, 5, 37), (1,)),
    Pyramid((2, 3, 9, 7), (1, 2, 4, 3)),  # few channels and narrow rows: branch by branch
    Pyramid((1, 9, 9, 21), (1, 2), kernel=(3, 5)),
    Pyramid((2, 8, 7, 9), (2, 1), kernel=(2, 4)),
    Pyramid((2, 70, 2, 3), (1, 6)),
    Pyramid((0, 8, 9, 9), (1, 2)),
]
SMALL = [Pyramid((2, 1, 3, 4), (1, (2, 1))), Pyramid((1, 2, 2, 3), (2, 5, 1), kernel=(1, 3))]
# float64 and float16 take other kernels' ways: one pyramid by planes and one by branches will do.
by_pyramid_and_dtype = pytest.mark.parametrize(
    ("pyramid", "dtype"),
    [(p, d) for p in PYRAMIDS for d in DTYPES if d in ("fp32", "bf16") or p in (PYRAMIDS[1], PYRAMIDS[3])],
    ids=str,
)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("device", DEVICES)
@by_layout
@pytest.mark.parametrize("mode", ["convolution", "inference", "training"])
@by_pyramid_and_dtype
def test_values_and_gradients(pyramid, mode, layout, dtype, device):
    inputs = random_inputs(pyramid, DTYPES[dtype], layout, device)
    plain, exact = inputs.copy(), inputs.copy(torch.float64)
    activation = None if mode == "convolution" else ["relu", "relu6", None][PYRAMIDS.index(pyramid) % 3]
    options = {"normalise": mode != "convolution", "training": mode == "training", "activation": activation}
    before = exact.copy()
    results = [
        ours(pyramid, inputs, **options),
        composed(conv_of_torch, pyramid, plain, **options),
        composed(conv_by_definition, pyramid, exact, **options),
    ]
    unactivated = composed(conv_by_definition, pyramid, before, **options | {"activation": None})[0]
    grads = away_from_kinks([torch.randn_like(y) for y in results[0][0]], unactivated)
    grad_pooled = torch.randn_like(results[0][1])
    for r, branch in enumerate(zip(*(result[0] for result in results), strict=True)):
        assert_as_exact_as_torch(*branch, f"branch {r}")
        if layout == "nhwc" and min(pyramid.size) > 1:
            assert branch[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_torch(*(pooled for _, pooled in results), "mean")
    if not inputs.x.numel():
        return
    for result in results:
        backpropagate(result, grads, grad_pooled)
    scale = [1.0] * len(grads)
    if mode != "convolution":
        variances = inputs.variances
        if mode == "training":
            variances = [y.var((0, 2, 3), correction=0) for y in double_convolutions(pyramid, inputs)]
        scale = [
            (g.double().abs() * torch.rsqrt(v.double() + 1e-5)).max().item()
            for g, v in zip(inputs.gammas, variances, strict=True)
        ]
    for r, tensors in enumerate(zip(inputs.weights, plain.weights, exact.weights, strict=True)):
        magnitude = weight_gradient_magnitude(inputs.x, grads[r], pyramid.cases[r]) * scale[r]
        assert_as_exact_as_torch(*(t.grad for t in tensors), f"gradient of weight {r}", magnitude)
    assert_as_exact_as_torch(inputs.x.grad, plain.x.grad, exact.x.grad, "gradient of x")
    if layout == "nhwc" and min(pyramid.size) > 1:
        assert inputs.x.grad.is_contiguous(memory_format=torch.channels_last)
    for name in ("gammas", "betas") if mode != "convolution" else ():
        for tensors in zip(*(getattr(i, name) for i in (inputs, plain, exact)), strict=True):
            assert_as_exact_as_torch(*(t.grad for t in tensors), f"gradient of {name}")
    for name in ("means", "variances"):
        for tensors in zip(*(getattr(i, name) for i in (inputs, plain, exact)), strict=True):
            assert_as_exact_as_torch(*tensors, f"running {name}")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa, tmp_path):
    selection = "(test_values_and_gradients and fp32 and cpu and training) or (test_same_bits and bf16)"
    run_tests_with(isa, ["test_atrous_spatial_pyramid.py"], selection, tmp_path)


@pytest.mark.parametrize("normalise", [False, True])
@by_layout
def test_equals_the_single_rates(layout, normalise):
    pyramid = PYRAMIDS[0]
    inputs = random_inputs(pyramid, torch.float32, layout)
    options = {"training": True, "activation": "relu"} if normalise else {}
    y, _ = ours(pyramid, inputs, normalise=normalise, **options)
    single = inputs.copy()
    for r, rate in enumerate(pyramid.rates):
        geometry: dict[str, Any] = {"padding": "same", "dilation": rate}
        if normalise:
            vectors = single.gammas[r], single.betas[r], None, None
            one = atrous_depthwise_bn_act(single.x, single.weights[r], *vectors, training=True, **geometry)
        else:
            one = atrous_depthwise_conv2d(single.x, single.weights[r], **geometry)
        torch.testing.assert_close(y[r], one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [False, True])
@by_layout
@pytest.mark.parametrize("pyramid", SMALL, ids=str)
def test_gradcheck(pyramid, layout, training, pool):
    inputs = random_inputs(pyramid, torch.float64, layout)
    branches = len(pyramid.rates)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        columns = [rest[i * branches : (i + 1) * branches] for i in range(3)]
        given = Inputs(x, *map(list, columns), inputs.means, inputs.variances)  # type: ignore[arg-type]
        y, pooled = atrous_spatial_pyramid(
            x, given.weights, pyramid.rates, given.norms(not training, eps=0.1), training=training, pool=pool
        )
        return (*y, pooled) if pooled is not None else tuple(y)

    torch.autograd.gradcheck(function, inputs.differentiable)
    torch.autograd.gradgradcheck(function, inputs.differentiable, fast_mode=True)


@by_layout
@pytest.mark.parametrize("pyramid", [SMALL[0], PYRAMIDS[4]], ids=str)
def test_opcheck(pyramid, layout):
    inputs = random_inputs(pyramid, torch.float32, layout)
    weight, gamma, beta, mean, var = inputs.stacked()
    x, rates = inputs.x, pyramid.flat_rates
    weight.requires_grad_()
    for pool in (True, False):
        torch.library.opcheck(INFERENCE, (x, weight, None, None, None, None, 0.0, 0, rates, pool))
        torch.library.opcheck(INFERENCE, (x, weight, gamma, beta, mean, var, 1e-3, 2, rates, pool))
        for save in (True, False):
            torch.library.opcheck(
                TRAINING, (x, weight, gamma, beta, 1e-3, 1, rates, pool, save),
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )  # fmt: skip
    x, weight = x.detach(), weight.detach()
    out, conv, mean, var, pooled = TRAINING(x, weight, gamma, beta, 1e-3, 0, rates, True, True)
    settings = 1e-3, 1, True, rates
    torch.library.opcheck(BACKWARD, (out, pooled, x, weight, conv, gamma, beta, mean, var, *settings, True, True))
    torch.library.opcheck(BACKWARD, (out, None, x, weight, [], None, None, mean, var, *settings, False, True))
    none = None, None, None, None
    torch.library.opcheck(BACKWARD, (out, None, x, weight, [], *none, 0.0, 0, False, rates, True, False))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@by_layout
@pytest.mark.parametrize("pyramid", PYRAMIDS[:5], ids=str)
def test_backward_from_kept_or_recomputed_convolutions(pyramid, layout, dtype):
    inputs = random_inputs(pyramid, DTYPES[dtype], layout)
    weight, gamma, beta, *_ = inputs.stacked()
    x, rates = inputs.x.detach(), pyramid.flat_rates
    out, conv, mean, var, pooled = TRAINING(x, weight, gamma, beta, 1e-3, 0, rates, True, True)
    again = TRAINING(x, weight, gamma, beta, 1e-3, 0, rates, True, False)
    assert again[1] == []
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(again[0], out, **tolerance)
    grads = [torch.randn_like(y) for y in out]
    results = [
        BACKWARD(grads, pooled, x, weight, kept, gamma, beta, mean, var, 1e-3, 0, True, rates, True, True)
        for kept in (conv, [])
    ]
    for kept, recomputed in zip(*results, strict=True):
        scale = kept.float().abs().max().item()
        torch.testing.assert_close(recomputed / scale, kept / scale, **tolerance)


@pytest.mark.parametrize("wanted", ["x", "weights", "betas", "only the mean", "one branch"])
@by_layout
def test_parts_of_the_gradient(layout, wanted):
    pyramid = PYRAMIDS[1]
    inputs = random_inputs(pyramid, torch.float32, layout)
    for name in ("x", "weights", "gammas", "betas"):
        tensors = inputs.x if name == "x" else getattr(inputs, name)
        for t in [tensors] if name == "x" else tensors:
            t.requires_grad_(wanted in (name, "only the mean", "one branch"))
    copy = Inputs(*[
        [v.detach().clone().requires_grad_(v.requires_grad) for v in c] if isinstance(c, list)
        else c.detach().clone().requires_grad_(c.requires_grad)
        for c in (inputs.x, inputs.weights, inputs.gammas, inputs.betas, inputs.means, inputs.variances)
    ])  # fmt: skip
    for y, pooled in (
        ours(pyramid, inputs),
        composed(conv_of_torch, pyramid, copy),
    ):
        part = pooled if wanted == "only the mean" else y[1] if wanted == "one branch" else sum(y) * pooled
        (part * torch.arange(part.numel()).view_as(part) / part.numel()).sum().backward()
    for a, b in zip(inputs.differentiable, copy.differentiable, strict=True):
        if a.grad is None or b.grad is None:
            assert b.grad is None or not b.grad.any()
            assert a.grad is None or not a.grad.any()
        else:
            scale = max(b.grad.abs().max().item(), 1e-3)
            torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@by_layout
@pytest.mark.parametrize("training", [False, True])
def test_same_bits_with_any_number_of_threads(training, layout, dtype):
    inputs = random_inputs(PYRAMIDS[1], DTYPES[dtype], layout)

    def results() -> list[Tensor]:
        copy = inputs.copy()
        y, pooled = ours(PYRAMIDS[1], copy, training=training, activation="relu")
        (sum(y) * pooled).sum().backward()
        return [*y, pooled, *(t.grad for t in copy.differentiable)]

    assert_same_bits(results)


@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@by_layout
def test_infinity_and_nan_stay_where_they_belong(layout, where):
    pyramid = PYRAMIDS[1]
    inputs = random_inputs(pyramid, torch.float32, layout)
    if where != "grad":
        with torch.no_grad():
            (inputs.x[0, 3, 4] if where == "x" else inputs.weights[1][3, 0]).fill_(float("inf"))
    exact = inputs.copy(torch.float64)
    results = (
        ours(pyramid, inputs, normalise=False),
        composed(conv_by_definition, pyramid, exact, normalise=False),
    )
    grads = [torch.ones_like(y) for y in results[0][0]]
    if where == "grad":
        grads[0][1, 5, 2, 3] = float("inf")
    for result in results:
        backpropagate(result, grads, torch.zeros_like(result[1]))
    pairs = [*zip(*(r[0] for r in results), strict=True), (inputs.x.grad, exact.x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs.weights, exact.weights, strict=True)]
    for found, expected in pairs:
        assert torch.equal(found.isfinite(), expected.isfinite())


@by_layout
def test_large_images_go_by_bands(layout):
    """Too large for a core's caches: inference band by band, gradients branch by branch."""
    pyramid = Pyramid((2, 8, 190, 90) if layout == "nchw" else (2, 64, 70, 60), (1, 4))
    inputs = random_inputs(pyramid, torch.float32, layout)
    exact = inputs.copy(torch.float64)
    results = ours(pyramid, inputs), composed(conv_by_definition, pyramid, exact)
    for found, expected in zip((*results[0][0], results[0][1]), (*results[1][0], results[1][1]), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_activation_without_norms():
    inputs = random_inputs(PYRAMIDS[0])
    y, _ = ours(PYRAMIDS[0], inputs, normalise=False, activation="relu")
    expected, _ = ours(PYRAMIDS[0], inputs, normalise=False)
    for found, z in zip(y, expected, strict=True):
        assert torch.equal(found, z.relu())


def test_stacked_weights_and_missing_vectors():
    pyramid = PYRAMIDS[0]
    inputs = random_inputs(pyramid)
    norms = inputs.norms()
    norms[1] = norms[1]._replace(gamma=None, beta=None)
    found, _ = atrous_spatial_pyramid(inputs.x, torch.stack(inputs.weights), pyramid.rates, norms)
    for r, norm in enumerate(norms):
        vectors = norm.gamma, norm.beta, norm.mean, norm.var
        options: dict[str, Any] = {"activation": None, "padding": "same", "dilation": pyramid.rates[r]}
        one = atrous_depthwise_bn_act(inputs.x, inputs.weights[r], *vectors, training=False, **options)
        torch.testing.assert_close(found[r], one)


@by_layout
def test_strided_input_is_copied(layout):
    inputs = random_inputs(PYRAMIDS[1], torch.float32, layout)
    wide = torch.cat([inputs.x, inputs.x], 3).detach()[:, :, :, ::2]
    found, _ = atrous_spatial_pyramid(wide, inputs.weights, PYRAMIDS[1].rates)
    expected, _ = atrous_spatial_pyramid(wide.contiguous(), inputs.weights, PYRAMIDS[1].rates)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    pyramid = PYRAMIDS[3]
    inputs = random_inputs(pyramid)

    def function(given: Inputs) -> Tensor:
        y, pooled = atrous_spatial_pyramid(
            given.x, given.weights, pyramid.rates, given.norms(), activation="relu", training=training
        )
        return sum(y) * pooled  # type: ignore[return-value]

    copy = inputs.copy()
    expected = function(copy)
    expected.sum().backward()
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(inputs)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    for a, b in zip(inputs.differentiable, copy.differentiable, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(inputs.means, copy.means)


def test_export_and_meta_device():
    pyramid = PYRAMIDS[3]
    inputs = random_inputs(pyramid)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
            return atrous_spatial_pyramid(x, [w.detach() for w in inputs.weights], pyramid.rates)

    x = inputs.x.detach()
    program = torch.export.export(Module(), (x,))
    torch.testing.assert_close(program.module()(x), Module()(x))
    y, pooled = atrous_spatial_pyramid(x.to("meta"), [w.to("meta") for w in inputs.weights], pyramid.rates)
    assert [t.shape for t in y] == [x.shape] * len(pyramid.rates)
    assert pooled is not None
    assert pooled.shape == (*x.shape[:2], 1, 1)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    pyramid = PYRAMIDS[0]
    inputs = random_inputs(pyramid)
    with torch.autocast("cpu", torch.bfloat16):
        y, pooled = ours(pyramid, inputs, training=training)
    assert {t.dtype for t in (*y, pooled)} == {torch.bfloat16}
    half = inputs.copy()
    half.x, half.weights = half.x.bfloat16(), [w.bfloat16() for w in half.weights]
    expected, _ = ours(pyramid, half, training=training)
    torch.testing.assert_close(y, expected)


def test_transforms_take_the_definition():
    pyramid = SMALL[0]
    inputs = random_inputs(pyramid, torch.float64)

    def function(x: Tensor) -> Tensor:
        y, pooled = atrous_spatial_pyramid(x, inputs.weights, pyramid.rates, inputs.norms())
        return sum(y) * pooled  # type: ignore[return-value]

    x, tangent = inputs.x.detach(), torch.randn_like(inputs.x)
    _, found = torch.func.jvp(function, (x,), (tangent,))
    expected = (function(x + 1e-6 * tangent) - function(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_flop_formula():
    pyramid = PYRAMIDS[0]
    inputs = random_inputs(pyramid)
    with FlopCounterMode(display=False) as counter:
        y, _ = ours(pyramid, inputs, training=True)
    once = 2 * 9 * len(pyramid.rates) * inputs.x.numel()
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        sum(y).sum().backward()  # type: ignore[union-attr]
    assert counter.get_total_flops() == 2 * once


def test_reference_serves_what_the_operator_does():
    pyramid = PYRAMIDS[0]
    inputs = random_inputs(pyramid, torch.float64)
    weight, gamma, beta, mean, var = inputs.stacked()
    args = inputs.x.detach(), weight, gamma, beta, mean, var, 1e-3, 1, pyramid.flat_rates, True
    torch.testing.assert_close(reference.atrous_spatial_pyramid(*args), INFERENCE(*args))


def good_call() -> dict[str, Any]:
    inputs = random_inputs(Pyramid((2, 3, 9, 7), (1, 2)))
    return {
        "x": inputs.x, "weights": inputs.weights, "dilations": [1, 2], "norms": inputs.norms(), "activation": "relu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "abc"}, TypeError, "weights must be a sequence of tensors or one tensor, got str"),
        ({"weights": []}, ValueError, "weights must have at least one branch, got none"),
        ({"weights": torch.zeros(3, 1, 3, 3)}, ValueError, r"weights must have shape \(R, C, 1, kh, kw\)"),
        ({"weights": [torch.zeros(3, 1, 3, 3), torch.zeros(3, 1, 5, 5)]}, ValueError, r"weights\[1\] must have shape"),
        ({"weights": [torch.zeros(6, 1, 3, 3)] * 2}, ValueError, r"weights\[0\] must have shape \(3, 1, 3, 3\)"),
        ({"weights": [torch.zeros(3, 1, 3, 3), None]}, TypeError, r"weights\[1\] must be a torch.Tensor, got NoneType"),
        ({"weights": [torch.zeros(3, 1, 3, 3).double()] * 2}, TypeError, r"weights\[0\] must have x's dtype"),
        ({"x": torch.zeros(3, 9, 7)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"dilations": [1]}, ValueError, "dilations must have one entry for each of the 2 weights, got 1"),
        ({"dilations": 6}, TypeError, "dilations must be a sequence with one entry for each branch, got 6"),
        ({"dilations": [1, 0]}, ValueError, "dilation must be at least 1, got 0"),
        ({"norms": good_call()["norms"][0]}, TypeError, "norms must be a sequence with one entry for each branch"),
        ({"norms": [1, 2]}, TypeError, r"norms\[0\] must be an ops.BatchNorm, got int"),
        (
            {"norms": [n._replace(eps=e) for n, e in zip(good_call()["norms"], (0.1, 0.2), strict=True)]},
            ValueError, "norms must have one eps, got 0.1 and 0.2",
        ),
        ({"norms": None, "training": True}, ValueError, "training=True needs norms, got None"),
        ({"norms": [BatchNorm(None, None)] * 2}, ValueError, "running_mean must be given when training=False"),
        ({"save_conv": 1}, TypeError, "save_conv must be True, False or None, got 1"),
        ({"activation": "gelu"}, ValueError, 'activation must be "relu"'),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        atrous_spatial_pyramid(**good_call() | changes)


def test_one_value_per_channel():
    inputs = random_inputs(Pyramid((1, 3, 1, 1), (1, 2)))
    with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
        atrous_spatial_pyramid(inputs.x, inputs.weights, [1, 2], inputs.norms(), training=True)
