"""What the tests of the Gaussian filters and the dense CRF share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

NORMALIZATIONS = ("none", "before", "after", "symmetric")


def weighted_sums(values: Tensor, matrix: Tensor, normalization: str) -> Tensor:
    """The definition: values (B, C, N) filtered by all N x N numbers of the kernel matrix (B, N, N)."""
    n = matrix.sum(-1).unsqueeze(1)
    if normalization == "before":
        return (values / n) @ matrix.mT
    if normalization == "symmetric":
        return ((values / n.sqrt()) @ matrix.mT) / n.sqrt()
    return values @ matrix.mT / (n if normalization == "after" else 1)


def assert_near(ours: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """Relative to the largest magnitude: a sum of terms of both signs has no smaller error."""
    assert ours.shape == exact.shape, what
    scale = exact.abs().max().item()
    error = (ours.double() - exact).abs().max().item()
    assert error <= tolerance * max(scale, 1e-3), f"{what}: error {error:.2e}, magnitude {scale:.2e}"


by_needed = pytest.mark.parametrize("needs", [(True, False), (False, True)])
_UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
_DTYPES = ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32))


def by_opcheck(test: Callable[..., None]) -> Callable[..., None]:
    """With opcheck's utilities, and dtypes of values and features."""
    by_dtypes = pytest.mark.parametrize("dtypes", _DTYPES, ids=str)
    return pytest.mark.parametrize("utility", _UTILITIES)(by_dtypes(test))


def assert_parts(backward: Callable[[bool, bool], Sequence[Tensor]], needs: Sequence[bool]) -> None:
    """What is not needed of ``backward(need_grad_values, need_grad_features)`` is empty, the rest as ever."""
    for one, both, needed in zip(backward(*needs), backward(True, True), needs, strict=True):
        if needed:
            torch.testing.assert_close(one, both)
        else:
            assert one.shape == (0,)


def assert_compiles(function: Callable[..., Tensor], values: Tensor, features: Tensor, *arguments: Any) -> None:
    """In one graph, with the values and gradients of eager mode."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, function):
        out = call(values, features, *arguments)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (values, features))))
    torch.testing.assert_close(*results)


def random(*size: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)


def assert_close(ours: Tensor, wanted: Tensor, tolerance: float, what: str = "", magnitude: float = 1.0) -> None:
    """Largest error within ``tolerance`` of the largest result, or of ``magnitude`` if that is larger."""
    assert ours.shape == wanted.shape, what
    if ours.numel():
        largest = max(wanted.abs().max().item(), magnitude)
        error = (ours.double() - wanted.double()).abs().max().item()
        assert error <= tolerance * largest, f"{what}: error {error:.2e} of {largest:.2e}"
