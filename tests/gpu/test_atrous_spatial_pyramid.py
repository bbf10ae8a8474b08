"""The atrous spatial pyramid on a GPU: the CUDA and the Triton kernels against the float64 reference.

Skipped without a GPU; DEEPLAB_KERNELS_REHEARSE=1 runs the same bodies on the CPU (see test_atrous_depthwise.py).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _cases import DTYPES, LAYOUTS
from _cuda_graph import assert_replays, captured
from _pyramid import RawPyramid
from torch import Tensor

from deeplab_kernels import _library, ops, reference

REHEARSAL = os.environ.get("DEEPLAB_KERNELS_REHEARSE") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")

Operator = Callable[..., Any]


def native(name: str) -> Operator:
    return getattr(torch.ops.deeplab_kernels, name).default


def in_triton(name: str) -> Operator:
    from deeplab_kernels.triton import atrous_spatial_pyramid

    return getattr(atrous_spatial_pyramid, name)


BACKENDS: dict[str, Callable[[str], Operator]] = {"cpu": native} if REHEARSAL else {"cuda": native, "triton": in_triton}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Callable[[str], Operator]:
    if request.param in _library.missing():
        pytest.fail(f"{request.param} kernels are missing: {_library.missing()[request.param]}")
    return BACKENDS[request.param]


ASPP = (6, 6, 12, 12, 18, 18)
# (size of x, rates, kernel)
PROBLEMS = {
    "aspp": ((2, 256, 33, 33), ASPP, (3, 3)),
    "aspp at output stride 8": ((1, 64, 65, 65), (12, 12, 24, 24, 36, 36), (3, 3)),
    "odd channels": ((2, 37, 33, 9), ASPP, (3, 3)),
    "no common divisor": ((1, 16, 64, 63), (1, 1, 2, 3, 5, 5), (3, 3)),
    "bands of large planes": ((1, 3, 200, 190), ASPP, (3, 3)),
    "one pixel": ((4, 16, 1, 1), (1, 1, 2, 2), (3, 3)),
    "rates beyond the image": ((2, 8, 9, 7), (3, 3, 50, 50), (3, 3)),
    "kernel 5 x 2": ((2, 8, 17, 19), (2, 1, 4, 3), (5, 2)),
    "ten branches": ((1, 16, 17, 13), tuple(k for k in range(1, 11) for _ in range(2)), (3, 3)),
}
if REHEARSAL:
    PROBLEMS = {name: p for name, p in PROBLEMS.items() if torch.Size(p[0]).numel() < 30_000}


def problem_of(name: str, dtype: str, layout: str, **changes: Any) -> RawPyramid:
    return RawPyramid(*PROBLEMS[name], DTYPES[dtype], layout, DEVICE, **changes)


def flat(results: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for part in results:
        found += [part] if isinstance(part, Tensor) else part
    return found


@pytest.fixture(autouse=True)
def _poisoned_and_in_full_precision() -> Iterator[None]:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_exact_as_plain(name: str, problem: RawPyramid, results: list[Tensor]) -> None:
    """At most twice the error of the reference run in the storage type on the same device, plus rounding."""
    plain = flat(getattr(reference, name)(*problem.arguments(name)))
    exact = flat(getattr(reference, name)(*problem.double().arguments(name)))
    half = problem.x.dtype.itemsize == 2
    for k, (ours, theirs, wanted) in enumerate(zip(results, plain, exact, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if not wanted.numel():
            continue
        scale = max(float(wanted.abs().max()), 1.0)
        error, plain_error = (float((r.double().cpu() - wanted).abs().max()) / scale for r in (ours, theirs))
        floor = torch.finfo(ours.dtype).eps * (2 if ours.dtype.itemsize == 2 else 256)
        if half and ours.dtype.itemsize > 2:
            floor = 1e-3  # sums over 16-bit tensors: the reference may have rounded them
        assert error <= max(2 * plain_error, floor), f"{name} {k}: error {error:.2e}, plain torch {plain_error:.2e}"
        if ours.shape == problem.x.shape and ours.shape[1] > 1 and ours.shape[2:].numel() > 1:
            assert ours.stride() == problem.x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_agrees_with_reference_and_repeats_bit_for_bit(
    problem: str, dtype: str, layout: str, backend: Callable[[str], Operator]
) -> None:
    raw = problem_of(problem, dtype, layout)
    for name in RawPyramid.OPERATORS:
        results = flat(backend(name)(*raw.arguments(name)))
        assert_as_exact_as_plain(name, raw, results)
        for first, again in zip(results, flat(backend(name)(*raw.arguments(name))), strict=True):
            assert torch.equal(first, again), f"{name} does not repeat"


@pytest.mark.parametrize("changes", [{"norm": False}, {"affine": False, "pool": False}, {"keep_conv": False}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_optional(layout: str, changes: dict[str, bool], backend: Callable[[str], Operator]) -> None:
    raw = RawPyramid((2, 24, 21, 19), (2, 2, 4, 4, 6, 6), (3, 3), torch.float32, layout, DEVICE, **changes)
    for name in RawPyramid.OPERATORS:
        assert_as_exact_as_plain(name, raw, flat(backend(name)(*raw.arguments(name))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unneeded_gradients_are_empty(layout: str, backend: Callable[[str], Operator]) -> None:
    raw = RawPyramid((2, 24, 21, 19), (2, 2, 4, 4), (3, 3), torch.float32, layout, DEVICE)
    backward = backend("atrous_spatial_pyramid_backward")
    arguments = raw.arguments("atrous_spatial_pyramid_backward")
    full = backward(*arguments)
    for need in itertools.product((True, False), repeat=2):
        for wanted, result, needed in zip(full, backward(*arguments[:-2], *need), (*need, True, True), strict=True):
            if needed:
                torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
            else:
                assert result.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_off_a_16_byte_boundary(layout: str, backend: Callable[[str], Operator]) -> None:
    raw = RawPyramid((2, 8, 9, 11), (1, 1, 2, 2), (3, 3), torch.float32, layout, DEVICE)
    moved = torch.empty(raw.x.numel() + 1, device=DEVICE)[1:].as_strided(raw.x.shape, raw.x.stride(), 1)
    raw.x = moved.copy_(raw.x)
    for name in RawPyramid.OPERATORS:
        assert_as_exact_as_plain(name, raw, flat(backend(name)(*raw.arguments(name))))


def test_empty_batch(backend: Callable[[str], Operator]) -> None:
    raw = RawPyramid((0, 8, 5, 5), (1, 1, 2, 2), (3, 3), torch.float32, "nchw", DEVICE)
    outputs, pooled = backend("atrous_spatial_pyramid")(*raw.arguments("atrous_spatial_pyramid"))
    assert [y.shape for y in outputs] == [raw.x.shape] * 2
    assert pooled.shape == (0, 8, 1, 1)
    name = "atrous_spatial_pyramid_backward"
    assert torch.equal(backend(name)(*raw.arguments(name))[1], torch.zeros_like(raw.weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_through_autograd(layout: str) -> None:
    raw = RawPyramid((2, 40, 17, 17), (2, 2, 4, 4, 6, 6), (3, 3), torch.float32, layout, DEVICE)

    def gradients(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, gamma, beta)]
        norms = [ops.BatchNorm(None, None, g, b, eps=1e-3) for g, b in zip(*leaves[2:], strict=True)]
        y, pooled = ops.atrous_spatial_pyramid(
            leaves[0], list(leaves[1]), raw.rates[::2], norms, activation="relu", training=True
        )
        assert pooled is not None
        loss = sum((out * g.to(out)).sum() for out, g in zip(y, raw.grads, strict=True)) + 30 * pooled.square().sum()
        return torch.autograd.grad(loss, leaves)

    gamma, beta = raw.vectors[:2]
    assert gamma is not None
    assert beta is not None
    tensors = (raw.x, raw.weight, gamma, beta)
    wanted = gradients(*(t.double().cpu() for t in tensors))
    for ours, exact in zip(gradients(*tensors), wanted, strict=True):
        error = (ours.double().cpu() - exact).norm() / exact.norm()
        assert error < 1e-3  # an element next to ReLU's kink may switch


@needs_gpu
@pytest.mark.parametrize("name", RawPyramid.OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(name: str, layout: str, backend: Callable[[str], Operator]) -> None:
    raw = problem_of("aspp", "bf16", layout)
    arguments = raw.arguments(name)
    graph, out = captured(lambda: flat(backend(name)(*arguments)))
    raw.x.mul_(0.5)
    assert_replays(graph, out, lambda: flat(backend(name)(*arguments)))
