"""Models that pydensecrf and deeplab_kernels.densecrf both run: the same code, given either module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = dict[str, NDArray[Any]]

KERNELS = ("CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL")
NORMALIZATIONS = ("NO_NORMALIZATION", "NORMALIZE_BEFORE", "NORMALIZE_AFTER", "NORMALIZE_SYMMETRIC")


# RandomState's numbers are the same in every version of numpy, unlike those of default_rng.


def image(height: int, width: int, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    """Patches of a colour with a little noise, the first of them nearly black."""
    random = np.random.RandomState(seed)
    patches = random.randint(20, 236, (height // 8 + 1, width // 8 + 1, channels))
    patches[0, 0] = 12
    picture = patches.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return (picture + random.randint(-10, 11, picture.shape)).astype(np.uint8)


def unary(labels: int, points: int, seed: int = 1, scale: float = 4.0) -> NDArray[np.float32]:
    return (scale * np.random.RandomState(seed).random_sample((labels, points))).astype(np.float32)


def features(d: int, points: int, seed: int = 2, spread: float = 2.0) -> NDArray[np.float32]:
    return (spread * np.random.RandomState(seed).random_sample((d, points))).astype(np.float32)


def matrix(labels: int, seed: int = 3) -> NDArray[np.float32]:
    """A compatibility that is not symmetric, mostly penalising different labels."""
    compat = np.random.RandomState(seed).random_sample((labels, labels)) * 3
    np.fill_diagonal(compat, -1)
    return compat.astype(np.float32)


def vector(labels: int) -> NDArray[np.float32]:
    return np.linspace(-3, 1, labels, dtype=np.float32)


def photograph_like(
    dcrf: ModuleType,
    *,
    size: tuple[int, int] = (33, 29),
    labels: int = 3,
    bilateral: dict[str, Any] | None = None,
    gaussian: dict[str, Any] | None = None,
    iterations: int = 5,
    seed: int = 0,
) -> Outputs:
    """DenseCRF2D with the two usual kernels; one is left out where its arguments are None."""
    height, width = size
    d = dcrf.DenseCRF2D(width, height, labels)
    d.setUnaryEnergy(unary(labels, height * width, seed + 1))
    if gaussian is not None:
        d.addPairwiseGaussian(**named(dcrf, gaussian))
    if bilateral is not None:
        d.addPairwiseBilateral(rgbim=image(height, width, seed), **named(dcrf, bilateral))
    return {"q": np.array(d.inference(iterations))}


def named(dcrf: ModuleType, arguments: dict[str, Any]) -> dict[str, Any]:
    """Constants given by name become those of the module."""
    return {
        key: getattr(dcrf, value) if key in ("kernel", "normalization") else value for key, value in arguments.items()
    }


def general(
    dcrf: ModuleType, *, d: int, points: int, labels: int = 3, spread: float = 2.0, iterations: int = 5, **options: Any
) -> Outputs:
    """DenseCRF over features of any dimension."""
    crf = dcrf.DenseCRF(points, labels)
    crf.setUnaryEnergy(unary(labels, points))
    crf.addPairwiseEnergy(features(d, points, spread=spread), **named(dcrf, {"compat": 3, **options}))
    return {"q": np.array(crf.inference(iterations))}


def steps(dcrf: ModuleType, *, size: tuple[int, int] = (17, 21), labels: int = 4) -> Outputs:
    """Step by step, with the divergence before each."""
    height, width = size
    d = dcrf.DenseCRF2D(width, height, labels)
    d.setUnaryEnergy(unary(labels, height * width))
    d.addPairwiseGaussian(sxy=(3, 2), compat=vector(labels))
    d.addPairwiseBilateral(sxy=20, srgb=(9, 13, 17), rgbim=image(height, width), compat=matrix(labels))
    q, tmp1, tmp2 = d.startInference()
    outputs: Outputs = {"start": np.array(q)}
    divergences = []
    for _ in range(4):
        divergences.append(d.klDivergence(q))
        d.stepInference(q, tmp1, tmp2)
    return {**outputs, "q": np.array(q), "kl": np.array([*divergences, d.klDivergence(q)])}


def unaries(dcrf: ModuleType, kind: str) -> Outputs:
    points, labels = 50, 3
    d = dcrf.DenseCRF(points, labels)
    if kind == "const":
        d.setUnary(dcrf.ConstUnary(unary(labels, points)))
    elif kind == "logistic":
        d.setUnary(dcrf.LogisticUnary(unary(labels, 4), unary(4, points, 5)))
    elif kind == "logistic, direct":
        d.setUnaryEnergy(unary(labels, points), unary(points, points, 5, 0.1))
    elif kind == "replaced":
        d.setUnaryEnergy(unary(labels, points, 7))
        d.setUnaryEnergy(unary(labels, points))
    elif kind == "forbidden":
        energies = unary(labels, points)
        energies[1, ::3] = np.inf
        d.setUnaryEnergy(energies)
    else:
        assert kind == "none"
    d.addPairwiseEnergy(features(2, points), compat=matrix(labels))
    start, tmp1, tmp2 = d.startInference()
    outputs = {"start": np.array(start), "q": np.array(d.inference(3))}
    d.stepInference(start, tmp1, tmp2)
    return {**outputs, "step": np.array(start)}


def issue26(dcrf: ModuleType) -> Outputs:
    """Four channels, and inference before and after a kernel is added."""
    size, channels = (24, 20), 4
    d = dcrf.DenseCRF2D(size[0], size[1], 2)
    d.setUnaryEnergy(unary(2, size[0] * size[1]))
    before = np.array(d.inference(3))
    y, x, _ = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (*size, channels)), indexing="ij")
    value = ((x > 5) & (x < 15) & (y > 6)).astype(np.float32) * 100
    energy = np.stack([y[..., 0] / 10, x[..., 0] / 10, *np.moveaxis(value, 2, 0)]).reshape(6, -1)
    d.addPairwiseEnergy(np.ascontiguousarray(energy), compat=10)
    return {"before": before, "q": np.array(d.inference(5))}


APPEARANCE = {"sxy": 80, "srgb": 13, "compat": 10}
SHARP = {"sxy": (49, 30), "srgb": (5, 3, 4), "compat": 5}
SMOOTHNESS = {"sxy": 3, "compat": 3}


def cases() -> dict[str, Callable[[ModuleType], Outputs]]:
    found: dict[str, Callable[[ModuleType], Outputs]] = {
        "both": partial(photograph_like, bilateral=APPEARANCE, gaussian=SMOOTHNESS, iterations=10),
        "sharp": partial(photograph_like, bilateral=SHARP, gaussian=SMOOTHNESS, iterations=10, seed=5),
        "very sharp": partial(photograph_like, bilateral={"sxy": 8, "srgb": 3, "compat": 10}, iterations=10, seed=6),
        "bilateral": partial(photograph_like, bilateral=APPEARANCE),
        "gaussian": partial(photograph_like, gaussian={"sxy": (4, 1.5), "compat": 3}),
        "no kernel": photograph_like,
        "no iteration": partial(photograph_like, gaussian=SMOOTHNESS, iterations=0),
        "21 labels": partial(photograph_like, size=(16, 17), labels=21, bilateral=APPEARANCE, gaussian=SMOOTHNESS),
        "2 labels": partial(photograph_like, labels=2, bilateral=APPEARANCE, gaussian=SMOOTHNESS),
        "1 label": partial(photograph_like, size=(5, 7), labels=1, bilateral=APPEARANCE, gaussian=SMOOTHNESS),
        "negative weight": partial(photograph_like, size=(16, 15), gaussian={"sxy": 2, "compat": -2.5}),
        # Coordinates of which float keeps only some bits, but which 16 bits hold.
        "wide": partial(photograph_like, size=(4, 600), bilateral={"sxy": 0.5, "srgb": 3, "compat": 4}, iterations=3),
        "steps": steps,
        "issue 26": issue26,
    }
    for height, width in ((1, 1), (1, 5), (5, 1), (2, 3), (31, 33), (32, 20), (3, 127)):
        arguments = partial(photograph_like, size=(height, width), bilateral=SHARP, gaussian=SMOOTHNESS, iterations=10)
        found[f"{height} x {width}"] = arguments
    for normalization in NORMALIZATIONS:
        weak = {"normalization": normalization, "compat": 0.02 if normalization == "NO_NORMALIZATION" else 5}
        found[f"2-D, {normalization}"] = partial(
            photograph_like, size=(19, 22), bilateral=APPEARANCE | weak, gaussian=SMOOTHNESS | weak
        )
        found[f"4-D, {normalization}"] = partial(general, d=4, points=301, **weak)
    for kernel in KERNELS:
        found[kernel] = partial(photograph_like, size=(13, 14), bilateral=APPEARANCE | {"kernel": kernel})
    for name, compat in {"vector": vector(5), "matrix": matrix(5)}.items():
        found[name] = partial(
            photograph_like, size=(18, 19), labels=5, bilateral=APPEARANCE | {"compat": compat}, gaussian=SMOOTHNESS
        )
    for d in (1, 2, 3, 5, 7, 10, 16):
        found[f"{d}-D"] = partial(general, d=d, points=203)
    found["far apart"] = partial(general, d=3, points=203, spread=300.0)
    found["close together"] = partial(general, d=3, points=203, spread=0.01)
    for kind in ("const", "logistic", "logistic, direct", "replaced", "forbidden", "none"):
        found[f"unary: {kind}"] = partial(unaries, kind=kind)
    return found
