"""What the tests of deeplab_kernels.densecrf share."""

from __future__ import annotations

from typing import Any

import densecrf_cases as models
import numpy as np
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf


def assert_same(ours: NDArray[Any], theirs: NDArray[Any], atol: float = 1e-3) -> None:
    """The promise: |dQ| <= 1e-3 and the same labels on 99.9 % of the points, where they are decided at all."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    if ours.size:
        top = np.sort(theirs, axis=0)
        decided = top[-1] - top[-2] > 1e-4 if len(top) > 1 else np.ones(top.shape[1], bool)
        assert (ours.argmax(0) != theirs.argmax(0))[decided].sum() <= 0.001 * ours.shape[1]


def model(size: tuple[int, int] = (13, 17), labels: int = 4) -> Any:
    height, width = size
    d = dcrf.DenseCRF2D(width, height, labels)
    d.setUnaryEnergy(models.unary(labels, height * width))
    d.addPairwiseGaussian(3, 3)
    d.addPairwiseBilateral(20, 13, models.image(height, width), 10)
    return d


def volume(shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(len(shape), -1).astype(np.float64)
