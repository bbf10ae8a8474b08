"""The mean IoU near the boundaries alone (trimap): how well a segmentation keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import IGNORE
from .metrics import ConfusionMatrix, as_labels, class_pairs, label_pair

PAPER_WIDTHS = tuple(range(1, 41))  # the DeepLab papers' curves


class TrimapCurve:
    """Confusion matrices of the pixels within b pixels of a boundary of the true labels, for every b of ``widths``:
    the DeepLab papers' measure of how well boundaries are kept (v3+: section 4.2, b = 1 to 40).

    Boundaries and distances are those of :func:`boundary_distance`; pixels labelled ``ignore_index`` are not counted.
    One confusion matrix for each width is summed over all images, so that memory does not grow with their number.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = PAPER_WIDTHS, ignore_index: int = IGNORE) -> None:
        if any(width < 1 for width in widths):
            raise ValueError(f"widths must be at least 1, got {list(widths)}")
        self.num_classes, self.widths, self.ignore_index = num_classes, tuple(widths), ignore_index
        self._bands = np.unique(np.array(self.widths, np.int64))
        # Of the pixels between one width and the next smaller one.
        self._counts = np.zeros((len(self._bands), num_classes, num_classes), np.int64)

    def update(self, prediction: Any, target: Any) -> None:
        """Adds an image: two label maps (H, W), arrays or tensors of integers.

        Raises:
            ValueError: the shapes differ, or a counted label lies outside 0 .. num_classes - 1.
        """
        p, t = label_pair(prediction, target)
        limit = int(self._bands[-1]) if len(self._bands) else 1
        distance = boundary_distance(t, limit)
        counted = (distance <= limit) & (t != self.ignore_index)
        pairs = class_pairs(p[counted], t[counted], self.num_classes)
        if len(self._bands):
            band = np.searchsorted(self._bands, distance[counted])
            flat = np.bincount(band * self.num_classes**2 + pairs, minlength=self._counts.size)
            self._counts += flat.reshape(self._counts.shape)

    def matrices(self) -> list[ConfusionMatrix]:
        """One for each width, in their order."""
        summed, out = np.cumsum(self._counts, 0), []
        for width in self.widths:
            matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
            matrix.counts[:] = summed[np.searchsorted(self._bands, width)]
            out.append(matrix)
        return out

    def mean_iou(self) -> list[float]:
        """One value for each width; NaN where no pixel is so near to a boundary."""
        return [matrix.mean_iou() for matrix in self.matrices()]


def trimap_miou(
    predictions: Sequence[Any],
    targets: Sequence[Any],
    widths: Sequence[int],
    num_classes: int,
    ignore_index: int = IGNORE,
) -> list[float]:
    """:class:`TrimapCurve` of label maps (H, W) of integers, in pairs of one shape: one value for each width.

    Raises:
        ValueError: not as many of both, other shapes, labels out of range, or a width below 1.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"predictions and targets must be as many, got {len(predictions)} and {len(targets)}")
    curve = TrimapCurve(num_classes, widths, ignore_index)
    for prediction, target in zip(predictions, targets, strict=True):
        curve.update(prediction, target)
    return curve.mean_iou()


def boundary_distance(labels: Any, limit: int) -> NDArray[np.int64]:
    """For every pixel of a label map (H, W) of integers the smallest b such that the square of 2b + 1 pixels around it
    holds a label other than its own (Chebyshev distance); ``limit + 1`` where that takes more than ``limit``.

    The label of pixels to be ignored counts here as one more label: in PASCAL VOC it is drawn along the boundaries.

    Raises:
        ValueError: another shape, or a limit below 1.
    """
    own = as_labels(labels, "labels")
    if own.ndim != 2:
        raise ValueError(f"labels must have shape (H, W), got {own.shape}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    distance = np.full(own.shape, limit + 1, np.int64)
    # The nearest pixel of another label is one step beyond the nearest pixel that touches another label.
    near = _around(np.minimum, own) != _around(np.maximum, own)
    for b in range(limit):
        near = _around(np.logical_or, near) if b else near
        distance -= near
        if near.all():
            distance -= limit - 1 - b
            break
    return distance


def _around(extremum: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
    """The smallest, the largest or any of each pixel and its eight neighbours."""
    for axis in (0, 1):
        out = values.copy()
        low, high = (np.moveaxis(a, axis, 0) for a in (values, out))
        extremum(high[1:], low[:-1], out=high[1:])
        extremum(high[:-1], low[1:], out=high[:-1])
        values = out
    return values
