"""Refines score maps and coarse annotations with the photograph, by mean-field inference of the dense CRF."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from deeplab_kernels.errors import UserError

FILTERS = ("permutohedral", "exact", "local")
SCORE_KINDS = ("auto", "probabilities", "logits")
_LEAST_PROBABILITY = 1e-5  # keeps energies finite


@dataclass(frozen=True)
class CRFParameters:
    """The CRF of DeepLab v1 and v2 (Kraehenbuehl, Koltun: arXiv:1210.5644), with the names of ``nn.DenseCRF``.

        k(i, j) = appearance_weight  exp(-|p_i - p_j|^2 / (2 appearance_sigma^2) - |I_i - I_j|^2 / (2 color_sigma^2))
                + smoothness_weight  exp(-|p_i - p_j|^2 / (2 smoothness_sigma^2))

    Positions p in pixels, colours I in 0..255. A weight of 0 leaves its kernel out. filter: "permutohedral" (linear in
    the number of pixels), "exact" (quadratic) or "local", which cuts the kernels off beyond ``window`` pixels to each
    side: a short-range CRF. The defaults are those of pydensecrf's example.

    Raises:
        ValueError: a weight is negative, a sigma is not positive, iterations or window is below 1, no such filter.
    """

    appearance_weight: float = 10.0
    appearance_sigma: float = 80.0
    color_sigma: float = 13.0
    smoothness_weight: float = 3.0
    smoothness_sigma: float = 3.0
    iterations: int = 10
    filter: str = "permutohedral"
    window: int = 5

    def __post_init__(self) -> None:
        for name in ("appearance_weight", "smoothness_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("appearance_sigma", "color_sigma", "smoothness_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}")
        for name in ("iterations", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter must be one of {', '.join(FILTERS)}, got {self.filter!r}")


def refine(
    image: NDArray[np.uint8],
    energy: NDArray[np.float32],
    parameters: CRFParameters | None = None,
    *,
    device: torch.device | str = "cpu",
    on_iteration: Callable[[int, int], object] = lambda done, total: None,
) -> NDArray[np.float32]:
    """The CRF's label probabilities (L, H, W) for a photograph and unary energies.

    Args:
        image: (H, W, 3) uint8.
        energy: (L, H, W), minus logarithms of probabilities up to a constant per pixel; finite.
        device: where it is computed. The result is a numpy array in any case.
        on_iteration: called with (iterations done, iterations in all); on a GPU only once, at the end.

    Raises:
        ValueError: the sizes differ, or an energy is NaN or infinite.
        UserError: there is too little memory (:func:`required_memory`).
    """
    parameters = parameters or CRFParameters()
    if image.ndim != 3 or energy.ndim != 3 or image.shape != (*energy.shape[1:], 3):
        raise ValueError(f"image (H, W, 3) and energy (L, H, W) must have one size, got {image.shape}, {energy.shape}")
    if not np.isfinite(energy).all():
        raise ValueError("energy must be finite, got NaN or infinity")
    check_memory(len(energy), image.shape[0], image.shape[1], parameters)
    if torch.device(device).type != "cpu":
        return _on_device(image, energy, parameters, device, on_iteration)
    if parameters.filter == "permutohedral":
        return _with_lattice(image, energy, parameters, on_iteration)
    return _with_sums(image, energy, parameters, on_iteration)


def _with_lattice(
    image: NDArray[np.uint8],
    energy: NDArray[np.float32],
    p: CRFParameters,
    on_iteration: Callable[[int, int], object],
) -> NDArray[np.float32]:
    from deeplab_kernels import densecrf

    labels, height, width = energy.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(energy.reshape(labels, -1))
    if p.appearance_weight > 0:
        crf.addPairwiseBilateral(p.appearance_sigma, p.color_sigma, image, compat=p.appearance_weight)
    if p.smoothness_weight > 0:
        crf.addPairwiseGaussian(p.smoothness_sigma, compat=p.smoothness_weight)
    q = crf.inference(p.iterations, progress=lambda done: on_iteration(done, p.iterations))
    return q.reshape(labels, height, width)


@torch.inference_mode()
def _with_sums(
    image: NDArray[np.uint8],
    energy: NDArray[np.float32],
    p: CRFParameters,
    on_iteration: Callable[[int, int], object],
) -> NDArray[np.float32]:
    """Mean field with the filters that are sums over pixels, one iteration after the other."""
    from deeplab_kernels import ops

    height, width = image.shape[:2]
    unary = torch.from_numpy(np.require(energy, requirements=["C", "W"]))[None]
    rows, columns = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    positions = torch.stack([columns, rows])[None]
    colours = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None].float()
    kernels = [
        (p.appearance_weight, torch.cat([positions / p.appearance_sigma, colours / p.color_sigma], 1)),
        (p.smoothness_weight, positions / p.smoothness_sigma),
    ]

    def filtered(values: Tensor, features: Tensor) -> Tensor:
        if p.filter == "local":
            return ops.local_gaussian_filter(values, features, p.window)
        return ops.gaussian_filter(values.flatten(2), features.flatten(2)).view_as(values)

    ones = torch.ones(1, 1, height, width)
    terms = [(weight, f, filtered(ones, f).rsqrt()) for weight, f in kernels if weight > 0]
    q = torch.softmax(-unary, 1)
    for iteration in range(p.iterations):
        logits = -unary
        for weight, features, scale in terms:  # symmetric normalisation: n^-1/2 K n^-1/2 with n = K 1
            logits.add_(filtered(q * scale, features).mul_(scale), alpha=weight)
        q = torch.softmax(logits, 1)
        on_iteration(iteration + 1, p.iterations)
    return q[0].numpy()


@torch.inference_mode()
def _on_device(
    image: NDArray[np.uint8],
    energy: NDArray[np.float32],
    p: CRFParameters,
    device: torch.device | str,
    on_iteration: Callable[[int, int], object],
) -> NDArray[np.float32]:
    from deeplab_kernels.nn import DenseCRF

    crf = DenseCRF(
        len(energy),
        iterations=p.iterations,
        appearance_weight=p.appearance_weight or None,
        appearance_sigma=p.appearance_sigma,
        color_sigma=p.color_sigma,
        smoothness_weight=p.smoothness_weight or None,
        smoothness_sigma=p.smoothness_sigma,
        filter=p.filter,
        window=p.window,
        trainable=False,
    ).to(device)
    logits = -torch.from_numpy(np.require(energy, requirements=["C", "W"])).to(device)[None]
    guide = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(device).permute(2, 0, 1)[None]
    q = crf(logits, guide).softmax(1)[0].cpu().numpy()
    on_iteration(p.iterations, p.iterations)
    return q


# Unary energies


def energy_of_scores(
    scores: NDArray[np.floating[Any]], size: tuple[int, int] | None = None, kind: str = "auto"
) -> NDArray[np.float32]:
    """Unary energies (L, H, W) of a score map (L, h, w).

    Args:
        scores: at least two labels; finite.
        size: (H, W); a score map of another size is resized (bilinear; averaged where it shrinks), logits before their
            softmax.
        kind: "probabilities", "logits", or "auto": probabilities if they are not negative and sum to 1 within 1 %.
            Probabilities below 1e-5 count as 1e-5.

    Raises:
        UserError: a wrong shape, NaN or infinity, a size whose aspect is another, negative probabilities.
        ValueError: no such ``kind``.
    """
    if kind not in SCORE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SCORE_KINDS)}, got {kind!r}")
    if scores.ndim != 3 or scores.size == 0:
        raise UserError(f"scores must have shape (L, H, W), got {scores.shape}")
    if len(scores) < 2:
        raise UserError(f"scores need at least 2 labels, got shape {scores.shape}: of one alone nothing can be told")
    height, width = size or scores.shape[1:]
    if not same_aspect(scores.shape[1:], (height, width)):
        swapped = "; are the labels the last axis? They must be the first" if scores.shape[:2] == size else ""
        raise UserError(f"scores of shape {scores.shape} do not fit a photograph of {width} x {height} pixels{swapped}")
    low, total = np.inf, np.zeros(scores.shape[1:], np.float32)
    for plane in scores:
        if not np.isfinite(plane).all():
            raise UserError("scores must be finite, got NaN or infinity")
        low = min(low, float(plane.min()))
        total += plane
    if kind == "auto":
        kind = "probabilities" if low >= 0 and np.abs(total - 1).max() <= 0.01 else "logits"
    elif kind == "probabilities" and low < 0:
        raise UserError(f"probabilities must not be negative, got {low:.4g}; logits are told by their kind")
    energy = np.empty((len(scores), height, width), np.float32)
    for plane, out in zip(scores, energy, strict=True):
        out[:] = resize_plane(plane, (height, width))
    if kind == "probabilities":
        np.clip(energy, _LEAST_PROBABILITY, None, out=energy)
        np.log(energy, out=energy)
    else:
        energy -= energy.max(0)  # the largest becomes 0, so that float32 is enough
    np.negative(energy, out=energy)
    return energy


def energy_of_labels(
    labels: NDArray[np.integer[Any]], values: Sequence[int], void: int | None, confidence: float
) -> NDArray[np.float32]:
    """Unary energies (len(values), H, W) of an annotation (H, W) that is right with probability ``confidence``: the
    others share the rest. ``values``: the labels, in the order of the result; pixels of label ``void`` are unknown.

    Raises:
        UserError: ``confidence`` does not exceed 1 / len(values), which would turn the annotation round.
    """
    count = len(values)
    if not 1 / count < confidence < 1:
        raise UserError(f"confidence must be between 1/{count} (there are {count} labels) and 1, got {confidence}")
    energy = np.full((count, *labels.shape), -math.log((1 - confidence) / max(count - 1, 1)), np.float32)
    for value, plane in zip(values, energy, strict=True):
        plane[labels == value] = -math.log(confidence)
    if void is not None:
        energy[:, labels == void] = math.log(count)
    return energy


def same_aspect(small: Sequence[int], size: Sequence[int]) -> bool:
    """Whether (h, w) is (H, W) scaled alike on both axes, up to one pixel of the smaller."""
    return abs(small[1] * size[0] - small[0] * size[1]) <= max(*size, *small)


def resize_plane(plane: NDArray[np.floating[Any]], size: tuple[int, int]) -> NDArray[np.float32]:
    """(h, w) -> (H, W) float32, bilinear between pixel centres; averaged where it shrinks."""
    values = np.array(plane, np.float32)
    if values.shape == size:
        return values
    shrinks = size[0] < values.shape[0] or size[1] < values.shape[1]
    tensor = F.interpolate(torch.from_numpy(values)[None, None], size, mode="bilinear", antialias=shrinks)
    return tensor[0, 0].numpy()


def most_probable(probabilities: NDArray[np.float32], size: tuple[int, int] | None = None) -> NDArray[np.int64]:
    """(H, W): the index of the largest of (L, h, w), which is resized first; memory for one label at a time."""
    size = size or (probabilities.shape[1], probabilities.shape[2])
    best, labels = np.full(size, -np.inf, np.float32), np.zeros(size, np.int64)
    for index, plane in enumerate(probabilities):
        value = resize_plane(plane, size)
        better = value > best
        best[better], labels[better] = value[better], index
    return labels


# Memory


def required_memory(labels: int, height: int, width: int, parameters: CRFParameters | None = None) -> int:
    """About how many bytes :func:`refine` takes, energies and result included, on photographs. With the lattice it
    depends on what is seen: a picture of pure noise with sigmas of a few pixels and grey levels takes three times it.
    """
    lattice = (parameters or CRFParameters()).filter == "permutohedral"
    return height * width * (24 * labels + 250 if lattice else 32 * labels + 100)


def check_memory(labels: int, height: int, width: int, parameters: CRFParameters | None = None) -> None:
    """Raises UserError where :func:`required_memory` exceeds what is available."""
    needed, there = required_memory(labels, height, width, parameters), available_memory()
    if there is not None and needed > there:
        raise UserError(
            f"{labels} labels on {width} x {height} pixels take about {needed / 2**30:.1f} GB of memory; "
            f"{there / 2**30:.1f} GB are available. A smaller --max-side helps"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take, on Linux; None where that is not known."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or its limit is "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(limit - used + int(counts["inactive_file"]))  # files are dropped from memory first
    return min(limits) if limits else None
