"""deeplab_kernels.densecrf: pydensecrf's interface and results, and the answers where pydensecrf has none."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import densecrf_cases as models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf
from deeplab_kernels.densecrf import eigen, lattice_embed, utils

RECORDED = Path(__file__).parent / "data" / "densecrf.npz"


@pytest.fixture(scope="module")
def pydensecrf() -> ModuleType:
    return pytest.importorskip(
        "pydensecrf.densecrf",
        reason="pydensecrf is not installed (requirements/bench.txt); its recorded outputs are used",
    )


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = dcrf.get_num_threads()
    dcrf.set_num_threads(2)
    yield
    dcrf.set_num_threads(before)


def assert_same(ours: NDArray[Any], theirs: NDArray[Any], atol: float = 1e-3) -> None:
    """The promise: |dQ| <= 1e-3 and the same labels on 99.9 % of the points, where they are decided at all."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    if ours.size:
        top = np.sort(theirs, axis=0)
        decided = top[-1] - top[-2] > 1e-4 if len(top) > 1 else np.ones(top.shape[1], bool)
        assert (ours.argmax(0) != theirs.argmax(0))[decided].sum() <= 0.001 * ours.shape[1]


# pydensecrf's results.


@pytest.mark.parametrize("name", models.cases())
def test_recorded_outputs_of_pydensecrf(name: str) -> None:
    outputs = models.cases()[name](dcrf)
    with np.load(RECORDED) as recorded:
        assert {f"{name}|{key}" for key in outputs} == {key for key in recorded if key.split("|")[0] == name}
        for key, ours in outputs.items():
            theirs = recorded[f"{name}|{key}"]
            if key == "kl":
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)
            else:
                assert_same(ours, theirs / np.float64(65535))


def test_recorded_outputs_are_of_these_models(pydensecrf: ModuleType) -> None:
    """And the models still run unchanged with pydensecrf itself."""
    with np.load(RECORDED) as recorded:
        for name in ("both", "steps", "2-D, NORMALIZE_BEFORE", "unary: logistic"):
            for key, theirs in models.cases()[name](pydensecrf).items():
                if key != "kl":
                    np.testing.assert_allclose(theirs, recorded[f"{name}|{key}"] / np.float64(65535), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    labels=st.integers(2, 9),
    sxy=st.floats(0.5, 90),
    srgb=st.floats(3, 90),
    compat=st.floats(-2, 10),
    seed=st.integers(0, 1000),
    normalization=st.integers(1, 3),
)
def test_any_model_as_pydensecrf(pydensecrf, height, width, labels, sxy, srgb, compat, seed, normalization) -> None:
    arguments = {"sxy": sxy, "srgb": srgb, "compat": compat}

    def infer(module: ModuleType) -> NDArray[Any]:
        d = module.DenseCRF2D(width, height, labels)
        d.setUnaryEnergy(models.unary(labels, height * width, seed))
        d.addPairwiseGaussian(3, 3)
        d.addPairwiseBilateral(rgbim=models.image(height, width, seed), normalization=normalization, **arguments)
        return np.array(d.inference(5))

    assert_same(infer(dcrf), infer(pydensecrf))


@pytest.mark.parametrize(("name", "sxy", "srgb"), [("astronaut", 80, 13), ("coffee", 49, 5), ("chelsea", 30, 3)])
def test_photographs_as_pydensecrf(pydensecrf: ModuleType, name: str, sxy: float, srgb: float) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    photograph = np.ascontiguousarray(getattr(skimage_data, name)()[:261:2, :397:2, :3])
    height, width = photograph.shape[:2]

    def infer(module: ModuleType) -> NDArray[Any]:
        d = module.DenseCRF2D(width, height, 8)
        d.setUnaryEnergy(models.unary(8, height * width))
        d.addPairwiseGaussian(3, 3)
        d.addPairwiseBilateral(sxy, srgb, photograph, 10)
        return np.array(d.inference(10))

    assert_same(infer(dcrf), infer(pydensecrf))


# The interface.

INTERFACE = {
    "DenseCRF": "(nvar, nlabels)",
    "DenseCRF2D": "(w, h, nlabels)",
    "ConstUnary": "(u)",
    "LogisticUnary": "(L, f)",
    "DenseCRF.setUnaryEnergy": "(self, u, f=None)",
    "DenseCRF.setUnary": "(self, u)",
    "DenseCRF.addPairwiseEnergy": "(self, features, compat, kernel=1, normalization=3)",
    "DenseCRF.inference": "(self, niter)",
    "DenseCRF.startInference": "(self)",
    "DenseCRF.stepInference": "(self, Q, tmp1, tmp2)",
    "DenseCRF.klDivergence": "(self, Q)",
    "DenseCRF2D.addPairwiseGaussian": "(self, sxy, compat, kernel=1, normalization=3)",
    "DenseCRF2D.addPairwiseBilateral": "(self, sxy, srgb, rgbim, compat, kernel=1, normalization=3)",
    "utils.unary_from_labels": "(labels, n_labels, gt_prob, zero_unsure=True)",
    "utils.compute_unary": "(labels, M, GT_PROB=0.5)",
    "utils.unary_from_softmax": "(sm, scale=None, clip=1e-05)",
    "utils.softmax_to_unary": "(sm, GT_PROB=1)",
    "utils.create_pairwise_gaussian": "(sdims, shape)",
    "utils.create_pairwise_bilateral": "(sdims, schan, img, chdim=-1)",
}


@pytest.mark.parametrize(("name", "expected"), INTERFACE.items())
def test_argument_names_and_defaults(name: str, expected: str) -> None:
    function: Any = dcrf
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    # stepInference's temporary arrays may be left out.
    defaults = {p.name: p.default for p in positional if p.default is not p.empty and not p.name.startswith("tmp")}
    shown = [
        p.name + (f"={int(d) if isinstance(d, int) else d!r}" if (d := defaults.get(p.name, p)) is not p else "")
        for p in positional
    ]
    assert "(" + ", ".join(shown) + ")" == expected.replace("=True", "=1")


def test_constants_and_enums() -> None:
    assert [(k.name, k.value) for k in dcrf.KernelType] == list(zip(models.KERNELS, range(3), strict=True))
    assert [(n.name, n.value) for n in dcrf.NormalizationType] == list(
        zip(models.NORMALIZATIONS, range(4), strict=True)
    )
    for name in models.KERNELS:
        assert getattr(dcrf, name) is dcrf.KernelType[name]
    for name in models.NORMALIZATIONS:
        assert getattr(dcrf, name) is dcrf.NormalizationType[name]


def test_every_name_of_pydensecrf(pydensecrf: ModuleType) -> None:
    own = {"Number", "eigen"}  # what it imports
    for name in set(dir(pydensecrf)) - own:
        if not name.startswith("_"):
            ours, theirs = getattr(dcrf, name), getattr(pydensecrf, name)
            methods = [m for m in dir(theirs) if not m.startswith("_")] if inspect.isclass(theirs) else []
            assert [m for m in methods if not hasattr(ours, m)] == []


def model(size: tuple[int, int] = (13, 17), labels: int = 4) -> Any:
    height, width = size
    d = dcrf.DenseCRF2D(width, height, labels)
    d.setUnaryEnergy(models.unary(labels, height * width))
    d.addPairwiseGaussian(3, 3)
    d.addPairwiseBilateral(20, 13, models.image(height, width), 10)
    return d


def test_inference_returns_probabilities() -> None:
    q = model().inference(5)
    assert isinstance(q, np.ndarray)
    assert q.shape == (4, 13 * 17)
    assert q.dtype == np.float32
    assert q.flags.f_contiguous
    assert q.flags.writeable
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("size", [(13, 17), (12, 16)])
def test_steps_are_inference(size: tuple[int, int]) -> None:
    d = model(size)
    q, tmp1, tmp2 = d.startInference()
    np.testing.assert_array_equal(q, d.inference(0))
    for _ in range(3):
        d.stepInference(q, tmp1, tmp2)
    np.testing.assert_allclose(q, d.inference(3), atol=1e-6)
    # Other layouts and types are overwritten in place as well.
    for given_q in (
        np.ascontiguousarray(d.inference(2)),
        d.inference(2).astype(np.float64),
        d.inference(2)[::-1][::-1],
    ):
        d.stepInference(given_q)
        np.testing.assert_allclose(given_q, q, atol=1e-6)


def test_a_changed_model_is_used_by_the_next_step() -> None:
    d = model()
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    before = d.klDivergence(q)
    d.addPairwiseGaussian(2, 5)
    assert d.klDivergence(q) != before
    d.setUnaryEnergy(models.unary(4, 13 * 17, 9))
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    np.testing.assert_allclose(q, d.inference(1), atol=1e-6)


def test_divergence_falls_to_the_log_partition_function_of_independent_points() -> None:
    """Without kernels the least divergence is -sum_i log sum_l exp(-u_il), at Q = softmax(-u)."""
    u = models.unary(3, 50)
    d = dcrf.DenseCRF(50, 3)
    d.setUnaryEnergy(u)
    q = d.inference(1)
    least = -np.log(np.exp(-u.astype(np.float64)).sum(0)).sum()
    assert d.klDivergence(q) == pytest.approx(least, rel=1e-6)
    assert d.klDivergence(np.full((3, 50), 1 / 3)) > least + 1


def test_the_unary_is_copied() -> None:
    u = models.unary(4, 13 * 17)
    d, unary = model(), dcrf.ConstUnary(u)
    d.setUnaryEnergy(u)
    expected = d.inference(3)
    u[:] = 0
    np.testing.assert_array_equal(d.inference(3), expected)
    for _ in range(2):  # pydensecrf's ConstUnary can be used once
        d.setUnary(unary)
        np.testing.assert_array_equal(d.inference(3), expected)


def test_progress() -> None:
    calls: list[int] = []
    q = model().inference(4, progress=calls.append)
    assert calls == [1, 2, 3, 4]
    np.testing.assert_array_equal(q, model().inference(4))

    def stop(t: int) -> None:
        raise KeyError(t)

    with pytest.raises(KeyError, match="1"):
        model().inference(4, progress=stop)


def test_subclasses() -> None:
    class Mine(dcrf.DenseCRF2D):
        def __init__(self, side: int) -> None:
            super().__init__(side, side, nlabels=2)

    d = Mine(5)
    d.addPairwiseGaussian(2, 1)
    assert d.inference(1).shape == (2, 25)


@pytest.mark.parametrize(("height", "width"), [(13, 17), (37, 211)])  # the second is visited in rectangles
def test_2d_kernels_are_general_kernels(height: int, width: int) -> None:
    image = models.image(height, width)
    general = dcrf.DenseCRF(height * width, 4)
    general.setUnaryEnergy(models.unary(4, height * width))
    general.addPairwiseEnergy(utils.create_pairwise_gaussian((3, 3), (height, width))[::-1], 3)
    order = [1, 0, 2, 3, 4]
    general.addPairwiseEnergy(utils.create_pairwise_bilateral((20, 20), (13,) * 3, image, 2)[order], 10)
    np.testing.assert_allclose(general.inference(5), model((height, width)).inference(5), atol=1e-4)


def test_kernels_of_a_volume() -> None:
    shape = (5, 6, 7)
    d = dcrf.DenseCRF(210, 2)
    d.setUnaryEnergy(models.unary(2, 210))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian((1.0, 2.0, 3.0), shape), compat=3, kernel=dcrf.FULL_KERNEL)
    assert_same(d.inference(3), reference(models.unary(2, 210), [(volume(shape).T / [1, 2, 3], -3 * np.eye(2), 3)], 3))


def volume(shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(len(shape), -1).astype(np.float64)


# Against the definition, in float64.


class Lattice:
    """The filter by a dictionary of vertices; features (points, d)."""

    def __init__(self, features: NDArray[Any]) -> None:
        self.points, self.d = features.shape
        # pydensecrf's points at the origin that fill up a multiple of 4.
        padded = np.concatenate([features, np.zeros((-self.points % 4, self.d))])
        keys, weights = lattice_embed(padded)
        vertices, index = np.unique(keys.reshape(-1, self.d + 1), axis=0, return_inverse=True)
        self.index, self.weights = index.reshape(weights.shape)[: self.points], weights[: self.points]
        self.count = len(vertices)
        found = {tuple(vertex): i for i, vertex in enumerate(vertices.tolist())}
        self.neighbours = np.full((self.d + 1, 2, self.count), self.count)
        for axis in range(self.d + 1):
            for side, sign in enumerate((-1, 1)):
                others = vertices + sign
                others[:, axis] -= sign * (self.d + 1)
                self.neighbours[axis, side] = [found.get(tuple(v), self.count) for v in others.tolist()]

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        lattice = np.zeros((self.count + 1, values.shape[1]))
        for k in range(self.d + 1):
            np.add.at(lattice, self.index[:, k], self.weights[:, k, None] * values)
        for before, after in self.neighbours:
            lattice[:-1] = lattice[:-1] + (lattice[before] + lattice[after]) / 2
        sliced = sum(self.weights[:, k, None] * lattice[self.index[:, k]] for k in range(self.d + 1))
        return sliced / (1 + 2.0**-self.d)


def softmax(energy: NDArray[Any]) -> NDArray[Any]:
    exponential = np.exp(energy - energy.max(1, keepdims=True))
    return exponential / exponential.sum(1, keepdims=True)


def reference(u: NDArray[Any], kernels: list[tuple[NDArray[Any], NDArray[Any], int]], iterations: int) -> NDArray[Any]:
    """Mean field; each kernel has features (points, d), the matrix C, a normalisation."""
    lattices = [Lattice(np.asarray(features, np.float64)) for features, _, _ in kernels]
    norms = [lattice(np.ones((lattice.points, 1))) + 1e-20 for lattice in lattices]
    powers = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (0.5, 0.5)}
    q = softmax(-u.T.astype(np.float64))
    for _ in range(iterations):
        energy = -u.T.astype(np.float64)
        for (_, matrix, normalization), lattice, norm in zip(kernels, lattices, norms, strict=True):
            before, after = powers[normalization]
            energy -= lattice(q / norm**before) / norm**after @ matrix.T
        q = softmax(energy)
    return q.T


@pytest.mark.parametrize("normalization", range(4))
@pytest.mark.parametrize("compat", ["number", "vector", "matrix"])
def test_against_the_definition(normalization: int, compat: str) -> None:
    height, width, labels = 9, 11, 3
    scale = 0.05 if normalization == 0 else 1.0
    given_compat, matrix = {
        "number": (3 * scale, -3 * scale * np.eye(labels)),
        "vector": (models.vector(labels) * scale, np.diag(models.vector(labels)) * scale),
        "matrix": (models.matrix(labels) * scale, (models.matrix(labels) + models.matrix(labels).T) / 2 * scale),
    }[compat]
    image = models.image(height, width)
    d = dcrf.DenseCRF2D(width, height, labels)
    d.setUnaryEnergy(models.unary(labels, height * width))
    d.addPairwiseBilateral((5, 7), (20, 30, 40), image, given_compat, normalization=normalization)
    y, x = volume((height, width))
    colours = image.reshape(-1, 3) / [20, 30, 40]
    features = np.column_stack([x / 5, y / 7, colours])
    expected = reference(models.unary(labels, height * width), [(features, matrix, normalization)], 4)
    np.testing.assert_allclose(d.inference(4), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["16-bit image", "tiny sigma", "far offset", "large spread"])
def test_keys_beyond_16_bits(kind: str) -> None:
    """Where pydensecrf's vertex coordinates wrap around."""
    points, labels = 203, 3
    features = models.features(3, points, spread=6.0)
    if kind == "16-bit image":
        features = np.random.RandomState(0).randint(0, 65536, (1, points)).astype(np.float32) / 8
        features = np.repeat(features, 3, axis=0)
    elif kind == "tiny sigma":
        features = volume((7, 29)).astype(np.float32) / 1e-4
    elif kind == "far offset":
        features = np.round(features * 4) / 4 + np.array([[0], [40000], [-90000]], np.float32)
    else:
        features *= 100_000
    d = dcrf.DenseCRF(points, labels)
    d.setUnaryEnergy(models.unary(labels, points))
    d.addPairwiseEnergy(features, 3)
    assert np.abs(features).max() > 5000
    expected = reference(models.unary(labels, points), [(features.T, -3 * np.eye(labels), 3)], 5)
    np.testing.assert_allclose(d.inference(5), expected, atol=1e-4)


def test_values_of_any_size() -> None:
    """Energies up to 1e20, and weights up to 1e4: probabilities stay probabilities."""
    d = dcrf.DenseCRF(100, 5)
    u = models.unary(5, 100) * 10.0 ** np.random.RandomState(0).randint(-20, 21, (5, 100))
    d.setUnaryEnergy(u)
    for compat in (1e4, -1e4):
        d.addPairwiseEnergy(models.features(2, 100), compat)
        q = d.inference(5)
        np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
        assert q.min() >= 0


# Types and layouts.


@pytest.mark.parametrize(
    "convert",
    [
        np.float64,
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: a.astype(">f4"),
        lambda a: a.tolist(),
        lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape),
    ],
    ids=["float64", "Fortran", "strided", "negative strides", "big endian", "list", "unaligned and read-only"],
)
def test_arrays_of_any_layout(convert: Callable[[Any], Any]) -> None:
    def infer(change: Callable[[Any], Any]) -> NDArray[Any]:
        d = dcrf.DenseCRF(130, 3)
        d.setUnaryEnergy(change(models.unary(3, 130)))
        d.addPairwiseEnergy(change(models.features(4, 130)), change(models.matrix(3)))
        return d.inference(3)

    np.testing.assert_array_equal(infer(convert), infer(lambda a: a))


@pytest.mark.parametrize(
    "convert",
    [
        np.float32,
        np.float64,
        np.float16,
        np.uint16,
        np.int64,
        np.asfortranarray,
        lambda a: np.repeat(a, 3, axis=1)[:, ::3],
        lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
        lambda a: np.moveaxis(np.moveaxis(a, 2, 0).copy(), 0, 2),
        lambda a: a.astype(">u2"),
        lambda a: a.tolist(),
    ],
)
def test_images_of_any_type(convert: Callable[[Any], Any]) -> None:
    """The values count, whatever their type."""

    def infer(change: Callable[[Any], Any]) -> NDArray[Any]:
        d = dcrf.DenseCRF2D(29, 33, 2)
        d.setUnaryEnergy(models.unary(2, 29 * 33))
        d.addPairwiseBilateral(20, 13, change(models.image(33, 29)), 5)
        return d.inference(3)

    np.testing.assert_array_equal(infer(convert), infer(lambda a: a))


def test_16_bit_image() -> None:
    image = models.image(33, 29).astype(np.uint16)

    def infer(factor: int) -> NDArray[Any]:
        d = dcrf.DenseCRF2D(29, 33, 2)
        d.setUnaryEnergy(models.unary(2, 29 * 33))
        d.addPairwiseBilateral(20, 16 * factor, image * factor, 5)
        return d.inference(3)

    np.testing.assert_allclose(infer(257), infer(1), atol=1e-3)


@pytest.mark.parametrize(("points", "labels"), [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1), (3, 300)])
def test_few_points_and_labels(points: int, labels: int) -> None:
    d = dcrf.DenseCRF(points, labels)
    d.setUnaryEnergy(np.zeros((labels, points)))
    d.addPairwiseEnergy(np.zeros((2, points)), 1)
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    assert d.klDivergence(q) == pytest.approx(-points * (np.log(labels) + 1 / labels), rel=1e-4)
    np.testing.assert_allclose(d.inference(3), np.full((labels, points), 1 / labels), atol=1e-6)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size: tuple[int, int]) -> None:
    d = dcrf.DenseCRF2D(*size, 3)
    d.setUnaryEnergy(np.zeros((3, 0)))
    d.addPairwiseGaussian(3, 3)
    d.addPairwiseBilateral(3, 3, np.zeros((size[1], size[0], 3), np.uint8), 3)
    assert d.inference(5).shape == (3, 0)


# Bad input.


def crf() -> Any:
    return dcrf.DenseCRF2D(5, 4, 3)


IMAGE = np.zeros((4, 5, 3), np.uint8)
NAN_IMAGE = np.where(np.arange(60).reshape(4, 5, 3) == 37, np.nan, 0)
UNARY = np.zeros((3, 20))
NAN_UNARY = np.where(np.arange(60).reshape(3, 20) == 27, np.nan, 0)
FEATURES = np.zeros((2, 20))

BAD = {
    "nvar": (lambda: dcrf.DenseCRF(-1, 2), ValueError, "nvar must be at least 0, got -1"),
    "nvar type": (lambda: dcrf.DenseCRF(2.5, 2), TypeError, "nvar must be an integer, got 2.5"),
    "nlabels": (lambda: dcrf.DenseCRF(5, 0), ValueError, "nlabels must be at least 1, got 0"),
    "w": (lambda: dcrf.DenseCRF2D(-3, 5, 2), ValueError, "w must be at least 0, got -3"),
    "h type": (lambda: dcrf.DenseCRF2D(3, "5", 2), TypeError, "h must be an integer, got '5'"),
    "unary shape": (lambda: crf().setUnaryEnergy(UNARY[:, :19]), ValueError, r"u must .*\(3, 20\), got \(3, 19\)"),
    "unary labels": (lambda: crf().setUnaryEnergy(UNARY[:2]), ValueError, r"u must .*\(3, 20\), got \(2, 20\)"),
    "unary image": (lambda: crf().setUnaryEnergy(UNARY.reshape(3, 4, 5)), ValueError, r"u must have 2 .*\(3, 4, 5\)"),
    "unary type": (lambda: crf().setUnaryEnergy(UNARY.astype(complex)), TypeError, "u must hold real .*complex128"),
    "unary None": (lambda: crf().setUnaryEnergy(None), TypeError, "u must hold real numbers"),
    "unary NaN": (lambda: crf().setUnaryEnergy(NAN_UNARY), ValueError, r"u is NaN or -infinity at \[1, 7\]"),
    "unary -inf": (lambda: crf().setUnaryEnergy(UNARY - np.inf), ValueError, r"u is NaN or -infinity at \[0, 0\]"),
    "unary inf": (lambda: crf().setUnaryEnergy(UNARY + np.inf), ValueError, "u is .infinity for all labels of point 0"),
    "unary huge": (lambda: crf().setUnaryEnergy(UNARY - 1e300), ValueError, "u is NaN or -infinity"),
    "unary product": (
        lambda: crf().setUnaryEnergy(np.zeros((3, 4)), np.zeros((5, 20))),
        ValueError,
        r"u @ f needs .*\(3, 4\) and \(5, 20\)",
    ),
    "unary product NaN": (
        lambda: crf().setUnaryEnergy(np.full((3, 4), np.nan), np.zeros((4, 20))),
        ValueError,
        "u @ f is NaN",
    ),
    "const unary": (lambda: dcrf.ConstUnary(np.zeros(5)), ValueError, r"u must have 2 dimensions, got shape \(5,\)"),
    "const unary size": (
        lambda: crf().setUnary(dcrf.ConstUnary(UNARY[:, 1:])),
        ValueError,
        r"u must have shape .*\(3, 20\), got \(3, 19\)",
    ),
    "logistic unary": (
        lambda: dcrf.LogisticUnary(np.zeros((3, 4)), np.zeros((3, 20))),
        ValueError,
        r"L @ f needs .*\(3, 4\) and \(3, 20\)",
    ),
    "unary object": (lambda: crf().setUnary(UNARY), TypeError, "ConstUnary or LogisticUnary, got ndarray"),
    "plain unary": (dcrf.Unary, TypeError, "use ConstUnary"),
    "features shape": (
        lambda: crf().addPairwiseEnergy(FEATURES[:, 1:], 1),
        ValueError,
        r"features must have shape \(d, 20\) with d = 1 to 16, got \(2, 19\)",
    ),
    "no features": (lambda: crf().addPairwiseEnergy(FEATURES[:0], 1), ValueError, r"got \(0, 20\)"),
    "17 features": (lambda: crf().addPairwiseEnergy(np.zeros((17, 20)), 1), ValueError, r"got \(17, 20\)"),
    "features vector": (
        lambda: crf().addPairwiseEnergy(FEATURES[0], 1),
        ValueError,
        r"2 dimensions, got shape \(20,\)",
    ),
    "features NaN": (
        lambda: crf().addPairwiseEnergy(FEATURES + np.eye(2, 20) * np.nan, 1),
        ValueError,
        r"features is NaN or infinite at \[0, 0\]",
    ),
    "features inf": (
        lambda: crf().addPairwiseEnergy(np.where(np.arange(40).reshape(2, 20) == 33, -np.inf, 0), 1),
        ValueError,
        r"features is NaN or infinite at \[1, 13\]",
    ),
    "features far": (
        lambda: crf().addPairwiseEnergy(np.where(np.arange(40).reshape(2, 20) == 33, 1e9, 0), 1),
        ValueError,
        r"features is too far from 0 .* at \[1, 13\]: .* below about",
    ),
    "features beyond float32": (
        lambda: crf().addPairwiseEnergy(FEATURES + 1e300, 1),
        ValueError,
        "features is NaN or inf",
    ),
    "compat shape": (
        lambda: crf().addPairwiseGaussian(3, np.zeros(4)),
        ValueError,
        r"compat must be a number or have shape \(3,\) or \(3, 3\) .* got shape \(4,\)",
    ),
    "compat matrix": (lambda: crf().addPairwiseGaussian(3, np.zeros((3, 4))), ValueError, r"got shape \(3, 4\)"),
    "compat cube": (lambda: crf().addPairwiseGaussian(3, np.zeros((3, 3, 3))), ValueError, r"got shape \(3, 3, 3\)"),
    "compat NaN": (lambda: crf().addPairwiseGaussian(3, np.nan), ValueError, "compat must be finite"),
    "compat huge": (lambda: crf().addPairwiseGaussian(3, 1e300), ValueError, "compat must be finite"),
    "compat type": (lambda: crf().addPairwiseGaussian(3, "3"), TypeError, "compat must hold real numbers"),
    "compat None": (lambda: crf().addPairwiseEnergy(FEATURES, None), TypeError, "compat must hold real numbers"),
    "kernel": (
        lambda: crf().addPairwiseGaussian(3, 3, kernel=3),
        ValueError,
        r"kernel must be .*FULL_KERNEL \(2\), got 3",
    ),
    "normalization": (
        lambda: crf().addPairwiseGaussian(3, 3, normalization="symmetric"),
        ValueError,
        r"normalization must be one of NO_NORMALIZATION \(0\), .* got 'symmetric'",
    ),
    "sxy 0": (lambda: crf().addPairwiseGaussian(0, 3), ValueError, "sxy must be greater than 0, got 0"),
    "sxy negative": (lambda: crf().addPairwiseGaussian((3, -1), 3), ValueError, r"sxy must be greater .* \(3, -1\)"),
    "sxy NaN": (lambda: crf().addPairwiseGaussian(np.nan, 3), ValueError, "sxy must be greater than 0, got nan"),
    "sxy underflow": (lambda: crf().addPairwiseGaussian(1e-300, 3), ValueError, "sxy must be greater than 0"),
    "sxy tiny": (lambda: crf().addPairwiseGaussian(1e-30, 3), ValueError, "sxy is too far .* row 0, column 1"),
    "sxy count": (lambda: crf().addPairwiseGaussian((3, 3, 3), 3), ValueError, r"sxy must be a number or 2 numbers"),
    "sxy type": (lambda: crf().addPairwiseGaussian("3", 3), TypeError, "sxy must hold real numbers"),
    "srgb 0": (lambda: crf().addPairwiseBilateral(3, (3, 0, 3), IMAGE, 3), ValueError, "srgb must be greater than 0"),
    "srgb count": (lambda: crf().addPairwiseBilateral(3, (3, 3), IMAGE, 3), ValueError, "srgb must be a number or 3"),
    "image size": (
        lambda: crf().addPairwiseBilateral(3, 3, IMAGE.transpose(1, 0, 2), 3),
        ValueError,
        r"rgbim must have shape \(h, w, 3\) = \(4, 5, 3\), got \(5, 4, 3\)",
    ),
    "image channels": (
        lambda: crf().addPairwiseBilateral(3, 3, np.zeros((4, 5, 4), np.uint8), 3),
        ValueError,
        r"got \(4, 5, 4\); .*create_pairwise_bilateral",
    ),
    "grey image": (lambda: crf().addPairwiseBilateral(3, 3, IMAGE[..., 0], 3), ValueError, r"got \(4, 5\)"),
    "image NaN": (
        lambda: crf().addPairwiseBilateral(3, 3, NAN_IMAGE, 3),
        ValueError,
        "rgbim is NaN or infinite at row 2, column 2, channel 1",
    ),
    "image far": (
        lambda: crf().addPairwiseBilateral(3, 1e-9, IMAGE + 200, 3),
        ValueError,
        "rgbim / srgb is too far from 0 .* at row 0, column 0, channel 0",
    ),
    "image type": (lambda: crf().addPairwiseBilateral(3, 3, IMAGE * 1j, 3), TypeError, "rgbim must hold real numbers"),
    "niter": (lambda: crf().inference(-1), ValueError, "niter must be at least 0, got -1"),
    "niter type": (lambda: crf().inference(2.5), TypeError, "niter must be an integer, got 2.5"),
    "Q shape": (lambda: crf().stepInference(UNARY.T), ValueError, r"Q must have shape .*\(3, 20\), got \(20, 3\)"),
    "Q type": (lambda: crf().stepInference(UNARY.tolist()), TypeError, "Q must be an array of floating .* got list"),
    "Q integers": (lambda: crf().stepInference(UNARY.astype(int)), TypeError, "Q must be .* got an array of int64"),
    "Q NaN": (lambda: crf().stepInference(NAN_UNARY.copy()), ValueError, "Q holds NaN or infinity"),
    "Q read-only": (lambda: crf().stepInference(np.broadcast_to(0.5, (3, 20))), ValueError, "Q is read-only"),
    "divergence of NaN": (lambda: crf().klDivergence(NAN_UNARY), ValueError, "Q holds NaN or infinity"),
    "threads": (lambda: dcrf.set_num_threads(0), ValueError, "threads must be 1 to 1024, got 0"),
    "threads type": (lambda: dcrf.set_num_threads("2"), TypeError, "threads must be an integer, got '2'"),
    "labels": (lambda: utils.unary_from_labels([0, 4], 3, 0.5), ValueError, "labels must be 0 to 3 .* got 4"),
    "label -1": (lambda: utils.unary_from_labels([-1], 3, 0.5), ValueError, "labels must be 0 to 3 .* got -1"),
    "sure labels": (lambda: utils.unary_from_labels([3], 3, 0.5, False), ValueError, "labels must be 0 to 2 .* got 3"),
    "float labels": (lambda: utils.unary_from_labels([0.0], 3, 0.5), TypeError, "labels must be integers"),
    "n_labels": (lambda: utils.unary_from_labels([0], 0, 0.5), ValueError, "n_labels must be at least 1"),
    "gt_prob": (lambda: utils.unary_from_labels([0], 3, 1), ValueError, "gt_prob must be between 0 and 1"),
    "softmax NaN": (lambda: utils.unary_from_softmax(NAN_UNARY), ValueError, "sm must be finite"),
    "softmax shape": (lambda: utils.unary_from_softmax(0.5), ValueError, r"sm must have the labels .* shape \(\)"),
    "scale": (lambda: utils.unary_from_softmax(UNARY, 1.5), ValueError, "scale must be greater than 0 and at most 1"),
    "sdims": (lambda: utils.create_pairwise_gaussian((3, 3), (4, 5, 6)), ValueError, "sdims must be .* 3 numbers"),
    "sdims 0": (lambda: utils.create_pairwise_gaussian((3, 0), (4, 5)), ValueError, "sdims must be greater than 0"),
    "chdim": (lambda: utils.create_pairwise_bilateral((3, 3), 3, IMAGE, 3), ValueError, "chdim must be .* got 3"),
    "schan": (
        lambda: utils.create_pairwise_bilateral((3, 3), (3,), IMAGE, 2),
        ValueError,
        "schan must be .* 3 numbers",
    ),
    "eigen": (lambda: eigen.matrixXf(np.zeros(3)), ValueError, r"arr must have 2 dimension\(s\), got shape \(3,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_argument_leaves_the_model_as_it_was() -> None:
    d = model()
    expected = d.inference(2)
    for bad in (lambda: d.setUnaryEnergy(NAN_UNARY), lambda: d.addPairwiseGaussian(0, 3)):
        with pytest.raises(ValueError, match="must"):
            bad()
    np.testing.assert_array_equal(d.inference(2), expected)


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
usual_numbers = st.floats(-100, 100, width=32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_right_or_refused(data: st.DataObject) -> None:
    """Whatever the shapes and values: probabilities, or an error that says why not."""
    points, labels, d = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 16))

    def array(*shape: int) -> NDArray[Any]:
        if data.draw(st.integers(0, 9)) == 0:
            shape = tuple(data.draw(st.integers(0, 5)) for _ in range(data.draw(st.integers(0, 3))))
        elements = numbers if data.draw(st.integers(0, 4)) == 0 else usual_numbers
        size = int(np.prod(shape))
        values = np.array(data.draw(st.lists(elements, min_size=size, max_size=size)), np.float64).reshape(shape)
        dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, np.int32, np.uint8]))
        with np.errstate(invalid="ignore", over="ignore"):
            values = values.astype(dtype)
        return data.draw(st.sampled_from([values, values[::-1] if values.ndim else values, np.asfortranarray(values)]))

    model = dcrf.DenseCRF(points, labels)
    try:
        model.setUnaryEnergy(array(labels, points))
        compat = array(*data.draw(st.sampled_from([(), (labels,), (labels, labels)])))
        model.addPairwiseEnergy(array(d, points), compat, normalization=data.draw(st.integers(0, 3)))
    except ValueError as error:
        assert any(name in str(error) for name in ("u ", "features ", "compat "))  # noqa: PT017
        return
    q = model.inference(data.draw(st.integers(0, 3)))
    assert q.shape == (labels, points)
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-4)
    assert np.isfinite(model.klDivergence(q))


# utils.


def test_unary_from_labels() -> None:
    labels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    u, p, n = 1 / 3, 0.8, 0.1
    expected = [[u, p, n, n, n, n, p, u], [u, n, p, n, n, p, n, u], [u, n, n, p, p, n, n, u]]
    unary = utils.unary_from_labels(labels, 3, 0.8)
    assert unary.dtype == np.float32
    np.testing.assert_allclose(unary, -np.log(expected), rtol=1e-6)
    sure = utils.unary_from_labels(labels, 4, 0.7, zero_unsure=False)
    np.testing.assert_array_equal(sure.argmin(0), labels.ravel())
    np.testing.assert_allclose(np.exp(-sure).sum(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(utils.unary_from_labels([0, 1], 1, 0.5), np.float32([[0, np.log(2)]]))
    assert utils.unary_from_labels(np.zeros((0, 3), int), 2, 0.5).shape == (2, 0)
    with pytest.warns(DeprecationWarning, match="unary_from_labels"):
        np.testing.assert_array_equal(utils.compute_unary(labels, 3, GT_PROB=0.8), unary)


def test_unary_from_softmax() -> None:
    sm = np.random.RandomState(0).random_sample((3, 4, 5)).astype(np.float32)
    sm /= sm.sum(0)
    sm[:, 0, 0] = 0, 1, 0
    unary = utils.unary_from_softmax(sm)
    assert unary.shape == (3, 20)
    assert unary.dtype == np.float32
    np.testing.assert_allclose(np.exp(-unary), sm.reshape(3, 20).clip(1e-5), rtol=1e-5)
    scaled = utils.unary_from_softmax(sm, scale=0.7, clip=None)
    np.testing.assert_allclose(np.exp(-scaled), 0.7 * sm.reshape(3, 20) + 0.1, rtol=1e-5)
    with pytest.warns(DeprecationWarning, match="unary_from_softmax"):
        np.testing.assert_array_equal(utils.softmax_to_unary(sm, 0.7), scaled)
    with pytest.warns(DeprecationWarning, match="unary_from_softmax"):
        old = utils.softmax_to_unary(sm)
    assert np.isinf(old[:, 0]).tolist() == [True, False, True]
    d = dcrf.DenseCRF2D(5, 4, 3)
    d.setUnaryEnergy(old)
    np.testing.assert_allclose(d.inference(1), sm.reshape(3, 20), atol=1e-6)


def test_create_pairwise() -> None:
    gaussian = utils.create_pairwise_gaussian((2, 4), (3, 5))
    assert gaussian.dtype == np.float32
    y, x = volume((3, 5))
    np.testing.assert_array_equal(gaussian, [y / 2, x / 4])
    image = models.image(3, 5)
    for chdim, given_image in ((2, image), (0, np.moveaxis(image, 2, 0)), (1, np.moveaxis(image, 2, 1))):
        bilateral = utils.create_pairwise_bilateral((2, 4), (2, 4, 8), given_image, chdim)
        np.testing.assert_array_equal(bilateral, [y / 2, x / 4, *(image.reshape(15, 3) / [2, 4, 8]).T])
    grey = utils.create_pairwise_bilateral((2, 4), 16, image[..., 0])
    np.testing.assert_array_equal(grey, [y / 2, x / 4, image[..., 0].ravel() / 16])


@pytest.mark.parametrize("seed", range(3))
def test_utils_as_pydensecrf(pydensecrf: ModuleType, seed: int) -> None:
    from pydensecrf import utils as theirs

    random = np.random.RandomState(seed)
    labels, image = random.randint(0, 5, (4, 6, 5)), models.image(7, 5, seed)
    sm = random.random_sample((4, 3, 5)).astype(np.float32 if seed else np.float64)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "unary_from_labels": [(labels, 4, 0.7), (labels, 5, 0.6, False)],
        "unary_from_softmax": [(sm,), (sm, 0.5), (sm, None, None), (sm, 1, 0.2)],
        "create_pairwise_gaussian": [((3, 2.7, 1), (4, 5, 6)), ([2], [7])],
        "create_pairwise_bilateral": [
            ((3, 2.7), (1, 2, 3.3), image, 2),
            ((3, 2.7), 5.1, image, 2),
            ((3, 2.7, 1), (5.1,), image),
            ((5, 3), range(1, 8), image, 0),
        ],
    }
    for name, arguments in calls.items():
        for given_arguments in arguments:
            ours, expected = (getattr(module, name)(*given_arguments) for module in (utils, theirs))
            assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(ours, expected, rtol=1e-6)


# Threads and processes.


def test_results_do_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 2, 3, 8):
        dcrf.set_num_threads(threads)
        assert dcrf.get_num_threads() == threads
        d = model((61, 67), 5)
        q = d.inference(4)
        results.append((q, d.klDivergence(q)))
    for q, divergence in results[1:]:
        np.testing.assert_array_equal(q, results[0][0])
        assert divergence == results[0][1]


def test_two_threads_infer_at_once() -> None:
    shared = model((61, 67), 5)
    expected = shared.inference(5)
    wrong: list[int] = []

    def work(number: int) -> None:
        for own in (model((61, 67), 5), shared):
            q, tmp1, tmp2 = own.startInference()
            for _ in range(5):
                own.stepInference(q, tmp1, tmp2)
            if not (np.array_equal(own.inference(5), expected) and np.allclose(q, expected, atol=1e-6)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_gil_is_released() -> None:
    d = model((127, 133), 9)
    done = threading.Event()

    def work() -> None:
        d.inference(40)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    assert ticks > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes() -> None:
    # In a process without torch, whose threads warn about forks.
    code = (
        "import os, signal, numpy as np, deeplab_kernels.densecrf as dcrf\n"
        "import densecrf_cases as models\n"
        "dcrf.set_num_threads(3)\n"
        "case = models.cases()['31 x 33']\n"
        "expected = case(dcrf)['q']\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(50)\n"
        "    os._exit(0 if np.array_equal(case(dcrf)['q'], expected) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert np.array_equal(case(dcrf)['q'], expected)\n"
    )
    run_python(code)


def run_python(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "import deeplab_kernels.densecrf as dcrf\n"
        "from deeplab_kernels.densecrf import eigen\n"
        "from deeplab_kernels.densecrf.utils import unary_from_softmax\n"
        "d = dcrf.DenseCRF2D(4, 3, 2); d.addPairwiseGaussian(3, 3); d.inference(2)\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code) == "False\n"


def test_number_of_threads_from_the_environment() -> None:
    code = "import deeplab_kernels.densecrf as dcrf; print(dcrf.get_num_threads())"
    assert run_python(code, DEEPLAB_KERNELS_NUM_THREADS="3") == "3\n"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run_python(code, DEEPLAB_KERNELS_NUM_THREADS="") == f"{cores}\n"
    with pytest.raises(AssertionError, match="DEEPLAB_KERNELS_NUM_THREADS must be 1 to 1024, got 'many'"):
        run_python(code, DEEPLAB_KERNELS_NUM_THREADS="many")
