"""pydensecrf.eigen's conversions. Matrices of this package are numpy arrays, so that there is nothing to convert."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _validation as check

__all__ = ["matrixXf", "vectorXf"]


def matrixXf(arr: ArrayLike) -> NDArray[np.float32]:
    """A float32 copy of a matrix; ValueError unless it has 2 dimensions."""
    return _copy(arr, 2)


def vectorXf(arr: ArrayLike) -> NDArray[np.float32]:
    """A float32 copy of a vector; ValueError unless it has 1 dimension."""
    return _copy(arr, 1)


def _copy(arr: ArrayLike, dimensions: int) -> NDArray[np.float32]:
    array = check.float_array("arr", arr)
    if array.ndim != dimensions:
        raise ValueError(f"arr must have {dimensions} dimension(s), got shape {array.shape}")
    return array.copy()
