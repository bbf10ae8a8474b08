"""The permutohedral filter against its definition in plain torch, and that against the sum it approximates."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import hypothesis
import pytest
import torch
from _cases import DEVICES
from _filters import NORMALIZATIONS, assert_close, random
from _threads import assert_same_bits
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deeplab_kernels import ops, reference
from deeplab_kernels.ops import _backends
from deeplab_kernels.reference import permutohedral as definition

raw = torch.ops.deeplab_kernels


def exact(values: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("bij,bcj->bci", torch.exp(-torch.cdist(features.mT, features.mT).square() / 2), values)


def test_every_operator_has_a_compiled_kernel_here() -> None:
    for name in ("permutohedral_lattice", "permutohedral_filter", "permutohedral_filter_backward"):
        assert _backends.serving(name)["cpu"].startswith("C++")
        assert _backends.implementation(name, "reference") is getattr(reference, name)


# The definition.


@pytest.mark.parametrize(("d", "error"), [(1, 0.01), (2, 0.015), (3, 0.025), (4, 0.06), (5, 0.12)])
def test_unnormalised_filter_approximates_the_sum_of_gaussians(d: int, error: float) -> None:
    values, features = torch.rand(1, 3, 4000, dtype=torch.float64), random(1, d, 4000, scale=1.5)
    wanted = exact(values, features)
    ours = ops.permutohedral_filter(values, features)
    assert (ours - wanted).norm() <= error * wanted.norm()


def test_one_point_keeps_part_of_itself_and_far_points_do_not_mix() -> None:
    features = torch.tensor([[[0.0, 50.0, -50.0]]], dtype=torch.float64)
    values = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    out = ops.permutohedral_filter(values, features)[0, 0]
    assert out[0] > 0.2
    assert torch.equal(out[1:], torch.zeros(2, dtype=torch.float64))
    assert_close(ops.permutohedral_filter(values, features, "after"), values, 1e-12)


@pytest.mark.parametrize("normalization", ["after", "symmetric", "before"])
def test_normalised_filter_keeps_constants(normalization: str) -> None:
    features, ones = random(2, 3, 200), torch.ones(2, 1, 200, dtype=torch.float64)
    out = ops.permutohedral_filter(ones, features, normalization)
    if normalization == "after":
        assert_close(out, ones, 1e-12)
    elif normalization == "before":  # the adjoint property: the total is kept
        weights = ops.permutohedral_filter(ones, features)
        transposed = raw.permutohedral_filter(weights, features, None, 1, True)
        assert_close(transposed, raw.permutohedral_filter(weights, features, None, 0, True) / weights, 1e-12)
    else:
        n = ops.permutohedral_filter(ones, features)
        assert_close(out, ops.permutohedral_filter(n.rsqrt(), features) * n.rsqrt(), 1e-12)


def test_keys_of_any_range_are_told_apart() -> None:
    # 17 columns of 30 bits do not fit into one code: the table compresses in stages.
    columns = [torch.randint(0, 2**30, (500,)) for _ in range(17)]
    rows = torch.stack(columns, 1)
    doubled = torch.cat([rows, rows.flip(0)])
    table = definition._KeyTable(list(doubled.unbind(1)))
    unique, inverse = torch.unique(doubled, dim=0, return_inverse=True)
    assert len(table.stages) > 3
    assert table.rows == len(unique)
    assert torch.equal(inverse[:, None] == inverse[:20], table.index[:, None] == table.index[:20])
    assert torch.equal(table.find(list(doubled.unbind(1))), table.index)
    changed = doubled.clone()
    changed[:, 9] += 1
    assert (table.find(list(changed.unbind(1))) == table.rows).all()


# Every backend against the definition.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_against_the_definition(d: int, device: str, poisoned_memory: None) -> None:
    sizes = [(1, 1, 1), (2, 3, 5), (1, 33, 33), (2, 8, 127)]
    for (batch, channels, points), code, transpose in itertools.product(sizes, range(4), (False, True)):
        values, features = random(batch, channels, points), random(batch, d, points, scale=1.5)
        grad = random(batch, channels, points)
        wanted = reference.permutohedral_filter(values, features, None, code, transpose)
        wanted_grads = reference.permutohedral_filter_backward(
            grad, values, features, None, code, transpose, True, True
        )
        size = reference.permutohedral_filter_backward(grad, values, features, None, 0, transpose, True, True)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            # Features that are float32 numbers, so that both compute the same simplices.
            v, f, g = (t.to(device, dtype) for t in (values, features, grad))
            if dtype == torch.float32:
                wanted = reference.permutohedral_filter(values, f.cpu().double(), None, code, transpose)
                wanted_grads = reference.permutohedral_filter_backward(
                    grad, values, f.cpu().double(), None, code, transpose, True, True
                )
            out = raw.permutohedral_filter(v, f, None, code, transpose).cpu()
            assert_close(out, wanted, tolerance, f"{d} {code} {dtype}")
            grads = raw.permutohedral_filter_backward(g, v, f, None, code, transpose, True, True)
            for ours, right, scale in zip(grads, wanted_grads, size, strict=True):
                magnitude = 10 * scale.abs().max().item() / max(wanted.abs().max().item(), 1)
                assert_close(ours.cpu(), right, tolerance, f"{d} {code} {dtype} gradient", magnitude)


@pytest.mark.parametrize("size", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_empty(size: tuple[int, int, int], normalization: str) -> None:
    batch, _, points = size
    values, features = random(*size, requires_grad=True), random(batch, 4, points, requires_grad=True)
    out = ops.permutohedral_filter(values, features, normalization)
    assert out.shape == size
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    assert ops.PermutohedralLattice(features)(values, normalization).shape == size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_computed_in_float32(dtype: torch.dtype) -> None:
    values, features = random(1, 5, 65, dtype=dtype), random(1, 2, 65, dtype=torch.float32)
    out = ops.permutohedral_filter(values, features, "symmetric")
    assert out.dtype == dtype
    assert torch.equal(out, ops.permutohedral_filter(values.float(), features, "symmetric").to(dtype))
    half = features.to(dtype)
    assert torch.equal(
        ops.permutohedral_filter(values, half), ops.permutohedral_filter(values.float(), half.float()).to(dtype)
    )


def test_any_strides() -> None:
    values, features = random(65, 2, 7).permute(1, 2, 0), random(2, 130, 3).mT[:, :, ::2]
    wanted = ops.permutohedral_filter(values.contiguous(), features.contiguous(), "after")
    assert torch.equal(ops.permutohedral_filter(values, features, "after"), wanted)
    expanded = random(1, 1, 65).expand(2, 3, 65)
    assert torch.equal(
        ops.permutohedral_filter(expanded, features), ops.permutohedral_filter(expanded.contiguous(), features)
    )


def test_images_of_a_batch_do_not_mix() -> None:
    values, features = random(3, 2, 33), random(1, 2, 33).expand(3, 2, 33)
    together = ops.permutohedral_filter(values, features, "symmetric")
    for i in range(3):
        assert_close(together[i], ops.permutohedral_filter(values[i : i + 1], features[:1], "symmetric")[0], 1e-14)


@pytest.mark.parametrize("shift", [0.0, 1e4, 1e6, -2e7])
def test_features_far_from_zero(shift: float) -> None:
    """Coordinates beyond 16 bits are told apart: clusters that differ by multiples of 2^16 in each coordinate."""
    base = random(1, 3, 40)
    features = torch.cat([base + shift, base + shift + 65536.0, base + shift - 65536.0 * 3], 2)
    values = random(1, 2, 120)
    out = ops.permutohedral_filter(values, features)
    # A coordinate of 1e8 leaves 1e-8 of a unit in float64.
    assert_close(out, reference.permutohedral_filter(values, features, None, 0, False), 1e-7)
    for part in range(3):
        own = slice(40 * part, 40 * part + 40)
        assert_close(out[..., own], ops.permutohedral_filter(values[..., own], features[..., own]), 1e-7)


def test_threads_do_not_change_the_result() -> None:
    values = random(2, 5, 3000, dtype=torch.float32, requires_grad=True)
    features = random(2, 5, 3000, dtype=torch.float32, requires_grad=True)

    def results() -> list[Tensor]:
        out = ops.permutohedral_filter(values, features, "symmetric")
        return [out, *torch.autograd.grad(out.square().sum(), (values, features))]

    assert_same_bits(results)


# Gradients.


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("d", [1, 2, 5, 16])
def test_gradcheck(d: int, normalization: str) -> None:
    points = 9 if d < 16 else 4
    values, features = random(2, 2, points, requires_grad=True), random(2, d, points, requires_grad=True)
    # The step is far smaller than the distance of these points to the walls of their simplices.
    torch.autograd.gradcheck(
        lambda v, f: ops.permutohedral_filter(v, f, normalization), (values, features), eps=1e-7, atol=1e-5
    )
    lattice = ops.PermutohedralLattice(features)
    torch.autograd.gradcheck(lambda v: lattice(v, normalization), (values,), eps=1e-6)
    again = copy.copy(lattice)
    wanted = torch.autograd.grad(ops.permutohedral_filter(values, features, normalization).square().sum(), features)
    assert_close(torch.autograd.grad(again(values, normalization).square().sum(), features)[0], wanted[0], 1e-12)


def test_gradients_of_one_input_alone() -> None:
    values, features = random(2, 3, 33, requires_grad=True), random(2, 2, 33, requires_grad=True)
    both = torch.autograd.grad(ops.permutohedral_filter(values, features, "before").square().sum(), (values, features))
    for v, f, wanted in ((values, features.detach(), both[0]), (values.detach(), features, both[1])):
        out = ops.permutohedral_filter(v, f, "before")
        (grad,) = torch.autograd.grad(out.square().sum(), v if v.requires_grad else f)
        assert_close(grad, wanted, 1e-12)


@pytest.mark.parametrize("normalization", ["none", "symmetric"])
def test_differentiable_twice(normalization: str) -> None:
    values, features = random(1, 2, 5, requires_grad=True), random(1, 2, 5, requires_grad=True)
    torch.autograd.gradgradcheck(
        lambda v, f: ops.permutohedral_filter(v, f, normalization), (values, features), eps=1e-7, atol=1e-4
    )
    torch.autograd.gradgradcheck(
        lambda v: ops.permutohedral_filter(v, features.detach(), normalization), (values,), eps=1e-6
    )


def test_transforms_of_torch_func() -> None:
    values, features = random(1, 2, 9), random(1, 2, 9)

    def loss(v: Tensor, f: Tensor) -> Tensor:
        return ops.permutohedral_filter(v, f, "symmetric").square().sum()

    leaves = [values.clone().requires_grad_(), features.clone().requires_grad_()]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for ours, right in zip(torch.func.grad(loss, (0, 1))(values, features), wanted, strict=True):
        assert_close(ours, right, 1e-10)
    tangents = random(1, 2, 9), random(1, 2, 9)
    _, slope = torch.func.jvp(loss, (values, features), tangents)
    assert_close(slope, sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True)), 1e-10)


# The lattice as an object.


def test_a_lattice_serves_many_filters() -> None:
    features = random(2, 3, 65, dtype=torch.float32, requires_grad=True)
    lattice = ops.PermutohedralLattice(features)
    total = torch.zeros(())
    wanted = torch.zeros(())
    for channels, normalization in ((1, "none"), (5, "before"), (9, "after"), (3, "symmetric")):
        values = random(2, channels, 65, dtype=torch.float32)
        out = lattice(values, normalization)
        assert torch.equal(out, ops.permutohedral_filter(values, features, normalization))
        total, wanted = total + out.sum(), wanted + ops.permutohedral_filter(values, features, normalization).sum()
    (grad,) = torch.autograd.grad(total, features)
    assert_close(grad, torch.autograd.grad(wanted, features)[0], 1e-6)
    assert (lattice.batch, lattice.dimension, lattice.points) == (2, 3, 65)
    assert lattice.nbytes > 0
    assert repr(lattice) == ("PermutohedralLattice(batch=2, dimension=3, points=65, dtype=torch.float32, device=cpu)")


def test_a_lattice_can_be_pickled() -> None:
    lattice = ops.PermutohedralLattice(random(1, 2, 33))
    values = random(1, 3, 33)
    again = pickle.loads(pickle.dumps(lattice))
    assert torch.equal(again(values), lattice(values))


def test_bytes_that_are_no_lattice_are_refused() -> None:
    features = random(1, 2, 33)
    packed = raw.permutohedral_lattice(features)
    values = random(1, 1, 33)
    for wrong in (packed[:-8], torch.zeros(64, dtype=torch.uint8), raw.permutohedral_lattice(random(1, 2, 32))):
        with pytest.raises(RuntimeError, match="lattice does not belong"):
            raw.permutohedral_filter(values, features, wrong.clone(), 0, False)


# torch's machinery.


@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(transpose: bool) -> None:
    features = random(2, 3, 17, dtype=torch.float32, requires_grad=True)
    values = random(2, 5, 17, dtype=torch.float32, requires_grad=True)
    packed = raw.permutohedral_lattice(features.detach())
    torch.library.opcheck(raw.permutohedral_lattice.default, (features.detach(),))
    for lattice in (None, packed):
        torch.library.opcheck(raw.permutohedral_filter.default, (values, features, lattice, 3, transpose))
        torch.library.opcheck(
            raw.permutohedral_filter_backward.default,
            (values.detach(), values.detach(), features.detach(), lattice, 3, transpose, True, False),
        )


def test_compiled_in_one_graph() -> None:
    values, features = random(2, 3, 33, requires_grad=True), random(2, 2, 33, requires_grad=True)

    def function(v: Tensor, f: Tensor) -> Tensor:
        return ops.permutohedral_filter(v * 2, f / 1.5, "symmetric").square()

    compiled = torch.compile(function, fullgraph=True)
    wanted = torch.autograd.grad(function(values, features).sum(), (values, features))
    ours = torch.autograd.grad(compiled(values, features).sum(), (values, features))
    for a, b in zip(ours, wanted, strict=True):
        assert_close(a, b, 1e-12)
    lattice = ops.PermutohedralLattice(features.detach())
    with_lattice = torch.compile(lambda v: lattice(v, "after") + 1, fullgraph=True)
    assert_close(with_lattice(values), lattice(values, "after") + 1, 1e-12)


def test_exported() -> None:
    class Filter(torch.nn.Module):
        def forward(self, v: Tensor, f: Tensor) -> Tensor:
            return ops.permutohedral_filter(v, f, "after")

    arguments = random(1, 3, 33), random(1, 2, 33)
    program = torch.export.export(Filter(), arguments)
    assert torch.equal(program.module()(*arguments), Filter()(*arguments))


def test_autocast_leaves_it_alone() -> None:
    values, features = random(1, 3, 33, dtype=torch.float32), random(1, 2, 33, dtype=torch.float32)
    wanted = ops.permutohedral_filter(values, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.permutohedral_filter(values, features), wanted)
        plain = torch.func.grad(lambda v: ops.permutohedral_filter(v, features).sum())(values)
    assert plain.dtype == torch.float32


def test_flops_are_counted() -> None:
    values, features = random(2, 3, 33, requires_grad=True), random(2, 2, 33, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.permutohedral_filter(values, features).sum().backward()
    splat = 2 * 2 * 3 * 33 * 3
    assert counter.get_total_flops() == (2 + 6) * splat


# Bad input.


def good() -> dict[str, Any]:
    return {"values": random(2, 3, 9), "features": random(2, 2, 9), "normalization": "none"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"values": torch.zeros(2, 3, 9, dtype=torch.int32)}, TypeError, "values must be float32, .* got torch.int32"),
        ({"features": torch.zeros(2, 2, 9, dtype=torch.bool)}, TypeError, "features must be float32, .* torch.bool"),
        ({"values": random(3, 9)}, ValueError, r"values must have shape \(B, C, N\), got \(3, 9\)"),
        ({"features": random(2, 2, 3, 3)}, ValueError, r"features must have shape \(B, d, N\), got \(2, 2, 3, 3\)"),
        ({"features": random(2, 17, 9)}, ValueError, "features must have 1 to 16 feature dimensions"),
        ({"features": random(2, 0, 9)}, ValueError, "features must have 1 to 16 feature dimensions"),
        ({"features": random(2, 2, 8)}, ValueError, "same B and N, got values .2, 3, 9. and features of B = 2, N = 8"),
        ({"features": random(1, 2, 9)}, ValueError, "same B and N"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of .* got 'mean'"),
        ({"normalization": 1}, TypeError, "normalization must be one of .* got 1"),
        ({"values": random(2, 3, 9).to_sparse()}, TypeError, "values must be a dense tensor"),
        ({"features": random(2, 2, 9).to("meta")}, ValueError, "values must be on the device of features, meta"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.permutohedral_filter(**(good() | change))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_not_finite(bad: float, dtype: torch.dtype) -> None:
    values, features = random(2, 3, 9, dtype=dtype), random(2, 2, 9, dtype=dtype)
    features[1, 0, 4] = bad
    for function in (lambda: ops.permutohedral_filter(values, features), lambda: ops.PermutohedralLattice(features)):
        with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
            function()
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
        reference.permutohedral_filter(values, features, None, 0, False)


@pytest.mark.parametrize("size", [1e10, 1e20, 1e37])
def test_features_too_large_for_the_lattice(size: float) -> None:
    features = torch.tensor([[[0.0, size]]])
    with pytest.raises(ValueError, match=r"features must stay .*int32"):
        ops.permutohedral_filter(torch.ones(1, 1, 2), features)
    with pytest.raises(ValueError, match=r"features must stay .*int32"):
        reference.permutohedral_filter(torch.ones(1, 1, 2), features, None, 0, False)


def test_raw_operators_guard_their_memory() -> None:
    """Whoever calls the operators directly gets an error, not a read out of bounds."""
    values, features = random(2, 3, 9), random(2, 2, 9)
    for v, f in (
        (values[:, :, :8], features),
        (values[:1], features),
        (values[0], features),
        (values, random(2, 17, 9)),
        (values, random(2, 0, 9)),
        (values, features[0]),
        (values, features.bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=r"values|features"):
            raw.permutohedral_filter(v, f, None, 0, False)
        with pytest.raises(RuntimeError, match=r"values|features"):
            raw.permutohedral_filter_backward(v, v, f, None, 0, False, True, True)
    with pytest.raises(RuntimeError, match="normalization must be 0"):
        raw.permutohedral_filter(values, features, None, 4, False)
    with pytest.raises(RuntimeError, match="grad_out has the wrong shape"):
        raw.permutohedral_filter_backward(values[:, :2], values, features, None, 0, False, True, True)


def test_values_that_are_not_finite_stay_in_their_channel() -> None:
    values, features = random(1, 3, 33), random(1, 2, 33)
    wanted = ops.permutohedral_filter(values, features)
    values[0, 1, 5] = float("nan")
    out = ops.permutohedral_filter(values, features)
    assert torch.equal(out[:, [0, 2]], wanted[:, [0, 2]])
    assert out[0, 1, 5].isnan()


def test_a_lattice_checks_its_values() -> None:
    lattice = ops.PermutohedralLattice(random(1, 2, 9, dtype=torch.float32))
    with pytest.raises(TypeError, match="build the lattice from float64 features"):
        lattice(random(1, 2, 9))
    with pytest.raises(ValueError, match="same B and N"):
        lattice(random(1, 2, 8, dtype=torch.float32))
    with pytest.raises(ValueError, match="normalization must be one of"):
        lattice(random(1, 2, 9, dtype=torch.float32), "l2")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    batch, channels, points = (data.draw(st.integers(0, top)) for top in (3, 17, 40))
    d = data.draw(st.integers(1, 16))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    normalization = data.draw(st.sampled_from(NORMALIZATIONS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    features = torch.randn(batch, d, points, generator=generator, dtype=torch.float64)
    features = (features * 10.0 ** data.draw(st.integers(-6, 4))).to(dtype)
    if data.draw(st.booleans()):  # points on the walls of simplices, and equal ones
        features = features.round()
    values = torch.randn(batch, channels, points, generator=generator, dtype=torch.float64).to(dtype)
    code = NORMALIZATIONS.index(normalization)
    out = ops.permutohedral_filter(values, features, normalization)
    assert out.isfinite().all()
    if dtype == torch.float64 and not torch.equal(features, features.round()):
        wanted = reference.permutohedral_filter(values, features, None, code, False)
        assert_close(out, wanted, 1e-8)
    # The transposed filter is the transpose: <F v, u> = <v, F^T u>.
    other = torch.randn(batch, channels, points, generator=generator, dtype=torch.float64).to(dtype)
    back = raw.permutohedral_filter(other, features, None, code, True)
    left, right = (out.double() * other).sum(), (back.double() * values).sum()
    size = (out.double() * other).abs().sum() + (back.double() * values).abs().sum() + 1e-6
    assert (left - right).abs() <= (1e-5 if dtype == torch.float32 else 1e-12) * size
