"""ops.dense_crf_mean_field: what is refused, and numbers that are not finite."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from _filters import NORMALIZATIONS, assert_close, random
from hypothesis import strategies as st
from torch import Tensor

from deeplab_kernels import ops, reference
from deeplab_kernels.ops import dense_crf_mean_field

raw = torch.ops.deeplab_kernels
D = torch.float64


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
