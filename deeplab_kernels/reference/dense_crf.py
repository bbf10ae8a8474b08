"""Mean-field inference of the fully connected CRF (Kraehenbuehl, Koltun: arXiv:1210.5644) in plain torch.

    Q_0 = softmax(-U)      E_t = -U - sum_m C_m F_m Q_{t-1}      Q_t = softmax(E_t)

The functions have the signatures of the operators in csrc/torch/schema.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import permutohedral

# Labels of one point are saved for backward in rows of a multiple of this many, as the compiled kernels keep them.
SAVED_ROW = 8


def mean_field(
    energy: Tensor,
    filters: Sequence[Callable[[Tensor], Tensor]],
    compatibility: Sequence[Tensor],
    iterations: int,
    each: Callable[[Tensor], None] = lambda q: None,
) -> Tensor:
    """E_T of energies (P, L), filters of (P, L) and matrices (L, L). ``each`` sees Q_0 ... Q_{T-1}."""
    logits = -energy
    for _ in range(iterations):
        q = logits.softmax(1)
        each(q)
        logits = -energy
        for f, matrix in zip(filters, compatibility, strict=True):
            logits = logits - f(q) @ matrix.t()
    return logits


def check_energies(unary: Tensor) -> None:
    """+infinity forbids a label; NaN, -infinity and a point (axis 1 are its labels) without any label are refused."""
    if unary.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(unary)).tolist()
    if not low > -math.inf:
        raise ValueError("unary must not hold NaN or -infinity")
    if high == math.inf and not torch.isfinite(unary.amin(1)).all():
        raise ValueError("unary must leave each point a label that is finite, got only +infinity at some")


def _filters(
    features: Sequence[Tensor],
    lattices: Sequence[Tensor],
    normalization: Sequence[int],
    mask: Tensor | None,
    make: permutohedral.Make,
) -> list[permutohedral.NormalisedFilter]:
    packed: Sequence[Tensor | None] = lattices or [None] * len(features)
    return [
        permutohedral.normalised(make(f, p), n, mask) for f, p, n in zip(features, packed, normalization, strict=True)
    ]


def dense_crf_mean_field(
    unary: Tensor,
    features: Sequence[Tensor],
    lattices: Sequence[Tensor],
    compatibility: Sequence[Tensor],
    mask: Tensor | None,
    normalization: Sequence[int],
    iterations: int,
    save: bool,
    make: permutohedral.Make = permutohedral.built_or_unpacked,
) -> tuple[Tensor, Tensor]:
    check_energies(unary)
    dtype = permutohedral.compute_dtype(unary.dtype)
    filters = [
        lambda q, f=f: permutohedral.apply(f, q) for f in _filters(features, lattices, normalization, mask, make)
    ]
    kept: list[Tensor] = []

    def keep(q: Tensor) -> None:
        kept.append(F.pad(q, (0, -q.shape[1] % SAVED_ROW)).view(unary.shape[0], unary.shape[2], -1))

    rows = permutohedral.to_rows(unary, dtype)
    logits = mean_field(rows, filters, compatibility, iterations, keep if save else lambda q: None)
    saved = torch.stack(kept) if kept else saved_like(unary, iterations, save)
    return permutohedral.from_rows(logits, unary), saved


def saved_like(unary: Tensor, iterations: int, save: bool) -> Tensor:
    """An uninitialised tensor in the shape of what the forward pass saves: Q_0 ... Q_{T-1}, or nothing."""
    dtype = permutohedral.compute_dtype(unary.dtype)
    if not save:
        return unary.new_empty(0, dtype=dtype)
    batch, labels, points = unary.shape
    row = (labels + SAVED_ROW - 1) // SAVED_ROW * SAVED_ROW
    return unary.new_empty((iterations, batch, points, row), dtype=dtype)


def dense_crf_mean_field_backward(
    grad_out: Tensor,
    saved: Tensor,
    unary: Tensor,
    features: Sequence[Tensor],
    lattices: Sequence[Tensor],
    compatibility: Sequence[Tensor],
    mask: Tensor | None,
    normalization: Sequence[int],
    iterations: int,
    need_grad_features: bool,
    need_grad_compatibility: bool,
    make: permutohedral.Make = permutohedral.built_or_unpacked,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dtype = permutohedral.compute_dtype(unary.dtype)
    filters = _filters(features, lattices, normalization, mask, make)
    labels = unary.shape[1]
    if saved.dim() == 4:
        qs = [q[..., :labels].reshape(-1, labels) for q in saved]
    else:
        qs = []
        applied = [lambda q, f=f: permutohedral.apply(f, q) for f in filters]
        mean_field(permutohedral.to_rows(unary, dtype), applied, compatibility, iterations, qs.append)
    grad = permutohedral.to_rows(grad_out, dtype)
    grad_unary = torch.zeros_like(grad)
    grad_weights = [torch.zeros_like(f.lattice.weights) for f in filters]
    grad_compatibility = [torch.zeros_like(c) for c in compatibility]
    for q in reversed(qs):
        grad_unary -= grad
        grad_q = torch.zeros_like(grad)
        for m, (f, matrix) in enumerate(zip(filters, compatibility, strict=True)):
            back = permutohedral.apply(f, grad, transpose=True)
            grad_q -= back @ matrix
            # The filter acts on points, the matrix on labels: sum_i g_i (F q)_i^T = sum_j (F^T g)_j q_j^T.
            grad_compatibility[m] -= back.t() @ q
            if need_grad_features:
                grad_weights[m] += permutohedral.apply_weights_gradient(f, -grad @ matrix, q)
        grad = q * (grad_q - (q * grad_q).sum(1, keepdim=True))
    grad_unary -= grad
    grad_features = [f.new_empty(0) for f in features]
    if need_grad_features:
        grad_features = [
            permutohedral.from_rows(permutohedral.simplex_backward(w, permutohedral.to_rows(f, f.dtype)), f)
            for w, f in zip(grad_weights, features, strict=True)
        ]
    if not need_grad_compatibility:
        grad_compatibility = [c.new_empty(0) for c in compatibility]
    return permutohedral.from_rows(grad_unary, unary), grad_features, grad_compatibility
