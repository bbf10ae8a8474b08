"""Mean-field inference and its layer: against the definition, gradients, and what people do with them."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from _cases import DEVICES
from _filters import NORMALIZATIONS
from _threads import assert_same_bits
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import ops, reference
from deeplab_kernels.nn import DenseCRF
from deeplab_kernels.ops import _backends, dense_crf_mean_field

raw = torch.ops.deeplab_kernels
D = torch.float64


def random(*size: int, dtype: torch.dtype = D, requires_grad: bool = False, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, dtype=D) * scale).to(dtype).requires_grad_(requires_grad)


def assert_close(ours: Tensor, wanted: Tensor, tolerance: float, what: str = "", magnitude: float = 1.0) -> None:
    assert ours.shape == wanted.shape, what
    if ours.numel():
        largest = max(wanted.abs().max().item(), magnitude)
        error = (ours.double() - wanted.double()).abs().max().item()
        assert error <= tolerance * largest, f"{what}: error {error:.2e} of {largest:.2e}"


def by_hand(
    unary: Tensor,
    features: list[Tensor],
    compatibility: list[Tensor],
    iterations: int,
    normalization: str = "symmetric",
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Exact mean field with whole N x N kernels: unary (B, L, N), mask (B, N); a window for (B, L, H, W)."""
    size = unary.shape
    if window is not None:
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in size[2:]), indexing="ij")
        y, x = rows.flatten(), columns.flatten()
        near = ((y[:, None] - y).abs() <= window) & ((x[:, None] - x).abs() <= window)
    present = torch.ones(size[0], unary.flatten(2).shape[2], dtype=unary.dtype)
    present = present if mask is None else mask.flatten(1).to(unary.dtype)
    kernels = []
    for f in features:
        points = f.flatten(2).mT
        k = torch.exp(-(points[:, :, None] - points[:, None]).square().sum(-1) / 2)
        k = k * present[:, :, None] * present[:, None]
        k = k if window is None else k * near
        n = k.sum(2)
        n = torch.where(n == 0, 1, n)
        if normalization == "symmetric":
            k = k * n.rsqrt()[:, :, None] * n.rsqrt()[:, None]
        elif normalization != "none":
            k = k / (n[:, None] if normalization == "before" else n[:, :, None])
        kernels.append(k)
    energy = unary.flatten(2)
    logits = -energy
    for _ in range(iterations):
        q = logits.softmax(1)
        logits = -energy - sum(
            torch.einsum("lk,bij,bkj->bli", c, k, q) for c, k in zip(compatibility, kernels, strict=True)
        )
    return logits.view(size)


def problem(batch: int = 2, labels: int = 3, points: int = 33, dtype: torch.dtype = D) -> dict[str, Any]:
    return {
        "unary": random(batch, labels, points, dtype=dtype),
        "features": [random(batch, 5, points, dtype=dtype, scale=0.5), random(batch, 2, points, dtype=dtype)],
        "compatibility": [random(labels, labels, dtype=dtype, scale=0.5), random(labels, dtype=dtype)],
    }


def test_every_operator_has_a_compiled_kernel_here() -> None:
    for name in ("dense_crf_mean_field", "dense_crf_mean_field_backward"):
        assert _backends.serving(name)["cpu"].startswith("C++")


# The definition.


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_and_local_filters_against_whole_kernels(normalization: str, masked: bool) -> None:
    unary, features = random(2, 3, 5, 7), [random(2, 4, 5, 7), random(2, 2, 5, 7)]
    matrices = [random(3, 3), random(3, 3)]  # neither symmetric nor positive
    mask = torch.rand(2, 5, 7) > 0.3 if masked else None
    options = {"iterations": 4, "normalization": normalization, "mask": mask}
    ours = dense_crf_mean_field(unary, features, matrices, filter="exact", **options)
    assert_close(ours, by_hand(unary, features, matrices, **options), 1e-10)
    ours = dense_crf_mean_field(unary, features, matrices, filter="local", window=2, **options)
    assert_close(ours, by_hand(unary, features, matrices, window=2, **options), 1e-10)


def test_lattice_is_near_the_exact_filter() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    features = torch.stack([x, y])[None] / 3
    unary = random(1, 4, 24, 32, dtype=torch.float32)
    results = [
        dense_crf_mean_field(unary, features, 2.0, iterations=5, filter=f).softmax(1)
        for f in ("permutohedral", "exact")
    ]
    assert (results[0] - results[1]).abs().mean() < 0.02
    assert (results[0].argmax(1) == results[1].argmax(1)).float().mean() > 0.96


def test_convention_of_compatibility() -> None:
    """A positive Potts weight favours equal labels; vectors are Potts weights per label, matrices are costs."""
    unary, features = random(1, 3, 65), random(1, 2, 65)
    assert torch.equal(dense_crf_mean_field(unary, features, 2.0, iterations=0), -unary)
    once = dense_crf_mean_field(unary, features, 2.0, iterations=1, normalization="after")
    smooth = ops.permutohedral_filter((-unary).softmax(1), features, "after")
    assert_close(once, -unary + 2.0 * smooth, 1e-12)
    potts = dense_crf_mean_field(unary, features, 2.0, iterations=3)
    for same in (torch.tensor(2.0, dtype=D), torch.full((3,), 2.0, dtype=D), -2 * torch.eye(3, dtype=D), 2):
        assert_close(dense_crf_mean_field(unary, features, same, iterations=3), potts, 1e-12)
    # The costs of disagreement, 1 - I, are Potts up to a term that all labels share where n = K 1 makes rows sum to 1.
    costs = 2 * (1 - torch.eye(3, dtype=D))
    other = dense_crf_mean_field(unary, features, costs, iterations=3, normalization="after")
    potts = dense_crf_mean_field(unary, features, 2.0, iterations=3, normalization="after")
    assert_close(other.softmax(1), potts.softmax(1), 1e-12)
    # mu(x_i, x_j): rows are the labels that pay.
    matrix = torch.zeros(3, 3, dtype=D)
    matrix[0, 2] = 5.0
    out = dense_crf_mean_field(unary, features, matrix, iterations=1, normalization="after")
    assert_close(out[:, 1:], -unary[:, 1:], 1e-12)
    assert_close(out[:, 0], -unary[:, 0] - 5 * smooth[:, 2], 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", [(0, 1), (1, 2), (2, 3), (3, 0)])
@pytest.mark.parametrize("labels", [1, 2, 7, 8, 9, 21, 33])
def test_against_the_definition(labels: int, codes: tuple[int, int], device: str, poisoned_memory: None) -> None:
    for (batch, points), iterations, masked in itertools.product([(1, 1), (2, 33)], (0, 1, 4), (False, True)):
        u = random(batch, labels, points)
        fs = [random(batch, 5, points, scale=0.5), random(batch, 2, points)]
        # A full matrix, a diagonal one and a multiple of the identity take different paths. Without normalisation the
        # messages are many times larger, and rounding errors grow from one iteration to the next.
        strength = 0.1 if 0 in codes else 1.0
        cs = [random(labels, labels, scale=0.3) * strength, torch.diag(random(labels)) * strength]
        if iterations == 4:
            cs[1] = -3 * strength * torch.eye(labels, dtype=D)
        mask = torch.rand(batch, points) > 0.3 if masked else None
        g = random(batch, labels, points)
        for dtype, tolerance in ((D, 1e-10), (torch.float32, 2e-5)):
            tu, tg, *rest = (t.to(device, dtype) for t in (u, g, *fs, *cs))
            tf, tc = rest[:2], rest[2:]
            m = None if mask is None else mask.to(device)
            exact_features = [f.cpu().double() for f in tf]
            wanted, kept = reference.dense_crf_mean_field(u, exact_features, [], cs, mask, codes, iterations, True)
            ours, saved = raw.dense_crf_mean_field(tu, tf, [], tc, m, codes, iterations, True)
            assert_close(ours.cpu(), wanted, tolerance, "energy")
            assert saved.shape == kept.shape == (iterations, batch, points, (labels + 7) // 8 * 8)
            assert_close(saved[..., :labels].cpu(), kept[..., :labels], tolerance, "Q")
            wanted_grads = reference.dense_crf_mean_field_backward(
                g, kept, u, exact_features, [], cs, mask, codes, iterations, True, True
            )
            magnitude = 10 * max(1.0, *(t.abs().max().item() for t in (wanted_grads[0], *wanted_grads[2])))
            for s in (saved, saved.new_empty(0)):
                grads = raw.dense_crf_mean_field_backward(tg, s, tu, tf, [], tc, m, codes, iterations, True, True)
                assert_close(grads[0].cpu(), wanted_grads[0], tolerance, "gradient of unary")
                for a, b in zip([*grads[1], *grads[2]], [*wanted_grads[1], *wanted_grads[2]], strict=True):
                    assert_close(a.cpu(), b, tolerance, "gradient", magnitude)


@pytest.mark.parametrize("size", [(0, 3, 5), (2, 3, 0)])
def test_empty(size: tuple[int, int, int]) -> None:
    unary, features = random(*size, requires_grad=True), random(size[0], 2, size[2], requires_grad=True)
    weight = torch.tensor(2.0, dtype=D, requires_grad=True)
    for filter in ("permutohedral", "exact"):
        out = dense_crf_mean_field(unary, features, weight, filter=filter)
        assert out.shape == size
        out.sum().backward()
    assert weight.grad == 0


@pytest.mark.parametrize("filter", ["permutohedral", "exact"])
def test_without_kernels_and_with_one_label(filter: str) -> None:
    unary = random(2, 3, 33, requires_grad=True)
    out = dense_crf_mean_field(unary, [], [], filter=filter)
    assert torch.equal(out, -unary)
    assert torch.equal(torch.autograd.grad(out.sum(), unary)[0], -torch.ones_like(unary))
    one = dense_crf_mean_field(unary[:, :1], random(2, 2, 33), 3.0, filter=filter)
    assert torch.equal(one.softmax(1), torch.ones(2, 1, 33, dtype=D))


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_masked_pixels_send_and_receive_nothing(filter: str) -> None:
    options: dict[str, Any] = {"filter": filter, "iterations": 3} | ({"window": 2} if filter == "local" else {})
    unary, features, mask = random(2, 3, 5, 7), random(2, 2, 5, 7), torch.rand(2, 5, 7) > 0.4
    out = dense_crf_mean_field(unary, features, 2.0, mask=mask, **options)
    hidden = ~mask[:, None].expand_as(unary)
    assert torch.equal(out[hidden], -unary[hidden])
    changed = torch.where(hidden, random(2, 3, 5, 7), unary)
    other = dense_crf_mean_field(changed, features, 2.0, mask=mask, **options)
    assert torch.equal(other[~hidden], out[~hidden])
    assert not torch.equal(dense_crf_mean_field(unary, features, 2.0, **options)[~hidden], out[~hidden])
    assert torch.equal(dense_crf_mean_field(unary, features, 2.0, mask=torch.zeros_like(mask), **options), -unary)
    assert_close(
        dense_crf_mean_field(unary, features, 2.0, mask=torch.ones_like(mask), **options),
        dense_crf_mean_field(unary, features, 2.0, **options), 1e-12,
    )  # fmt: skip
    assert torch.equal(dense_crf_mean_field(unary, features, 2.0, mask=mask.flatten(1), **options), out)


def test_lattices_are_used_again() -> None:
    case = problem(dtype=torch.float32)
    for f in case["features"]:
        f.requires_grad_()
    wanted = dense_crf_mean_field(**case)
    lattices = [ops.PermutohedralLattice(f) for f in case["features"]]
    mixed = [lattices[0], case["features"][1]]
    for features in (lattices, mixed, lattices):
        out = dense_crf_mean_field(case["unary"], features, case["compatibility"])
        assert torch.equal(out, wanted)
        grads = torch.autograd.grad(out.square().sum(), case["features"])
        for a, b in zip(
            grads, torch.autograd.grad(dense_crf_mean_field(**case).square().sum(), case["features"]), strict=True
        ):
            assert torch.equal(a, b)


def test_images_volumes_and_strides() -> None:
    features, matrix = random(2, 3, 60), random(3, 3)
    flat = random(2, 3, 60)
    wanted = dense_crf_mean_field(flat, features, matrix, iterations=3)
    for size in ((6, 10), (3, 4, 5)):
        unary = flat.view(2, 3, *size)
        assert torch.equal(dense_crf_mean_field(unary, features, matrix, iterations=3).flatten(2), wanted)
        shaped = features.view(2, 3, *size)
        assert torch.equal(dense_crf_mean_field(unary, shaped, matrix, iterations=3).flatten(2), wanted)
        last = unary.movedim(1, -1).contiguous().movedim(-1, 1)
        assert not last.is_contiguous()
        out = dense_crf_mean_field(last, shaped.mT.contiguous().mT, matrix.t().contiguous().t(), iterations=3)
        assert torch.equal(out.flatten(2), wanted)
    every_other = torch.stack([flat, flat], 3).flatten(2)[:, :, ::2]
    assert torch.equal(dense_crf_mean_field(every_other, features, matrix, iterations=3), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("filter", ["permutohedral", "exact"])
def test_half_precision_unary(dtype: torch.dtype, filter: str) -> None:
    unary, features = random(2, 3, 33, dtype=dtype), random(2, 2, 33, dtype=torch.float32)
    out = dense_crf_mean_field(unary.requires_grad_(), features, 2.0, filter=filter)
    assert out.dtype == dtype
    wanted = dense_crf_mean_field(unary.float(), features, 2.0, filter=filter)
    assert torch.equal(out, wanted.to(dtype))
    out.sum().backward()
    assert unary.grad.dtype == dtype


def test_threads_do_not_change_the_result() -> None:
    case = problem(2, 21, 1500, torch.float32)
    leaves = [case["unary"], *case["features"], *case["compatibility"]]
    for leaf in leaves:
        leaf.requires_grad_()

    def results() -> list[Tensor]:
        out = dense_crf_mean_field(**case, iterations=3)
        return [out, *torch.autograd.grad(out.square().mean(), leaves)]

    assert_same_bits(results)


# Gradients.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_gradcheck(filter: str, normalization: str, recompute: bool) -> None:
    """Unary, features and compatibility, with a mask and a matrix that is not symmetric."""
    mask = torch.rand(1, 3, 3) > 0.2
    inputs = (
        random(1, 3, 3, 3, requires_grad=True),
        random(1, 2, 3, 3, requires_grad=True),
        random(1, 1, 3, 3, requires_grad=True),
        random(3, 3, requires_grad=True),
        random(3, requires_grad=True),
        random(requires_grad=True),
    )
    window = {"window": 1} if filter == "local" else {}

    def function(unary: Tensor, f1: Tensor, f2: Tensor, matrix: Tensor, vector: Tensor, weight: Tensor) -> Tensor:
        return dense_crf_mean_field(
            unary, [f1, f2, f2 * 0.7], [matrix, vector, weight], iterations=2, normalization=normalization, mask=mask,
            filter=filter, recompute=recompute, **window,
        )  # fmt: skip

    # The step is far smaller than the distance of these points to the walls of their simplices.
    torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-5)


def test_gradients_of_some_inputs_alone() -> None:
    case = problem()
    leaves = [case["unary"], *case["features"], *case["compatibility"]]

    def gradients(wanted: list[int]) -> list[Tensor]:
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted)
        out = dense_crf_mean_field(**case, iterations=3)
        return list(torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted]))

    everything = gradients([0, 1, 2, 3, 4])
    for wanted in ([0], [1], [2], [3], [4], [0, 2], [1, 4]):
        for i, grad in zip(wanted, gradients(wanted), strict=True):
            assert_close(grad, everything[i], 1e-12)


def test_differentiable_twice() -> None:
    unary, features = random(1, 2, 4, requires_grad=True), random(1, 1, 4, requires_grad=True)
    matrix = random(2, 2, requires_grad=True)
    torch.autograd.gradgradcheck(
        lambda u, f, c: dense_crf_mean_field(u, f, c, iterations=2), (unary, features, matrix), eps=1e-7, atol=1e-4
    )


def test_transforms_of_torch_func() -> None:
    unary, features, matrix = random(1, 2, 9), random(1, 2, 9), random(2, 2)

    def loss(u: Tensor, f: Tensor, c: Tensor) -> Tensor:
        return dense_crf_mean_field(u, f, c, iterations=2).square().sum()

    leaves = [t.clone().requires_grad_() for t in (unary, features, matrix)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for ours, right in zip(torch.func.grad(loss, (0, 1, 2))(unary, features, matrix), wanted, strict=True):
        assert_close(ours, right, 1e-10)


# torch's machinery.


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(save: bool) -> None:
    case = problem(2, 3, 17, torch.float32)
    unary, features = case["unary"].requires_grad_(), [f.requires_grad_() for f in case["features"]]
    matrices = [random(3, 3, dtype=torch.float32, requires_grad=True) for _ in features]
    packed = [raw.permutohedral_lattice(f.detach()) for f in features]
    mask = torch.rand(2, 17) > 0.3
    for lattices, m in (([], None), (packed, mask)):
        arguments = (unary, features, lattices, matrices, m, [3, 1], 2, save)
        torch.library.opcheck(raw.dense_crf_mean_field.default, arguments)
        plain = [t.detach() for t in (unary, *features, *matrices)]
        _, saved = raw.dense_crf_mean_field(plain[0], plain[1:3], lattices, plain[3:], m, [3, 1], 2, save)
        torch.library.opcheck(
            raw.dense_crf_mean_field_backward.default,
            (plain[0], saved, plain[0], plain[1:3], lattices, plain[3:], m, [3, 1], 2, save, True),
        )


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_compiled_in_one_graph(filter: str) -> None:
    crf = DenseCRF(3, iterations=2, trainable=True, filter=filter, window=2).double()
    logits, image = random(1, 3, 6, 7, requires_grad=True), (torch.rand(1, 3, 6, 7, dtype=D) * 255).requires_grad_()
    mask = torch.rand(1, 6, 7) > 0.2
    inputs = [logits, image, *crf.parameters()]
    wanted = torch.autograd.grad(crf(logits, image, mask).square().sum(), inputs)
    compiled = torch.compile(crf, fullgraph=True)
    ours = torch.autograd.grad(compiled(logits, image, mask).square().sum(), inputs)
    for a, b in zip(ours, wanted, strict=True):
        assert_close(a, b, 1e-9)


def test_exported() -> None:
    crf = DenseCRF(3, iterations=2).eval()
    arguments = torch.randn(1, 3, 6, 7), torch.rand(1, 3, 6, 7) * 255
    program = torch.export.export(crf, arguments)
    assert torch.equal(program.module()(*arguments), crf(*arguments))
    assert any("dense_crf_mean_field" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_autocast(filter: str) -> None:
    crf = DenseCRF(3, iterations=2, trainable=True, filter=filter)
    logits, image = torch.randn(1, 3, 6, 7, requires_grad=True), torch.rand(1, 3, 6, 7) * 255
    wanted = crf(logits, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = crf(logits, image)
        assert torch.equal(out, wanted)
        assert crf(logits.bfloat16(), image).dtype == torch.bfloat16
    out.sum().backward()
    assert logits.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    crf = DenseCRF(3, iterations=3, trainable=True)
    logits, image = torch.randn(1, 3, 9, 7, requires_grad=True), torch.rand(1, 3, 9, 7, requires_grad=True)
    inputs = [logits, image, *crf.parameters()]
    crf(logits, image).square().sum().backward()
    wanted = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    checkpoint(crf, logits, image, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, w) for t, w in zip(inputs, wanted, strict=True))


def test_flops_are_counted() -> None:
    case = problem()
    for leaf in (case["unary"], *case["compatibility"]):
        leaf.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        dense_crf_mean_field(**case, iterations=4).sum().backward()
    step = 2 * 2 * 3 * 33 * ((2 * 6 + 3) + (2 * 3 + 3))
    assert counter.get_total_flops() == 4 * step + 2 * 4 * step


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_kept_for_backward_is_as_documented(recompute: bool) -> None:
    held = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        held += t.numel() * t.element_size()
        return t

    labels, points, iterations = 21, 50 * 60, 10
    unary, features = torch.randn(1, labels, 50, 60, requires_grad=True), torch.randn(1, 2, 50, 60)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dense_crf_mean_field(unary, features, 2.0, iterations=iterations, recompute=recompute)
    inputs = 4 * (points * (labels + 2) + labels**2)
    assert held == inputs + (0 if recompute else 4 * iterations * points * 24)


# Bad input.


def good() -> dict[str, Any]:
    return {"unary": random(2, 3, 4, 5), "features": random(2, 2, 4, 5), "compatibility": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unary": [1.0]}, TypeError, "unary must be a torch.Tensor, got list"),
        ({"unary": torch.zeros(2, 3, 4, 5, dtype=torch.int64)}, TypeError, r"unary must be float32, .* torch.int64"),
        ({"unary": random(3, 20)}, ValueError, r"unary must have shape \(B, L, N\), .* got \(3, 20\)"),
        ({"unary": random(2, 0, 4, 5)}, ValueError, "unary must have at least 1 label"),
        ({"features": random(2, 2, 5, 4)}, ValueError, r"features\[0\] must have unary's batch and size"),
        ({"features": random(1, 2, 4, 5)}, ValueError, r"features\[0\] must have unary's batch and size"),
        ({"features": random(2, 17, 4, 5)}, ValueError, r"features\[0\] must have 1 to 16 feature dimensions"),
        ({"features": "xy"}, TypeError, "features must be a tensor or PermutohedralLattice or a sequence of them"),
        ({"features": torch.zeros(2, 2, 4, 5).int()}, TypeError, r"features\[0\] must be float32"),
        ({"compatibility": "potts"}, TypeError, "compatibility must be a number or tensor or a sequence"),
        ({"compatibility": [1.0, 2.0]}, ValueError, "one entry for each of the 1 kernels in features, got 2"),
        ({"compatibility": float("nan")}, ValueError, r"compatibility\[0\] must be finite, got nan"),
        ({"compatibility": torch.full((3,), float("inf"))}, ValueError, r"compatibility\[0\] must be finite"),
        ({"compatibility": random(4)}, ValueError, r"compatibility\[0\] must have shape \(\), \(3,\) or \(3, 3\)"),
        ({"compatibility": [True]}, TypeError, r"compatibility\[0\] must be a torch.Tensor, got bool"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got 2.0"),
        ({"normalization": "softmax"}, ValueError, "normalization must be one of"),
        ({"normalization": ["none", "none"]}, ValueError, "one string or one for each of the 1 kernels, got 2"),
        ({"filter": "bilateral"}, ValueError, "filter must be one of .* got 'bilateral'"),
        ({"filter": None}, TypeError, "filter must be one of"),
        ({"filter": "local"}, TypeError, 'window must be an int for filter="local", got None'),
        ({"filter": "local", "window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"filter": "local", "window": 2, "unary": random(2, 3, 20)}, ValueError, r"\(B, L, H, W\) for filter="),
        ({"window": 3}, ValueError, 'window is for filter="local", got window=3'),
        ({"recompute": 1}, TypeError, "recompute must be a bool"),
        ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask must be bool .* got torch.float32"),
        ({"mask": torch.ones(2, 5, 4).bool()}, ValueError, r"mask must have shape \(2, 4, 5\), got \(2, 5, 4\)"),
        ({"mask": [True]}, TypeError, "mask must be a torch.Tensor or None, got list"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dense_crf_mean_field(**(good() | change))


def test_bad_lattices() -> None:
    lattice = ops.PermutohedralLattice(random(2, 2, 20))
    with pytest.raises(TypeError, match=r"features\[0\] must be a lattice of torch.float32 features"):
        dense_crf_mean_field(random(2, 3, 4, 5, dtype=torch.float32), lattice, 1.0)
    with pytest.raises(TypeError, match=r'features\[0\] must be a tensor for filter="exact"'):
        dense_crf_mean_field(random(2, 3, 4, 5), lattice, 1.0, filter="exact")
    with pytest.raises(ValueError, match=r"features\[0\] must be a lattice of 2 x 21 points"):
        dense_crf_mean_field(random(2, 3, 21), lattice, 1.0)


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(bad: float, dtype: torch.dtype, filter: str) -> None:
    case = good() | {"filter": filter} | ({"window": 2} if filter == "local" else {})
    unary = case["unary"].to(dtype)
    for argument in (unary.clone(), unary.to(memory_format=torch.channels_last), unary[:, :, ::2].repeat(1, 1, 2, 1)):
        argument[1, 2 if bad < 0 or bad != bad else slice(None), 3, 1] = bad
        with pytest.raises(
            ValueError, match=r"unary must not hold NaN or -infinity|unary must leave each point a label"
        ):
            dense_crf_mean_field(**(case | {"unary": argument}))
    features = case["features"].clone()
    features[0, 1, 2, 2] = bad
    with pytest.raises(ValueError, match=r"features.* must be finite, got NaN or infinity"):
        dense_crf_mean_field(**(case | {"features": features}))


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
@pytest.mark.parametrize("compatibility", [2.0, "matrix"])
def test_infinite_energy_forbids_a_label(compatibility: Any, filter: str) -> None:
    """With the label forbidden everywhere the others behave as if it did not exist, gradients included."""
    case: dict[str, Any] = {"features": random(2, 2, 4, 5), "filter": filter, "iterations": 4}
    case |= {"window": 2} if filter == "local" else {}
    matrix = random(3, 3)
    two, three = (2.0, 2.0) if compatibility == 2.0 else (matrix[:2, :2], matrix)
    logits = random(2, 3, 4, 5, requires_grad=True)
    forbidden = torch.tensor([False, False, True]).view(1, 3, 1, 1)
    out = dense_crf_mean_field(-logits.masked_fill(forbidden, -float("inf")), compatibility=three, **case)
    wanted = dense_crf_mean_field(-logits[:, :2], compatibility=two, **case)
    assert_close(out[:, :2], wanted, 1e-12)
    assert (out[:, 2] == -float("inf")).all()
    (grad,) = torch.autograd.grad(out.softmax(1)[:, 0].sum(), logits)
    (wanted_grad,) = torch.autograd.grad(wanted.softmax(1)[:, 0].sum(), logits)
    assert_close(grad, wanted_grad, 1e-12)


def test_raw_operators_guard_their_memory() -> None:
    """Whoever calls the operators directly gets an error, not a read out of bounds."""
    good = {
        "unary": random(2, 3, 9), "features": [random(2, 2, 9)], "lattices": [], "compatibility": [random(3, 3)],
        "mask": None, "normalization": [3], "iterations": 2,
    }  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"unary": random(2, 3, 8)}, {"unary": random(1, 3, 9)}, {"unary": random(3, 9)}, {"unary": random(2, 0, 9)},
        {"unary": random(2, 3, 9, dtype=torch.float32)}, {"features": []}, {"features": [random(2, 17, 9)]},
        {"features": [random(2, 2, 9, dtype=torch.bfloat16)]}, {"lattices": [random(3).byte()] * 2},
        {"lattices": [torch.zeros(80, dtype=torch.uint8)]}, {"compatibility": [random(3)]},
        {"compatibility": [random(2, 2)]}, {"compatibility": [random(3, 3, dtype=torch.float32)]},
        {"mask": torch.ones(2, 8).bool()}, {"mask": torch.ones(2, 9)}, {"normalization": [4]}, {"normalization": []},
        {"iterations": -1},
    ]  # fmt: skip
    _, saved = raw.dense_crf_mean_field(**good, save=True)
    flags = {"need_grad_features": True, "need_grad_compatibility": True}
    for change in changes:
        with pytest.raises(RuntimeError):
            raw.dense_crf_mean_field(**(good | change), save=True)
        with pytest.raises(RuntimeError):
            raw.dense_crf_mean_field_backward(random(2, 3, 9), saved, **(good | change), **flags)
    for grad, kept in ((random(2, 3, 8), saved), (random(2, 3, 9), saved[:1]), (random(2, 3, 9), saved.float())):
        with pytest.raises(RuntimeError):
            raw.dense_crf_mean_field_backward(grad, kept, **good, **flags)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    batch, labels, points = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 26)), data.draw(st.integers(1, 40))
    count, iterations = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=D)

    unary = draw(batch, labels, points) * 10.0 ** data.draw(st.integers(-3, 3))
    features = [
        draw(batch, data.draw(st.integers(1, 16)), points) * 10.0 ** data.draw(st.integers(-4, 4)) for _ in range(count)
    ]
    shapes: list[tuple[int, ...]] = [(), (labels,), (labels, labels)]
    compatibility = [draw(*data.draw(st.sampled_from(shapes))) for _ in range(count)]
    normalization = [data.draw(st.sampled_from(NORMALIZATIONS)) for _ in range(count)]
    mask = torch.rand(batch, points, generator=generator) > 0.5 if data.draw(st.booleans()) else None
    out = dense_crf_mean_field(
        unary, features, compatibility, iterations=iterations, normalization=normalization, mask=mask
    )
    matrices = [c if c.dim() == 2 else torch.diag(-c.expand(labels)) for c in compatibility]
    codes = [NORMALIZATIONS.index(n) for n in normalization]
    wanted, _ = reference.dense_crf_mean_field(unary, features, [], matrices, mask, codes, iterations, False)
    assert out.isfinite().all()
    assert_close(out, wanted, 1e-7)


# The layer.


def scene(height: int = 24, width: int = 30, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(labels (B, H, W), image (B, 3, H, W), noisy logits of 3 classes): coloured shapes on a ground."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[(y - height // 2) ** 2 + (x - width // 3) ** 2 < (height // 4) ** 2] = 1
    labels[4:-4, -8:-3] = 2
    labels = labels.expand(batch, -1, -1)
    colors = torch.tensor([[200.0, 190.0, 180.0], [60.0, 120.0, 40.0], [40.0, 60.0, 160.0]])
    image = colors[labels].movedim(3, 1) + torch.randn(batch, 3, height, width) * 6
    logits = 2 * F.one_hot(labels, 3).movedim(3, 1) + torch.randn(batch, 3, height, width) * 1.5
    return labels, image.clamp(0, 255), logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_layer_refines_a_noisy_score_map(filter: str) -> None:
    labels, image, logits = scene()
    crf = DenseCRF(3, appearance_sigma=20, filter=filter)
    refined = crf(logits, image)
    assert accuracy(logits, labels) < 0.9
    assert accuracy(refined, labels) > 0.99
    assert torch.equal(crf(logits, image.to(torch.uint8)), crf(logits, image.to(torch.uint8).float()))


def test_layer_is_the_function_with_its_features() -> None:
    _, image, logits = scene(batch=2)
    crf = DenseCRF(3, appearance_weight=4.0, appearance_sigma=50.0, color_sigma=5.0, smoothness_sigma=2.0, iterations=4)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    positions = torch.stack([x, y]).expand(2, -1, -1, -1)
    features = [torch.cat([positions / 50.0, image / 5.0], 1), positions / 2.0]
    wanted = dense_crf_mean_field(-logits, features, [4.0, 3.0], iterations=4)
    assert_close(crf(logits, image), wanted, 1e-4)
    volume = DenseCRF(3, appearance_weight=None, smoothness_sigma=2.0, iterations=4)
    cube = torch.randn(1, 3, 4, 5, 6)
    z, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in cube.shape[2:]), indexing="ij")
    wanted = dense_crf_mean_field(-cube, torch.stack([x, y, z])[None] / 2.0, 3.0, iterations=4)
    assert_close(volume(cube), wanted, 1e-5)
    assert DenseCRF(3)(cube, torch.rand(1, 3, 4, 5, 6)).shape == cube.shape


def test_layer_agrees_with_the_numpy_interface() -> None:
    """The same parameters as in pydensecrf, whose results deeplab_kernels.densecrf reproduces."""
    densecrf = pytest.importorskip("deeplab_kernels.densecrf")
    _, image, logits = scene(48, 64)
    image = image.round()
    crf = DenseCRF(3, appearance_weight=4.0, appearance_sigma=30.0, color_sigma=8.0, iterations=5)
    ours = crf(logits, image).detach().softmax(1)[0].flatten(1)
    model = densecrf.DenseCRF2D(64, 48, 3)
    model.setUnaryEnergy((-logits[0]).flatten(1).contiguous().numpy())
    model.addPairwiseGaussian(sxy=3, compat=3)
    pixels = image[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
    model.addPairwiseBilateral(sxy=30, srgb=8, rgbim=pixels, compat=4)
    theirs = torch.tensor(model.inference(5))
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() > 0.999
    assert (ours - theirs).abs().mean() < 1e-4


@pytest.mark.parametrize("compatibility", ["potts", "per_label", "full"])
def test_forms_of_compatibility_start_as_potts(compatibility: str) -> None:
    _, image, logits = scene()
    crf = DenseCRF(3, compatibility=compatibility)
    assert_close(crf(logits, image), DenseCRF(3)(logits, image), 1e-5)
    assert (crf.compatibility is None) == (compatibility == "potts")


def test_gradcheck_of_the_layer() -> None:
    """Every learnable parameter, the three sigmas included, the logits and the guide image."""
    crf = DenseCRF(
        3, iterations=2, trainable=True, compatibility="full", appearance_sigma=2.3, color_sigma=31.0,
        smoothness_sigma=1.7, appearance_weight=1.5, smoothness_weight=0.7,
    ).double()  # fmt: skip
    names = [name for name, _ in crf.named_parameters()]
    assert names == [
        "appearance_weight", "smoothness_weight", "log_appearance_sigma", "log_color_sigma", "log_smoothness_sigma",
        "compatibility",
    ]  # fmt: skip
    logits, image = random(1, 3, 3, 3, requires_grad=True), (torch.rand(1, 3, 3, 3, dtype=D) * 255).requires_grad_()
    # Pixel (0, 0) lies on a vertex of the lattice whatever the sigma, where simplices meet: off with it.
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    parameters = [p.detach().clone().requires_grad_() for p in crf.parameters()]

    def function(logits: Tensor, image: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(crf, dict(zip(names, parameters, strict=True)), (logits, image, mask))

    torch.autograd.gradcheck(function, (logits, image, *parameters), eps=1e-7, atol=1e-4)


def test_layer_learns_its_sigmas_and_weights() -> None:
    torch.manual_seed(1)
    labels, image, logits = scene(batch=2)
    crf = DenseCRF(
        3, iterations=5, trainable=True, appearance_weight=0.5, appearance_sigma=3.0, color_sigma=120.0,
        smoothness_weight=0.2, smoothness_sigma=0.7, compatibility="full",
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in crf.named_parameters()}
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(crf(logits, image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in crf.named_parameters())
    assert crf.color_sigma < 100
    fresh_labels, fresh_image, fresh_logits = scene()
    untrained = copy.deepcopy(crf)
    untrained.load_state_dict(start)
    before = accuracy(untrained(fresh_logits, fresh_image), fresh_labels)
    after = accuracy(crf(fresh_logits, fresh_image), fresh_labels)
    assert after > before + 0.03


def test_layer_can_be_kept_copied_and_moved() -> None:
    _, image, logits = scene()
    crf = DenseCRF(3, compatibility="per_label", trainable=("color_sigma",), iterations=3)
    with torch.no_grad():
        crf.log_color_sigma.add_(0.3)
    wanted = crf(logits, image)
    again = DenseCRF(3, compatibility="per_label", iterations=3)
    again.load_state_dict(crf.state_dict())
    buffer = io.BytesIO()
    torch.save(crf.state_dict(), buffer)
    buffer.seek(0)
    loaded = DenseCRF(3, compatibility="per_label", iterations=3)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (again, loaded, copy.deepcopy(crf), pickle.loads(pickle.dumps(crf)), crf.eval(), crf.train()):
        assert torch.equal(other(logits, image), wanted)
    assert [n for n, p in crf.named_parameters() if p.requires_grad] == ["log_color_sigma"]
    assert_close(copy.deepcopy(crf).double()(logits.double(), image.double()), wanted, 1e-4)
    assert copy.deepcopy(crf).bfloat16()(logits.bfloat16(), image).dtype == torch.bfloat16


def test_trainable_parameters_are_chosen() -> None:
    def trained(**options: Any) -> set[str]:
        return {name for name, p in DenseCRF(3, **options).named_parameters() if p.requires_grad}

    assert trained() == {"appearance_weight", "smoothness_weight"}
    assert trained(compatibility="full") == {"appearance_weight", "smoothness_weight", "compatibility"}
    assert trained(trainable=False) == set()
    assert len(trained(trainable=True, compatibility="full")) == 6
    assert trained(trainable=["color_sigma", "compatibility"]) == {"log_color_sigma"}
    assert "color_sigma=13, smoothness_weight=3" in repr(DenseCRF(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"appearance_sigma": 0}, ValueError, "appearance_sigma must be finite and positive, got 0"),
        ({"color_sigma": -1.0}, ValueError, "color_sigma must be finite and positive"),
        ({"smoothness_sigma": float("nan")}, ValueError, "smoothness_sigma must be finite and positive"),
        ({"smoothness_weight": float("inf")}, ValueError, "smoothness_weight must be finite"),
        ({"appearance_weight": "10"}, TypeError, "appearance_weight must be a number"),
        ({"compatibility": "matrix"}, ValueError, "compatibility must be .* or a tensor, got 'matrix'"),
        ({"compatibility": torch.eye(4)}, ValueError, r"compatibility must have shape \(3,\) or \(3, 3\)"),
        ({"compatibility": 1.0}, TypeError, "compatibility must be a string or a tensor"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of"),
        ({"filter": "box"}, ValueError, "filter must be one of"),
        ({"trainable": "color_sigma"}, TypeError, "trainable must be a bool or a sequence of names"),
        ({"trainable": ["sigma"]}, ValueError, "trainable must be names among"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseCRF(**({"num_classes": 3} | options))


def test_layer_checks_its_inputs() -> None:
    crf = DenseCRF(3)
    logits, image = torch.randn(1, 3, 4, 5), torch.rand(1, 3, 4, 5)
    for wrong, error, message in (
        ((torch.randn(1, 4, 4, 5), image), ValueError, r"logits must have shape \(B, 3, H, W\)"),
        ((logits[0], image), ValueError, r"logits must have shape \(B, 3, H, W\)"),
        ((logits, torch.rand(1, 3, 5, 4)), ValueError, "image must have the batch and size of logits"),
        ((logits, torch.rand(2, 3, 4, 5)), ValueError, "image must have the batch and size of logits"),
        ((logits, image.to(torch.uint16)), TypeError, "image must be uint8, float32, .* got torch.uint16"),
        ((logits, None), TypeError, "image must be given for the appearance kernel"),
        ((logits, torch.rand(1, 15, 4, 5)), ValueError, r"features\[0\] must have 1 to 16 feature dimensions"),
        ((logits, image, torch.ones(1, 4, 5)), TypeError, "mask must be bool"),
        ((logits.abs().neg().sqrt(), image), ValueError, "unary must not hold NaN"),
    ):
        with pytest.raises(error, match=message):
            crf(*wrong)


def test_documentation_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "dense_crf.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
