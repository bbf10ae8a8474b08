"""``ops.atrous_separable_conv2d``: the whole separable block as one operator, against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import CASES, FEW, LAYOUTS, Case, assert_as_exact_as_torch, by_case, conv_by_definition
from _separable import Problem
from _threads import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import AtrousSeparableConv2d, info, ops, reference
from deeplab_kernels._layout import output_memory_format
from deeplab_kernels.ops import _backends, atrous_separable

OP = torch.ops.deeplab_kernels.atrous_separable_conv2d.default
SINGLE = [case for case in CASES if case.multiplier == 1 and case.size[1] > 0]
# Channels of y and of the output around the widths of vectors, panels and runs of terms; tiles cut within rows.
WIDE = [
    Case((1, 300, 9, 11), padding=1),
    Case((2, 257, 7, 5), padding="same", dilation=2),
    Case((1, 16, 33, 65), padding="same", dilation=(1, 3)),
    Case((1, 1030, 9, 9), padding="same", dilation=4),  # by depth: fewer results than channels
    Case((1, 33, 65, 67), stride=2, padding=1),
    Case((3, 24, 5, 5), padding=1),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", **by_case(SINGLE))
def test_against_the_definition(case: Case, dtype: torch.dtype, layout: str) -> None:
    problem = Problem(case, 5, dtype, layout)
    ours = problem.run()
    assert ours.is_contiguous(memory_format=output_memory_format(problem.x))
    torchs = problem.composed(torch.float32).to(dtype) if dtype.itemsize == 2 else problem.composed(dtype)
    assert_as_exact_as_torch(ours, torchs, problem.composed(torch.float64), str(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_channels", [1, 7, 16, 31, 50])
@pytest.mark.parametrize("case", **by_case(WIDE))
def test_many_channels_and_tiles(case: Case, out_channels: int, layout: str) -> None:
    problem = Problem(case, out_channels, torch.float32, layout)
    exact = problem.composed(torch.float64)
    assert_as_exact_as_torch(problem.run(), problem.composed(torch.float32), exact, str(case))
    assert_as_exact_as_torch(problem.run("two_kernels"), problem.composed(torch.float32), exact, str(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **by_case(FEW[:4]))
def test_reference_is_the_definition(case: Case, layout: str) -> None:
    problem = Problem(case, 6, torch.float64, layout)
    torch.testing.assert_close(reference.atrous_separable_conv2d(*problem.raw()), problem.composed(torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("execution", ["whole", "two_kernels"])
def test_every_part_is_optional(execution: str, layout: str) -> None:
    case = Case((2, 10, 9, 7), padding=2, dilation=2)
    problem = Problem(case, 19, torch.float64, layout, residual=False)
    bare = {"pre_activation": None, "depthwise_activation": None, "pointwise_activation": None, "residual": None}
    out = problem.run(execution, depthwise_norm=None, pointwise_norm=None, **bare)
    y = conv_by_definition(problem.x, problem.depthwise_weight, case)
    torch.testing.assert_close(out, F.conv2d(y, problem.pointwise_weight))
    biases = {"depthwise_bias": torch.randn(10), "pointwise_bias": torch.randn(19)}
    out = problem.run(execution, depthwise_norm=None, pointwise_norm=None, **bare | biases)
    y = y + biases["depthwise_bias"].view(-1, 1, 1)
    torch.testing.assert_close(out, F.conv2d(y, problem.pointwise_weight, biases["pointwise_bias"].double()))
    out = problem.run(execution, **bare | biases)
    y = F.batch_norm(y, *problem.norms[0][:4], eps=1e-3)
    z = F.conv2d(y, problem.pointwise_weight, biases["pointwise_bias"].double())
    torch.testing.assert_close(out, F.batch_norm(z, *problem.norms[1][:4], eps=1e-3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout: str) -> None:
    problem = Problem(Case((2, 600, 13, 11), padding=1), 40, torch.float32, layout)
    assert_same_bits(lambda: [problem.run()], (1, 2, 3, 7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity(layout: str) -> None:
    case = Case((1, 9, 7, 9), padding=1)
    problem = Problem(case, 17, torch.float32, layout, residual=False)
    problem.x[0, 3, 2, 4] = torch.nan
    touched = problem.run().isnan().any(1)[0]
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[1:4, 3:6] = True
    assert torch.equal(touched, expected)
    # Padding times an infinite weight is no part of the sum.
    problem = Problem(case, 17, torch.float32, layout, residual=False)
    problem.depthwise_weight[2, 0, 0, 0] = torch.inf
    problem.x.fill_(1.0)
    out = problem.run(depthwise_activation=None, depthwise_norm=None, pointwise_norm=None, pointwise_activation=None)
    assert out[:, :, 0].isfinite().all()
    assert out[:, :, :, 0].isfinite().all()
    assert out[:, :, 1:, 1:].isinf().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_empty(layout: str) -> None:
    problem = Problem(Case((2, 8, 9, 9), padding=1), 12, torch.float32, layout)
    expected = problem.run()
    problem.x = problem.x.transpose(2, 3).contiguous().transpose(2, 3)
    problem.residual = problem.residual.to(memory_format=torch.channels_last).contiguous()
    torch.testing.assert_close(problem.run(), expected)
    for size in ((0, 8, 9, 9), (2, 0, 9, 9)):
        empty = Problem(Case(size, padding=1), 12, torch.float32, layout)
        torch.testing.assert_close(empty.run(), reference.atrous_separable_conv2d(*empty.raw()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    problem = Problem(Case((2, 5, 7, 6), padding=1), 4, torch.float32, layout)
    torch.library.opcheck(OP, problem.raw())
    arguments = list(problem.raw())
    arguments[3:12] = [None] * 9
    torch.library.opcheck(OP, tuple(arguments))


def test_compile_autocast_and_flops() -> None:
    problem = Problem(Case((2, 5, 7, 6), padding=1), 4, torch.float32, "nhwc")
    expected = problem.run()
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = problem.run()
        assert problem.run("auto").dtype == torch.bfloat16
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.3, rtol=0.1)
    with FlopCounterMode(display=False) as counter:
        problem.run()
    assert counter.get_total_flops() == 2 * 2 * 7 * 6 * (5 * 9 + 5 * 4)


def test_gradients_and_training_take_two_kernels() -> None:
    problem = Problem(Case((2, 4, 6, 5), padding=1), 3, torch.float64, "nchw")
    leaves = [problem.x, problem.depthwise_weight, problem.pointwise_weight, problem.residual]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = torch.autograd.grad(problem.run("auto").square().sum(), leaves)
    expected = torch.autograd.grad(problem.composed(torch.float64).square().sum(), leaves)
    torch.testing.assert_close(grads, expected)
    with pytest.raises(ValueError, match="does not serve where gradients are needed"):
        problem.run("whole")
    with torch.no_grad():
        first = problem.norms[0]
        before = first.mean.clone()
        y = conv_by_definition(F.relu(problem.x), problem.depthwise_weight, problem.case)
        out = problem.run("auto", training=True, pointwise_norm=None, depthwise_bias=None)
        assert out.shape == (2, 3, 6, 5)
        torch.testing.assert_close(first.mean, before.lerp(y.mean((0, 2, 3)), 0.2))
        with pytest.raises(ValueError, match="does not serve training"):
            problem.run("whole", training=True)


def test_execution_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Case((1, 4, 6, 5), padding=1), 3, torch.float32, "nchw")
    called: list[str] = []
    for name in ("_whole", "_two_kernels"):
        original = getattr(atrous_separable, name)
        monkeypatch.setattr(
            atrous_separable, name, lambda *a, name=name, original=original: called.append(name) or original(*a)
        )
    problem.run("whole"), problem.run("two_kernels")
    assert called == ["_whole", "_two_kernels"]
    for value in ("two_kernels", "whole"):
        monkeypatch.setenv(atrous_separable.EXECUTION_VARIABLE, value)
        problem.run("auto")
        assert called[-1] == f"_{value}"
        assert info.collect()["operators"]["separable_execution"]["cpu"].startswith(value)
    monkeypatch.setenv(atrous_separable.EXECUTION_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"must be one of auto, whole, two_kernels, got 'fast'"):
        problem.run("auto")


def test_choice_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 600, 5, 5)
    weight = torch.empty(600, 1, 3, 3)

    def picks(image: Tensor, out_channels: int) -> bool:
        return atrous_separable.picks_whole("auto", image, weight, out_channels, [image, weight])

    monkeypatch.setattr(atrous_separable, "_WHOLE_ON_CPU", True)
    last = x.to(memory_format=torch.channels_last)
    assert [picks(x, 400), picks(x, 100), picks(last, 100), picks(last.half(), 100)] == [True, False, True, False]
    assert [picks(x, 1535), picks(x, 1536), picks(last, 1535), picks(last, 1536)] == [True, False, True, False]
    wide, many = torch.empty(1, 1024, 5, 5), torch.empty(1024, 1, 3, 3)
    assert not atrous_separable.picks_whole("auto", wide, many, 1024, [wide, many])
    wide = wide.to(memory_format=torch.channels_last)
    assert atrous_separable.picks_whole("auto", wide, many, 1024, [wide, many])
    assert not picks(x.requires_grad_(), 400)
    monkeypatch.setattr(atrous_separable, "_WHOLE_ON_CPU", False)
    assert not picks(last, 400)
    monkeypatch.setattr(_backends, "_on_triton", set())
    assert atrous_separable.describe_execution() == {"cpu": "two_kernels", "cuda": "two_kernels"}


def test_choice_by_cost_on_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def picks(dtype: torch.dtype, out_channels: int) -> bool:
        with FakeTensorMode():
            x, weight = torch.empty(1, 600, 5, 5, dtype=dtype, device="cuda"), torch.empty(600, 1, 3, 3, device="cuda")
        return atrous_separable.picks_whole("auto", x, weight, out_channels, [x, weight])

    monkeypatch.setattr(_backends, "_on_triton", {"atrous_separable_conv2d"})
    assert picks(torch.float16, 256)
    assert picks(torch.bfloat16, 19)
    assert not picks(torch.float16, 257)
    assert not picks(torch.float32, 256)
    assert "whole in 16 bits with up to 256 results" in atrous_separable.describe_execution()["cuda"]
    monkeypatch.setattr(_backends, "_on_triton", set())
    assert not picks(torch.float16, 256)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pointwise_weight": torch.randn(3, 5, 1, 1)}, ValueError, r"shape \(out_channels, 4, 1, 1\)"),
        ({"pointwise_weight": torch.randn(3, 4, 1, 1).double()}, TypeError, "pointwise_weight must have x's dtype"),
        ({"pointwise_weight": None}, TypeError, "pointwise_weight must be a torch.Tensor"),
        ({"residual": torch.randn(1, 3, 6, 6)}, ValueError, r"residual must have the output's shape \(1, 3, 6, 5\)"),
        ({"residual": torch.randn(1, 3, 6, 5).half()}, TypeError, "residual must have x's dtype"),
        ({"residual": 1}, TypeError, "residual must be a torch.Tensor or None"),
        ({"depthwise_norm": (None, None)}, TypeError, "depthwise_norm must be an ops.BatchNorm"),
        ({"depthwise_norm": ops.BatchNorm(None, None)}, ValueError, "running_mean must be given"),
        ({"pointwise_bias": torch.randn(4)}, ValueError, r"pointwise_bias must have shape \(3,\)"),
        ({"pre_activation": "gelu"}, ValueError, "activation must be"),
        ({"execution": "fast"}, ValueError, "execution must be one of"),
        ({"depthwise_weight": torch.randn(8, 1, 3, 3)}, ValueError, r"\(out_channels, 8, 1, 1\)"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(1, 4, 6, 5),
        "depthwise_weight": torch.randn(4, 1, 3, 3),
        "pointwise_weight": torch.randn(3, 4, 1, 1),
        "padding": 1,
    }
    with pytest.raises(error, match=message):
        ops.atrous_separable_conv2d(**arguments | changes)


def test_multiplier_takes_two_kernels() -> None:
    x, depthwise, pointwise = torch.randn(1, 4, 6, 5), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
    out = ops.atrous_separable_conv2d(x, depthwise, pointwise, padding=1)
    torch.testing.assert_close(out, F.conv2d(F.conv2d(x, depthwise, None, 1, 1, 1, 4), pointwise))
    with pytest.raises(ValueError, match="8 depthwise filters on 4 channels"):
        ops.atrous_separable_conv2d(x, depthwise, pointwise, padding=1, execution="whole")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biases", [False, True])
def test_module_is_the_same_either_way(biases: bool, layout: str) -> None:
    torch.manual_seed(0)
    block = AtrousSeparableConv2d(
        20, 9, padding="same", dilation=2, pre_activation="relu", depthwise_norm=True, pointwise_norm=True,
        pointwise_activation="relu6", bias=biases, depthwise_bias=biases,
    )  # fmt: skip
    x = torch.randn(2, 20, 11, 9).to(memory_format=LAYOUTS[layout])
    residual = torch.randn(2, 9, 11, 9)
    block(x)  # moves the running statistics
    block.eval()
    outputs = {}
    with torch.no_grad():
        for execution in ("whole", "two_kernels"):
            block.execution = execution
            outputs[execution] = block(x, residual)
    torch.testing.assert_close(outputs["whole"], outputs["two_kernels"], atol=1e-5, rtol=1e-5)
    assert block(x, residual).requires_grad  # gradients: two kernels, whatever was asked for
    with pytest.raises(ValueError, match="execution must be one of"):
        block.execution = "three"
    with torch.no_grad(), pytest.raises(ValueError, match=r"shape \(N, 20, H, W\)"):
        block(x[:, :10])
