"""deeplab_kernels.densecrf.utils."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import densecrf_cases as models
import numpy as np
import pytest
from _densecrf import volume

import deeplab_kernels.densecrf as dcrf
from deeplab_kernels.densecrf import utils

pytestmark = pytest.mark.usefixtures("two_densecrf_threads")


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
