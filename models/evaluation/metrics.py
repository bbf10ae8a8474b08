"""How good a segmentation is: the confusion matrix, and what is taken from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data import IGNORE


class ConfusionMatrix:
    """``counts[i, j]``: pixels of true class i that were called j, exact integers. Pixels whose true label is
    ``ignore_index`` are left out, whatever was predicted there."""

    def __init__(self, num_classes: int, ignore_index: int = IGNORE) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: Any, target: Any) -> None:
        """Adds two label maps (arrays or tensors of integers) of one shape.

        Raises:
            ValueError: the shapes differ, or a counted label lies outside 0 .. num_classes - 1.
        """
        p, t = label_pair(prediction, target)
        counted = t != self.ignore_index
        pairs = class_pairs(p[counted], t[counted], self.num_classes)
        self.counts += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.counts.shape)

    def iou(self) -> NDArray[np.float64]:
        """(num_classes,): intersection / union; NaN for a class that neither occurs nor was predicted."""
        intersection = np.diag(self.counts).astype(np.float64)
        union = self.counts.sum(0) + self.counts.sum(1) - np.diag(self.counts)
        return np.divide(intersection, union, out=np.full(self.num_classes, np.nan), where=union > 0)

    def mean_iou(self) -> float:
        """Mean of :meth:`iou` over the classes that have one; NaN without any pixel."""
        iou = self.iou()
        return float(np.mean(iou[~np.isnan(iou)])) if not np.isnan(iou).all() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that have the right class; NaN without any."""
        total = int(self.counts.sum())
        return float(np.trace(self.counts)) / total if total else float("nan")

    def frequency_weighted_iou(self) -> float:
        """Mean of :meth:`iou` weighted by how many pixels have the class (FCN: arXiv:1411.4038); NaN without any."""
        frequency = self.counts.sum(1)
        total = int(frequency.sum())
        return float(np.nansum(frequency * self.iou()) / total) if total else float("nan")


def label_pair(prediction: Any, target: Any) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    """Two label maps (arrays or tensors of integers) as arrays.

    Raises:
        ValueError: their shapes differ.
    """
    p, t = as_labels(prediction, "prediction"), as_labels(target, "target")
    if p.shape != t.shape:
        raise ValueError(f"prediction {p.shape} and target {t.shape} must have the same shape")
    return p, t


def class_pairs(
    prediction: NDArray[np.integer[Any]], target: NDArray[np.integer[Any]], num_classes: int
) -> NDArray[np.int64]:
    """``target * num_classes + prediction`` of every pixel.

    Raises:
        ValueError: a label lies outside 0 .. num_classes - 1.
    """
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"{name} has labels from {labels.min()} to {labels.max()}; allowed are 0 to {num_classes - 1}"
            )
    return target.astype(np.int64) * num_classes + prediction.astype(np.int64)


def as_labels(value: Any, name: str) -> NDArray[np.integer[Any]]:
    """``value`` as an array of integers; TypeError if it holds anything else."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array
