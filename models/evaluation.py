"""How good a segmentation is: the confusion matrix, and the intersection over union taken from it."""

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
