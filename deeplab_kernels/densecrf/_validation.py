"""What arguments of the numpy interface may be. Errors name the argument, what was given and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _densecrf


def integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def real_array(name: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got an array of {array.dtype}")
    return array


def float_array(name: str, value: ArrayLike) -> NDArray[np.float32]:
    array = real_array(name, value)
    with np.errstate(over="ignore"):  # too large for float32: infinite, which is reported as such where it matters
        array = array.astype(np.float32, copy=False)
    return array if array.flags.aligned else array.copy()


def sigmas(name: str, value: Any, count: int) -> list[float]:
    """``count`` standard deviations, given as that many numbers or as one for all."""
    array = real_array(name, value)
    if array.ndim == 0:
        array = array.repeat(count)
    if array.shape != (count,):
        raise ValueError(f"{name} must be a number or {count} numbers, got {value!r}")
    numbers = [float(s) for s in array]
    # In float32, with which the kernels compute.
    if not (float_array(name, array) > 0).all():
        raise ValueError(f"{name} must be greater than 0, got {value!r}")
    return numbers


def compatibility(compat: Any, labels: int) -> NDArray[np.float32]:
    """The (labels, labels) matrix C of the pairwise term C F Q that is added to the energy, as pydensecrf defines it.

    A number w is Potts: -w on the diagonal. A vector is the diagonal itself. Of a matrix the symmetric part counts.
    """
    array = float_array("compat", compat)
    if not np.isfinite(array).all():
        raise ValueError("compat must be finite, got NaN or infinity")
    if array.ndim == 0:
        return np.diag(np.full(labels, -array, np.float32))
    if array.shape == (labels,):
        return np.diag(array)
    if array.shape == (labels, labels):
        return (array + array.T) / np.float32(2)
    raise ValueError(
        f"compat must be a number or have shape ({labels},) or ({labels}, {labels}) (nlabels is {labels}), got shape "
        f"{array.shape}"
    )


def usable(lattice: _densecrf.Lattice, names: Sequence[tuple[str, ...]], show: Any) -> _densecrf.Lattice:
    """``lattice``, unless its features had a problem: then a ValueError that names the arguments behind the axis.

    ``names`` has the arguments that make up the feature of an axis; ``show(axis, point)`` says which element it is.
    """
    if lattice.problem is None:
        return lattice
    too_large, axis, point, limit = lattice.problem
    where = show(axis, point)
    if too_large:
        raise ValueError(
            f"{' / '.join(names[axis])} is too far from 0 for the lattice at {where}: in units of the standard "
            f"deviation it must stay below about {limit:.4g}"
        )
    raise ValueError(f"{names[axis][0]} is NaN or infinite at {where}")
