"""Evaluation of a model on a dataset, one batch after the other: memory does not grow with the dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..data import Scene, Scenes
from ..inference import Inference, Labels, batches_of_one_size, predict_labels
from .metrics import ConfusionMatrix
from .trimap import TrimapCurve


@dataclass(frozen=True)
class Quality:
    """matrix: over every counted pixel. trimap: over those near boundaries."""

    matrix: ConfusionMatrix
    trimap: TrimapCurve

    @classmethod
    def empty(cls, num_classes: int, widths: Sequence[int] = ()) -> Quality:
        """Before the first image; widths: of the trimap, in pixels."""
        return cls(ConfusionMatrix(num_classes), TrimapCurve(num_classes, widths))

    def update(self, prediction: Any, target: Any) -> None:
        """Counts a pair of label maps (H, W) of integers."""
        self.matrix.update(prediction, target)
        if self.trimap.widths:
            self.trimap.update(prediction, target)

    def summary(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON; None instead of NaN, where there is nothing to divide by."""
        matrix = self.matrix
        return {
            "mean_iou": _plain(matrix.mean_iou()),
            "pixel_accuracy": _plain(matrix.pixel_accuracy()),
            "frequency_weighted_iou": _plain(matrix.frequency_weighted_iou()),
            "iou": {name: _plain(value) for name, value in zip(class_names, matrix.iou(), strict=True)},
            "trimap": {
                "widths": list(self.trimap.widths),
                "mean_iou": [_plain(value) for value in self.trimap.mean_iou()],
            },
            "confusion": matrix.counts.tolist(),
        }


@dataclass(frozen=True)
class Evaluation:
    """final: what was predicted in the end. network: the same before the CRF, None where there was no CRF."""

    images: int
    final: Quality
    network: Quality | None = None

    @property
    def matrix(self) -> ConfusionMatrix:
        return self.final.matrix

    @property
    def trimap(self) -> TrimapCurve:
        return self.final.trimap

    def stages(self) -> dict[str, Quality]:
        """By name, in the order of prediction: "network" and "crf", or "network" alone."""
        return {"network": self.final} if self.network is None else {"network": self.network, "crf": self.final}


def evaluate(
    model: nn.Module,
    scenes: Scenes,
    num_classes: int,
    inference: Inference | None = None,
    *,
    trimap_widths: Sequence[int] = (),
    on_batch: Callable[[int], object] = lambda images: None,
    on_image: Callable[[int, Scene, Labels], object] = lambda index, scene, labels: None,
) -> Evaluation:
    """Segments every scene and compares it with its labels, at the scene's own size.

    No more than ``inference.batch_size`` scenes and the next one are in memory at once. Consecutive scenes of one size
    go through the network together; where sizes differ, each goes alone, not padded (the papers' code pads all images
    of PASCAL VOC to 513 x 513, which the image pooling of the ASPP notices).

    Args:
        model: as for :func:`deeplab_kernels.models.inference.predict_scores`.
        trimap_widths: of :class:`TrimapCurve`.
        on_batch: called with the number of images just done.
        on_image: called with (index, scene, its label maps (H, W)), to keep or to draw what is wanted.

    Raises:
        ValueError: no scenes; a label outside 0 .. num_classes - 1 that is not 255 (the message names the image).
    """
    inference = inference or Inference(batch_size=4)
    if len(scenes) == 0:
        raise ValueError("scenes must not be empty")
    final = Quality.empty(num_classes, trimap_widths)
    network = Quality.empty(num_classes, trimap_widths) if inference.crf is not None else None
    numbered = ((index, scenes[index]) for index in range(len(scenes)))
    for batch in batches_of_one_size(numbered, inference.batch_size, lambda item: item[1].image.shape):
        predicted = predict_labels(model, np.stack([scene.image for _, scene in batch]), inference)
        for (index, scene), last, first in zip(batch, predicted.final, predicted.network, strict=True):
            try:
                final.update(last, scene.labels)
                if network is not None:
                    network.update(first, scene.labels)
            except ValueError as error:
                raise ValueError(f"image {name_of(scenes, index)}: {error}") from None
            on_image(index, scene, Labels(last, first))
        del scene, predicted
        done = len(batch)
        batch.clear()  # before the next one is read
        on_batch(done)
    return Evaluation(len(scenes), final, network)


def name_of(scenes: Any, index: int) -> str:
    """The dataset's name of an item, or its number."""
    names = getattr(scenes, "names", None)
    return str(names[index]) if names is not None else str(index)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
