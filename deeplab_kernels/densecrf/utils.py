"""Unary energies and features for the dense CRF: pydensecrf.utils by another name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _validation as check


def unary_from_labels(
    labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> NDArray[np.float32]:
    """Unary energies of an annotation that is right with probability ``gt_prob``.

    The annotated label gets -log(gt_prob), each other one -log((1 - gt_prob) / (n_labels - 1)).

    Args:
        labels: integers of any shape.
        n_labels: how many labels there are; with ``zero_unsure`` the 0 is not one of them.
        gt_prob: between 0 and 1, both excluded.
        zero_unsure: label 0 means "unknown": all labels are equally likely there, and label k of the annotation is
            number k - 1 of the result. Otherwise 0 is a label as any other.

    Returns:
        (n_labels, points) float32.

    Raises:
        TypeError: labels are no integers.
        ValueError: a label is negative or too large; n_labels < 1; gt_prob not between 0 and 1.
    """
    count = check.integer("n_labels", n_labels, 1)
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be between 0 and 1 (both excluded), got {gt_prob}")
    array = np.asarray(labels)
    if array.dtype.kind not in "biu":
        raise TypeError(f"labels must be integers, got an array of {array.dtype}")
    flat = array.reshape(-1).astype(np.int64)
    largest = count if zero_unsure else count - 1
    if flat.size and (flat.min() < 0 or flat.max() > largest):
        wrong = flat.min() if flat.min() < 0 else flat.max()
        raise ValueError(
            f"labels must be 0 to {largest} (n_labels is {count}, zero_unsure is {bool(zero_unsure)}), got {wrong}"
        )
    other = -math.log((1 - gt_prob) / (count - 1)) if count > 1 else 0.0
    unary = np.full((count, flat.size), other, np.float32)
    points = np.flatnonzero(flat) if zero_unsure else np.arange(flat.size)
    unary[flat[points] - bool(zero_unsure), points] = -math.log(gt_prob)
    if zero_unsure:
        unary[:, flat == 0] = math.log(count)
    return unary


def unary_from_softmax(sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5) -> NDArray[np.float32]:
    """Unary energies -log(probability) of a network's softmax output.

    Args:
        sm: probabilities, labels first: (n_labels, ...).
        scale: how far the probabilities are trusted, 0 < scale <= 1: scale * sm + (1 - scale) / n_labels is used.
        clip: probabilities below are raised to this value (and those above 1 lowered to 1), because the energy of 0 is
            infinite; None for no clipping.

    Returns:
        (n_labels, points) float32.

    Raises:
        TypeError: sm holds no real numbers.
        ValueError: sm has no dimension or no label, or holds NaN or infinity; scale is out of range.
    """
    array = check.real_array("sm", sm)
    if array.ndim == 0 or array.shape[0] == 0:
        raise ValueError(f"sm must have the labels as its first dimension, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("sm must be finite, got NaN or infinity")
    labels = array.shape[0]
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be greater than 0 and at most 1, got {scale}")
        array = scale * array + np.float64((1 - scale) / labels)
    if clip is not None:
        array = np.clip(array, clip, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(array).reshape(labels, array[0].size).astype(np.float32)


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> NDArray[np.float32]:
    """The old name of `unary_from_labels`."""
    warnings.warn("compute_unary is deprecated: use unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> NDArray[np.float32]:
    """The old name of `unary_from_softmax`, without clipping."""
    warnings.warn("softmax_to_unary is deprecated: use unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def create_pairwise_gaussian(sdims: Any, shape: Sequence[int]) -> NDArray[np.float32]:
    """Features of a Gaussian kernel over positions, for an image of any number of dimensions.

    Args:
        sdims: standard deviation along each dimension of ``shape`` (or one for all), in pixels.
        shape: of the image. Where `DenseCRF2D` takes (x, y), this takes them in the order of ``shape``: (y, x).

    Returns:
        (dimensions, points) float32, points in C order.

    Raises:
        ValueError: the number of sdims differs from that of dimensions, or one is not greater than 0.
    """
    sizes = [check.integer("shape", size, 0) for size in shape]
    sigmas = check.sigmas("sdims", sdims, len(sizes))
    features = np.empty((len(sizes), *sizes), np.float32)
    for axis, (size, sigma) in enumerate(zip(sizes, sigmas, strict=True)):
        position = np.arange(size, dtype=np.float32) / np.float32(sigma)
        features[axis] = position.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    return features.reshape(len(sizes), math.prod(sizes))


def create_pairwise_bilateral(sdims: Any, schan: Any, img: ArrayLike, chdim: int = -1) -> NDArray[np.float32]:
    """Features of a bilateral kernel over positions and values, for an image of any number of dimensions and channels.

    Args:
        sdims: standard deviation along each dimension of the image, channels left out (or one for all), in pixels.
        schan: standard deviation of each channel (or one for all), in units of the image's values.
        img: the image, any real type.
        chdim: which dimension has the channels; -1 (the default): the image has one channel and no dimension for it.

    Returns:
        (dimensions + channels, points) float32, points in C order.

    Raises:
        TypeError: img holds no real numbers.
        ValueError: no such dimension; the number of sdims or schan differs from that of dimensions or channels, or one
            is not greater than 0.
    """
    image = check.float_array("img", img)
    if chdim == -1:
        image = image[np.newaxis]
    elif -image.ndim <= chdim < image.ndim:
        image = np.moveaxis(image, chdim, 0)
    else:
        raise ValueError(f"chdim must be a dimension of img or -1, got {chdim} for an image of shape {image.shape}")
    channels, points = image.shape[0], math.prod(image.shape[1:])
    sigmas = np.array(check.sigmas("schan", schan, channels), np.float32)
    values = image.reshape(channels, points) / sigmas[:, np.newaxis]
    return np.concatenate([create_pairwise_gaussian(sdims, image.shape[1:]), values])
