"""Where points lie on the permutohedral lattice."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _densecrf

MAX_DIMENSION = _densecrf.MAX_DIMENSION


def lattice_embed(features: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The d + 1 lattice vertices that enclose each point, and the point's barycentric weights among them.

    The lattice A*_d lies in the hyperplane of R^(d+1) whose coordinates sum to 0. Its points have integer coordinates
    that are all congruent modulo d + 1; of the vertices that enclose a point one has each remainder. Features are
    rotated into the hyperplane and scaled by (d + 1) sqrt(2/3), so that a blur with the taps [1/4, 1/2, 1/4] along each
    of the d + 1 lattice directions, together with splatting and slicing, has about unit standard deviation.
    (Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010, section 3.)

    Args:
        features: (points, d) real numbers, d = 1 to 16, in units of the kernel's standard deviation; used as float64.

    Returns:
        keys (points, d + 1, d + 1) int32: ``keys[p, k]`` are the coordinates of the vertex with remainder k.
        weights (points, d + 1) float64: not negative up to rounding, and they sum to 1.

    Raises:
        TypeError: features are no real numbers.
        ValueError: features have a wrong shape, or some are NaN, infinite or so large that a coordinate exceeds int32.
    """
    array: NDArray[Any] = np.asarray(features)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"features must be real numbers, got an array of {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"features must have shape (points, d), got {array.shape}")
    if not 1 <= array.shape[1] <= MAX_DIMENSION:
        raise ValueError(f"features must have 1 to {MAX_DIMENSION} columns (shape (points, d)), got {array.shape}")
    return _densecrf.lattice_embed(np.ascontiguousarray(array, dtype=np.float64))
