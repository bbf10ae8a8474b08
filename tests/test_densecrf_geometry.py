"""The permutohedral lattice's geometry, against its definition (Adams, Baek, Davis 2010, section 3)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _processes import run_python

from deeplab_kernels.densecrf import lattice_embed
from deeplab_kernels.densecrf.lattice import MAX_DIMENSION

DIMENSIONS = [1, 2, 3, 5, 6, 9, MAX_DIMENSION]


def elevation(d: int) -> np.ndarray:
    """(d + 1, d): the map into the hyperplane. Column i is 1 in the first i + 1 rows and -(i + 1) in the next one, then
    scaled to length sqrt(2/3) (d + 1)."""
    matrix = np.zeros((d + 1, d))
    for i in range(d):
        matrix[: i + 1, i] = 1
        matrix[i + 1, i] = -(i + 1)
    return matrix / np.linalg.norm(matrix, axis=0) * np.sqrt(2 / 3) * (d + 1)


def solve_barycentric(keys: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Weights w with sum_k w_k keys_k = point and sum_k w_k = 1."""
    system = np.vstack([keys.T, np.ones(len(keys))])
    return np.linalg.lstsq(system, np.append(point, 1), rcond=None)[0]


def random_features(d: int, points: int = 127, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(d).normal(scale=spread, size=(points, d))


@pytest.mark.parametrize("d", DIMENSIONS)
def test_keys_are_lattice_points_of_every_remainder(d):
    keys, weights = lattice_embed(random_features(d))
    assert keys.shape == (127, d + 1, d + 1)
    assert keys.dtype == np.int32
    assert weights.shape == (127, d + 1)
    assert weights.dtype == np.float64
    assert (keys.sum(axis=2) == 0).all()
    assert (keys % (d + 1) == np.arange(d + 1)[None, :, None]).all()


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 1000.0])
def test_weights_are_barycentric_and_reconstruct_the_position(d, spread):
    features = random_features(d, spread=spread)
    keys, weights = lattice_embed(features)
    tolerance = 1e-13 * max(1, spread) * d
    assert weights.min() >= -tolerance
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    elevated = features @ elevation(d).T
    reconstructed = np.einsum("pk,pki->pi", weights, keys)
    np.testing.assert_allclose(reconstructed, elevated, rtol=0, atol=tolerance * (d + 1) ** 2)
    for p in range(0, 127, 21):
        np.testing.assert_allclose(weights[p], solve_barycentric(keys[p], elevated[p]), rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_each_vertex_is_the_nearest_lattice_point_of_its_remainder(d):
    features = random_features(d, points=33)
    keys, _ = lattice_embed(features)
    elevated = features @ elevation(d).T
    steps = [s for s in itertools.product((-1, 0, 1), repeat=d + 1) if sum(s) == 0 and any(s)]
    others = keys[:, :, None, :] + (d + 1) * np.array(steps)
    distance = np.linalg.norm(keys - elevated[:, None], axis=2)
    other_distance = np.linalg.norm(others - elevated[:, None, None], axis=3)
    assert (distance[:, :, None] < other_distance).all()


@pytest.mark.parametrize("d", DIMENSIONS)
def test_embedding_keeps_distances(d):
    """With sqrt(2/3) (d + 1) as the unit, whatever the matrix of the embedding is."""
    features = random_features(d)
    keys, weights = lattice_embed(features)
    position = np.einsum("pk,pki->pi", weights, keys)
    unit = np.sqrt(2 / 3) * (d + 1)
    expected = np.linalg.norm(features[:, None] - features[None], axis=2) * unit
    np.testing.assert_allclose(np.linalg.norm(position[:, None] - position[None], axis=2), expected, atol=1e-10 * unit)


def test_one_dimension_by_hand():
    """d = 1: vertices every sqrt(3)/2 (= sqrt(2) / (2 sqrt(2/3))), remainders alternating."""
    spacing = np.sqrt(3) / 2
    keys, weights = lattice_embed(np.array([[0.0], [0.25 * spacing], [1.5 * spacing], [-0.75 * spacing]]))
    assert keys[0, 0].tolist() == [0, 0]
    np.testing.assert_allclose(weights, [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], atol=1e-12)
    assert keys[1].tolist() == [[0, 0], [1, -1]]
    assert keys[2].tolist() == [[2, -2], [1, -1]]
    assert keys[3].tolist() == [[0, 0], [-1, 1]]


@pytest.mark.parametrize("d", DIMENSIONS)
def test_a_lattice_point_is_its_own_vertex(d):
    keys, _ = lattice_embed(random_features(d, points=5))
    vertex = keys[:, d // 2]
    features = np.linalg.lstsq(elevation(d), vertex.T.astype(float), rcond=None)[0].T
    _, weights = lattice_embed(features)
    assert np.allclose(np.sort(weights, axis=1)[:, -1], 1, atol=1e-9)


@pytest.mark.parametrize("convert", [np.float32, np.int64, np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2], list])
def test_any_real_array(convert):
    features = np.round(random_features(3, points=33))
    keys, weights = lattice_embed(convert(features))
    expected_keys, expected_weights = lattice_embed(features)
    np.testing.assert_array_equal(keys, expected_keys)
    np.testing.assert_array_equal(weights, expected_weights)


@pytest.mark.parametrize("d", [1, 5])
def test_no_points(d):
    keys, weights = lattice_embed(np.empty((0, d)))
    assert keys.shape == (0, d + 1, d + 1)
    assert weights.shape == (0, d + 1)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (np.zeros(3), ValueError, r"features must have shape \(points, d\), got \(3,\)"),
        (np.zeros((2, 3, 4)), ValueError, r"got \(2, 3, 4\)"),
        (np.zeros((2, 0)), ValueError, r"1 to 16 columns .* got \(2, 0\)"),
        (np.zeros((2, 17)), ValueError, r"1 to 16 columns .* got \(2, 17\)"),
        (np.zeros((2, 3), complex), TypeError, "features must be real numbers, got an array of complex128"),
        ([["a", "b"]], TypeError, "features must be real numbers"),
        ([[0.0, 1.0], [np.nan, 0.0]], ValueError, r"features\[1, 0\] is NaN or infinite"),
        ([[0.0, -np.inf]], ValueError, r"features\[0, 1\] is NaN or infinite"),
        ([[1e9, 0.0]], ValueError, r"features\[0, 0\] is too far from 0"),
    ],
)
def test_bad_input(features, error, message):
    with pytest.raises(error, match=message):
        lattice_embed(features)


def test_large_features_do_not_wrap():
    d = MAX_DIMENSION
    features = np.full((1, d), 1e6) * np.where(np.arange(d) % 2, 1, -1)
    keys, weights = lattice_embed(features)
    assert (keys.astype(np.int64).sum(axis=2) == 0).all()
    np.testing.assert_allclose(np.einsum("pk,pki->pi", weights, keys), features @ elevation(d).T, rtol=1e-9)


def test_imports_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from deeplab_kernels.densecrf import lattice_embed\n"
        "print(lattice_embed([[0.3, 0.4]])[1].sum())"
    )
    assert float(run_python(code)) == pytest.approx(1)
