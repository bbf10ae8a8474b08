"""deeplab_kernels.densecrf against the definition: mean field on the lattice, in float64."""

from __future__ import annotations

from typing import Any

import densecrf_cases as models
import numpy as np
import pytest
from _densecrf import assert_same, volume
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf
from deeplab_kernels.densecrf import lattice_embed, utils

pytestmark = pytest.mark.usefixtures("two_densecrf_threads")


def test_kernels_of_a_volume() -> None:
    shape = (5, 6, 7)
    d = dcrf.DenseCRF(210, 2)
    d.setUnaryEnergy(models.unary(2, 210))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian((1.0, 2.0, 3.0), shape), compat=3, kernel=dcrf.FULL_KERNEL)
    assert_same(d.inference(3), reference(models.unary(2, 210), [(volume(shape).T / [1, 2, 3], -3 * np.eye(2), 3)], 3))


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
