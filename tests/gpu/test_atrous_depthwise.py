"""The atrous depthwise operators on a GPU: the CUDA and the Triton kernels against the float64 reference.

Skipped without a GPU. DEEPLAB_KERNELS_REHEARSE=1 runs the same bodies on the CPU kernels instead (small cases; what
needs a GPU stays skipped), so that a mistake in this file shows before a GPU is at hand.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _cuda_graph import assert_replays, captured
from torch import Tensor

from deeplab_kernels import _library, ops, reference

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")

Operator = Callable[..., Any]
OPERATORS = (
    "atrous_depthwise_conv2d", "atrous_depthwise_conv2d_backward", "atrous_depthwise_bn_act_inference",
    "atrous_depthwise_bn_act_training", "atrous_depthwise_bn_act_backward",
)  # fmt: skip


def native(name: str) -> Operator:
    return getattr(torch.ops.deeplab_kernels, name).default


def in_triton(name: str) -> Operator:
    from deeplab_kernels.triton import atrous_depthwise

    return getattr(atrous_depthwise, name)


BACKENDS: dict[str, Callable[[str], Operator]] = {"cpu": native} if REHEARSAL else {"cuda": native, "triton": in_triton}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Callable[[str], Operator]:
    if request.param in _library.missing():
        pytest.fail(f"{request.param} kernels are missing: {_library.missing()[request.param]}")
    return BACKENDS[request.param]


@dataclass(frozen=True)
class Case:
    n: int
    c: int
    h: int
    w: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1
    m: int = 1
    padding: tuple[int, int, int, int] | None = None  # None: rate * (kernel // 2) on every side

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        same = self.rate * (self.kernel // 2)
        return [self.stride] * 2, list(self.padding or (same,) * 4), [self.rate] * 2


CASES = {
    "middle flow": Case(2, 728, 33, 33, rate=2),
    "aspp": Case(1, 256, 33, 33, rate=12),
    "aspp, most taps in the padding": Case(2, 64, 33, 33, rate=18),
    "entry flow": Case(1, 128, 129, 127),
    "stride 2": Case(2, 64, 65, 63, stride=2),
    "decoder": Case(1, 304, 65, 65),
    "odd channels": Case(2, 37, 33, 5),
    "one pixel": Case(4, 16, 1, 1),
    "one column": Case(2, 8, 127, 1),
    "kernel 5, multiplier 2": Case(2, 6, 17, 19, kernel=5, m=2),
    "sides": Case(1, 8, 21, 23, padding=(0, 3, 2, 5), rate=2),
    "stride 3, rate 2": Case(1, 24, 20, 31, stride=3, rate=2),
    "kernel 1": Case(2, 8, 9, 9, kernel=1),
    "long rows": Case(1, 3, 4, 9000),
}
if REHEARSAL:
    CASES = {name: c for name, c in CASES.items() if c.n * c.c * c.h * c.w < 50_000}


def tensors(case: Case, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    channels = case.c * case.m
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(case.n, case.c, case.h, case.w) + 2 * normal(1, case.c, 1, 1)
    weight = normal(channels, 1, case.kernel, case.kernel) / case.kernel
    t = {"x": x, "weight": weight, "gamma": normal(channels) + 1.5, "beta": normal(channels)}
    y = reference.atrous_depthwise_conv2d(x, weight, *case.geometry)
    t["mean"], t["var"] = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0) + 0.01
    t["grad"], t["y"] = normal(*y.shape), y
    vectors = ("gamma", "beta", "mean", "var")
    t = {name: v.to(DEVICE, acc if name in vectors else dtype) for name, v in t.items()}
    return {k: v.contiguous(memory_format=LAYOUTS[layout]) if k in ("x", "grad", "y") else v for k, v in t.items()}


def calls(case: Case, t: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    x, weight, geometry = t["x"], t["weight"], case.geometry
    norm = (t["gamma"], t["beta"])
    return {
        "atrous_depthwise_conv2d": (x, weight, *geometry),
        "atrous_depthwise_conv2d_backward": (t["grad"], x, weight, *geometry, True, True),
        "atrous_depthwise_bn_act_inference": (x, weight, *norm, t["mean"], t["var"], 1e-3, 2, *geometry),
        "atrous_depthwise_bn_act_training": (x, weight, *norm, 1e-3, 1, *geometry, True),
        "atrous_depthwise_bn_act_backward": (
            t["grad"], x, weight, t["y"], *norm, t["mean"], t["var"], 1e-3, 1, True, *geometry, True, True,
        ),
    }  # fmt: skip


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def exact(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference in float64 on the CPU."""
    wide = [a.double().cpu() if isinstance(a, Tensor) else a for a in arguments]
    return as_tuple(getattr(reference, name)(*wide))


def assert_close(name: str, arguments: tuple[Any, ...], result: tuple[Tensor, ...]) -> None:
    """At most twice the error of the reference run in the storage type on the same device, plus rounding."""
    plain = as_tuple(getattr(reference, name)(*arguments))
    for i, (ours, theirs, wanted) in enumerate(zip(result, plain, exact(name, arguments), strict=True)):
        assert ours.shape == wanted.shape
        assert ours.dtype == theirs.dtype
        if not wanted.numel():
            continue
        scale = max(float(wanted.abs().max()), 1.0)
        error, plain_error = (float((r.double().cpu() - wanted).abs().max()) / scale for r in (ours, theirs))
        # 16 bits: half a unit for the result and one for conv(x), which the fused operators store before normalising.
        # Otherwise: long sums in another order.
        floor = torch.finfo(ours.dtype).eps * (2 if ours.dtype.itemsize == 2 else 256)
        if arguments[0].dtype.itemsize == 2 and ours.dtype.itemsize > 2:
            floor = 1e-3  # sums over 16-bit tensors: the reference may have rounded them
        assert error <= max(2 * plain_error, floor), f"result {i}: error {error:.2e}, plain torch {plain_error:.2e}"


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """Fresh memory holds NaN, and plain torch computes in full float32."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_reference_and_repeats_bit_for_bit(
    case: str, dtype: str, layout: str, backend: Callable[[str], Operator]
) -> None:
    for name, arguments in calls(CASES[case], tensors(CASES[case], DTYPES[dtype], layout)).items():
        result = as_tuple(backend(name)(*arguments))
        assert_close(name, arguments, result)
        for first, again in zip(result, as_tuple(backend(name)(*arguments)), strict=True):
            assert torch.equal(first, again), f"{name} does not repeat"
        if name == "atrous_depthwise_conv2d" and result[0].shape[1] > 1 and result[0].shape[2:].numel() > 1:
            assert result[0].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_conv_is_recomputed_where_it_was_not_kept(dtype: str, layout: str, backend: Callable[[str], Operator]) -> None:
    case = Case(2, 72, 33, 33, rate=2)
    arguments = calls(case, tensors(case, DTYPES[dtype], layout))
    training = list(arguments["atrous_depthwise_bn_act_training"])
    kept = backend("atrous_depthwise_bn_act_training")(*training)
    training[-1] = False
    out, y, mean, var = backend("atrous_depthwise_bn_act_training")(*training)
    assert y.shape == (0,)
    torch.testing.assert_close(out, kept[0], rtol=2**-6, atol=2**-6 if dtype == "bf16" else 1e-4)
    assert torch.equal(mean, kept[2])
    assert torch.equal(var, kept[3])
    backward = list(arguments["atrous_depthwise_bn_act_backward"])
    given = as_tuple(backend("atrous_depthwise_bn_act_backward")(*backward))
    backward[3] = backward[1].new_empty(0)
    for ours, wanted in zip(as_tuple(backend("atrous_depthwise_bn_act_backward")(*backward)), given, strict=True):
        # In 16 bits the rounding of y decides on which side of ReLU's kink some elements lie.
        share = float((ours.double() - wanted.double()).norm() / wanted.double().norm())
        assert share <= (0.15 if dtype == "bf16" else 0.01)


@pytest.mark.parametrize("need", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unneeded_gradients_are_empty(layout: str, need: tuple[bool, bool], backend: Callable[[str], Operator]) -> None:
    case = Case(1, 8, 21, 23, padding=(0, 3, 2, 5), rate=2)
    arguments = calls(case, tensors(case, torch.float32, layout))["atrous_depthwise_conv2d_backward"]
    full = backend("atrous_depthwise_conv2d_backward")(*arguments)
    some = backend("atrous_depthwise_conv2d_backward")(*arguments[:-2], *need)
    for wanted, result, needed in zip(full, some, need, strict=True):
        if needed:
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert result.shape == (0,)


def test_views_off_a_16_byte_boundary(backend: Callable[[str], Operator]) -> None:
    x = torch.randn(3, 8, 9, 11, device=DEVICE).flatten()[1 : 1 + 2 * 8 * 9 * 11].view(2, 8, 9, 11)
    weight = torch.randn(8, 1, 3, 3, device=DEVICE)
    arguments = (x, weight, [1, 1], [1, 1, 1, 1], [1, 1])
    assert_close("atrous_depthwise_conv2d", arguments, as_tuple(backend("atrous_depthwise_conv2d")(*arguments)))


def test_empty_batch(backend: Callable[[str], Operator]) -> None:
    x, weight = torch.empty(0, 8, 5, 5, device=DEVICE), torch.randn(8, 1, 3, 3, device=DEVICE)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    assert backend("atrous_depthwise_conv2d")(x, weight, *geometry).shape == (0, 8, 5, 5)
    grads = backend("atrous_depthwise_conv2d_backward")(torch.empty_like(x), x, weight, *geometry, True, True)
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_opcheck() -> None:
    case = Case(2, 8, 9, 7, rate=2)
    for name, arguments in calls(case, tensors(case, torch.float32, "nhwc")).items():
        inputs = tuple(
            a.clone().requires_grad_() if isinstance(a, Tensor) and i < 2 and "backward" not in name else a
            for i, a in enumerate(arguments)
        )
        torch.library.opcheck(native(name), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_through_autograd(layout: str) -> None:
    case = Case(2, 72, 33, 33, rate=2)
    t = tensors(case, torch.float32, layout)
    leaves = {k: t[k].clone().requires_grad_() for k in ("x", "weight", "gamma", "beta")}
    stride, padding, rate = case.geometry
    out = ops.atrous_depthwise_bn_act(
        *leaves.values(), None, None, training=True, eps=1e-3, stride=stride, padding=padding, dilation=rate
    )
    grads = torch.autograd.grad(out, list(leaves.values()), t["grad"])
    wide = [v.detach().double().cpu().requires_grad_() for v in leaves.values()]
    y = torch.nn.functional.conv2d(wide[0], wide[1], None, stride, padding[::2], rate, case.c)
    z = torch.nn.functional.batch_norm(y, None, None, wide[2], wide[3], True, 0.1, 1e-3)
    wanted = torch.autograd.grad(z.relu(), wide, t["grad"].double().cpu())
    for name, ours, exact_grad in zip(leaves, grads, wanted, strict=True):
        error = (ours.double().cpu() - exact_grad).norm() / exact_grad.norm()
        assert error < 1e-3, f"gradient of {name}: {error:.2e}"  # an element next to ReLU's kink may switch


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(name: str, layout: str, backend: Callable[[str], Operator]) -> None:
    case = Case(1, 256, 33, 33, rate=12)
    t = tensors(case, torch.bfloat16, layout)
    arguments = calls(case, t)[name]
    graph, out = captured(lambda: as_tuple(backend(name)(*arguments)))
    t["x"].mul_(0.5)
    assert_replays(graph, out, lambda: as_tuple(backend(name)(*arguments)))


@needs_gpu
def test_runs_on_the_current_stream(backend: Callable[[str], Operator]) -> None:
    x, weight = torch.zeros(8, 256, 65, 65, device="cuda"), torch.ones(256, 1, 3, 3, device="cuda")
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    backend("atrous_depthwise_conv2d")(x, weight, *geometry)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would run before the fill
        x.fill_(1)
        y = backend("atrous_depthwise_conv2d")(x, weight, *geometry)
    stream.synchronize()
    assert float(y[0, 0, 1, 1]) == 9
    assert float(y.sum()) > 0


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(backend: Callable[[str], Operator]) -> None:
    x, weight = torch.randn(1, 8, 9, 9, device="cuda:1"), torch.randn(8, 1, 3, 3, device="cuda:1")
    arguments = (x, weight, [1, 1], [1, 1, 1, 1], [1, 1])
    assert_close("atrous_depthwise_conv2d", arguments, as_tuple(backend("atrous_depthwise_conv2d")(*arguments)))


@needs_gpu
@pytest.mark.big
def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 // (64 * 257 * 257) + 1
    weight = torch.randn(64, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    for layout in LAYOUTS.values():
        x = torch.empty(n, 64, 257, 257, device="cuda", dtype=torch.bfloat16, memory_format=layout).zero_()
        x[-1].normal_()
        y = native("atrous_depthwise_conv2d")(x, weight, *geometry)
        alone = native("atrous_depthwise_conv2d")(x[-1:].clone(), weight, *geometry)
        assert torch.equal(y[-1:], alone)
        assert not y[0].any()
