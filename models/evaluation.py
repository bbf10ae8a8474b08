"""How good a segmentation is: the confusion matrix, the intersection over union taken from it, and the same near the
boundaries alone (trimap)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .data import IGNORE, Scene, to_input


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
        p, t = _labels(prediction, "prediction"), _labels(target, "target")
        if p.shape != t.shape:
            raise ValueError(f"prediction {p.shape} and target {t.shape} must have the same shape")
        counted = t != self.ignore_index
        p, t = p[counted].astype(np.int64), t[counted].astype(np.int64)
        for name, labels in (("prediction", p), ("target", t)):
            if labels.size and (labels.min() < 0 or labels.max() >= self.num_classes):
                raise ValueError(
                    f"{name} has labels from {labels.min()} to {labels.max()}; allowed are 0 to {self.num_classes - 1}"
                )
        flat = np.bincount(t * self.num_classes + p, minlength=self.num_classes**2)
        self.counts += flat.reshape(self.num_classes, self.num_classes)

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
        total = int(self.counts.sum())
        return float(np.trace(self.counts)) / total if total else float("nan")


def boundary_distance(labels: Any, limit: int) -> NDArray[np.int64]:
    """For every pixel of a label map (H, W) of integers the smallest b such that the square of 2b + 1 pixels around it
    holds a label other than its own (Chebyshev distance); ``limit + 1`` where that takes more than ``limit``.

    The label of pixels to be ignored counts here as one more label: in PASCAL VOC it is drawn along the boundaries.
    """
    own = _labels(labels, "labels").astype(np.int64)
    if own.ndim != 2:
        raise ValueError(f"labels must have shape (H, W), got {own.shape}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    distance = np.full(own.shape, limit + 1, np.int64)
    low, high = own, own  # smallest and largest label within the square
    for b in range(1, limit + 1):
        low, high = _around(np.minimum, low), _around(np.maximum, high)
        reached = (low != high) & (distance > limit)
        distance[reached] = b
    return distance


def _around(extremum: np.ufunc, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest or largest of each pixel and its eight neighbours."""
    for axis in (0, 1):
        out = values.copy()
        low, high = (np.moveaxis(a, axis, 0) for a in (values, out))
        extremum(high[1:], low[:-1], out=high[1:])
        extremum(high[:-1], low[1:], out=high[:-1])
        values = out
    return values


def trimap_miou(
    predictions: Sequence[Any],
    targets: Sequence[Any],
    widths: Sequence[int],
    num_classes: int,
    ignore_index: int = IGNORE,
) -> list[float]:
    """Mean IoU over the pixels within b pixels of a boundary of the true labels, for every b of ``widths``.

    That is the DeepLab papers' measure of how well boundaries are kept (v3+: section 4.2, b = 1 to 40). Boundaries and
    distances are those of :func:`boundary_distance`; pixels labelled ``ignore_index`` are not counted. One confusion
    matrix is summed over all images, as for the mean IoU.

    Args:
        predictions, targets: label maps (H, W) of integers, in pairs of one shape.
        widths: each at least 1.

    Returns:
        One value for each width; NaN where no pixel is so near to a boundary.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"predictions and targets must be as many, got {len(predictions)} and {len(targets)}")
    if any(width < 1 for width in widths):
        raise ValueError(f"widths must be at least 1, got {list(widths)}")
    matrices = [ConfusionMatrix(num_classes, ignore_index) for _ in widths]
    for prediction, target in zip(predictions, targets, strict=True):
        p, t = _labels(prediction, "prediction"), _labels(target, "target")
        if p.shape != t.shape:
            raise ValueError(f"prediction {p.shape} and target {t.shape} must have the same shape")
        distance = boundary_distance(t, max(widths, default=1))
        for width, matrix in zip(widths, matrices, strict=True):
            near = distance <= width
            matrix.update(p[near], t[near])
    return [matrix.mean_iou() for matrix in matrices]


def _labels(value: Any, name: str) -> NDArray[np.integer[Any]]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    scenes: Sequence[Scene],
    num_classes: int,
    *,
    batch_size: int = 4,
    on_batch: Callable[[int], object] = lambda images: None,
) -> tuple[ConfusionMatrix, list[NDArray[np.uint8]]]:
    """Segments every scene (all of one size) with the model in evaluation mode.

    Args:
        on_batch: called with the number of images just done.

    Returns:
        The confusion matrix over all scenes, and the predicted label maps (H, W) in their order.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    matrix, predictions = ConfusionMatrix(num_classes), []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(scenes), batch_size):
            batch = [scenes[i] for i in range(start, min(start + batch_size, len(scenes)))]
            logits = model(to_input(np.stack([scene.image for scene in batch])).to(device))
            labels = logits.argmax(1).to(torch.uint8).cpu().numpy()
            matrix.update(labels, np.stack([scene.labels for scene in batch]))
            predictions += list(labels)
            on_batch(len(batch))
    finally:
        model.train(was_training)
    return matrix, predictions
