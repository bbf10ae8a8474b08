"""ops.dense_crf_mean_field: against the definition, gradients, and torch's machinery."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _cases import DEVICES
from _crf import by_hand, problem
from _filters import NORMALIZATIONS, assert_close, random
from _threads import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import ops, reference
from deeplab_kernels.nn import DenseCRF
from deeplab_kernels.ops import _backends, dense_crf_mean_field

raw = torch.ops.deeplab_kernels
D = torch.float64


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
