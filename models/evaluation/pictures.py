"""The images that a model segments worst, and where it goes wrong."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.demo.pictures import faint, side_by_side

from ..data import IGNORE, Scene
from .metrics import ConfusionMatrix
from .trimap import boundary_distance

_IGNORED = (224, 224, 192)  # as in PASCAL VOC's label maps
_AT_BOUNDARY, _ELSEWHERE = (220, 30, 30), (255, 170, 0)


class Segmented(NamedTuple):
    """mean_iou: of this image alone. position: in the dataset. labels: (H, W), as predicted."""

    mean_iou: float
    position: int
    scene: Scene
    labels: NDArray[np.uint8]


class WorstImages:
    """Keeps the ``count`` images of lowest mean IoU; an image without counted pixels is left out."""

    def __init__(self, count: int, num_classes: int) -> None:
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        self.count, self.num_classes = count, num_classes
        self._heap: list[tuple[float, int, Segmented]] = []

    def add(self, position: int, scene: Scene, labels: NDArray[np.uint8]) -> None:
        """Image number ``position`` of the dataset and its predicted label map (H, W)."""
        matrix = ConfusionMatrix(self.num_classes)
        matrix.update(labels, scene.labels)
        value = matrix.mean_iou()
        if np.isnan(value) or self.count == 0:
            return
        entry = (-value, -position, Segmented(value, position, scene, labels.copy()))
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def worst_first(self) -> list[Segmented]:
        """Of equal ones the earlier first."""
        return [segmented for *_, segmented in sorted(self._heap, reverse=True)]


def boundary_picture(
    scene: Scene, labels: NDArray[np.uint8], palette: Sequence[Sequence[int]], width: int = 5
) -> bytes:
    """Image, true labels, prediction and errors in a row, as a PNG.

    The errors are red within ``width`` pixels of a true boundary, orange elsewhere; the image under them is faint.
    """
    colours = np.empty((256, 3), np.uint8)
    colours[:] = _IGNORED
    colours[: len(palette)] = palette
    wrong = (scene.labels != IGNORE) & (scene.labels != labels)
    near = boundary_distance(scene.labels, width) <= width
    grey = faint(scene.image)
    grey[near] = grey[near] // 4 * 3
    grey[wrong & near], grey[wrong & ~near] = _AT_BOUNDARY, _ELSEWHERE
    return side_by_side([scene.image, colours[scene.labels], colours[labels], grey])
