"""Prediction as the DeepLab papers do it: softmax probabilities averaged over scales and mirror images, at any output
stride, by windows where an image does not fit, and refined by a dense CRF."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .data import to_input
from .refinement import CRFParameters, energy_of_scores, most_probable, refine
from .system import SYMMETRIC, evaluation_mode
from .tiling import Window, check_window, windows

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the papers' multi-scale results on PASCAL VOC
_SMALLEST_SIDE = 33  # smaller images are continued by their border: below that the deepest feature map is one pixel

Item = TypeVar("Item")
Progress = Callable[[int, int], object]


def _silent(done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Inference:
    """How images are predicted.

    scales: the network sees the image enlarged by each; n pixels become int((n - 1) scale + 1), corners aligned, as in
        the papers' code. The logits are resized back, and their softmax is averaged.
    flip: the same of the mirrored image, mirrored back, counts in the average, too.
    window: the image is cut into windows of this side (before it is scaled), so that memory does not grow with it;
        None: it is taken whole. A window knows nothing of the rest of the image.
    margin: pixels that a window sees beyond those whose result is kept; by default an eighth of the window.
    output_stride: set for the prediction, and set back; None: the model's own.
    crf: refines the averaged probabilities, each image by itself.
    batch_size: images of one size, or windows, that go through the network at once.

    Raises:
        ValueError: a scale that is not positive, no scales, a margin that is no less than half the window.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    margin: int | None = None
    output_stride: int | None = None
    crf: CRFParameters | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be finite and positive, at least one of them, got {self.scales}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        check_window(self.window, self.seen_margin)

    @property
    def seen_margin(self) -> int:
        return self.margin if self.margin is not None else (self.window or 0) // 8


class Labels(NamedTuple):
    """final: (N, H, W) uint8, or (H, W) of one image. network: the same before the CRF, or ``final`` without one."""

    final: NDArray[np.uint8]
    network: NDArray[np.uint8]


def predict_scores(
    model: nn.Module,
    images: NDArray[np.uint8],
    *,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    margin: int | None = None,
    output_stride: int | None = None,
    crf: CRFParameters | None = None,
    batch_size: int = 1,
    on_window: Progress = _silent,
    on_iteration: Progress = _silent,
) -> NDArray[np.float32]:
    """Class probabilities (N, K, H, W) of RGB images (N, H, W, 3), or of one (H, W, 3), that sum to 1 over K.

    The model sees ``model.normalization`` of the image on its own device and in its own dtype, in evaluation mode;
    training mode and output stride are what they were afterwards.

    Args:
        scales, flip, window, margin, output_stride, crf, batch_size: see :class:`Inference`.
        on_window, on_iteration: called with (windows, or the CRF's iterations, done; the same in all).

    Raises:
        ValueError: a senseless setting, an output stride that the model does not have, scores that are not finite.
        UserError: too little memory for the CRF.
    """
    settings = Inference(scales, flip, window, margin, output_stride, crf, batch_size)
    return inferred_scores(model, images, settings, on_window, on_iteration)


def inferred_scores(
    model: nn.Module,
    images: NDArray[np.uint8],
    settings: Inference,
    on_window: Progress = _silent,
    on_iteration: Progress = _silent,
) -> NDArray[np.float32]:
    """:func:`predict_scores` with its settings as one object."""
    images = _as_batch(images)
    scores = _network_scores(model, images, settings, on_window)
    if settings.crf is not None:
        for n, image in enumerate(images):
            scores[n] = refined(image, scores[n], settings.crf, device_of(model), on_iteration)
    return scores


def predict_labels(
    model: nn.Module,
    images: NDArray[np.uint8],
    settings: Inference,
    on_window: Progress = _silent,
    on_iteration: Progress = _silent,
) -> Labels:
    """The most probable class of every pixel of images (N, H, W, 3), or of one (H, W, 3), before and after the CRF.

    Without a CRF the scores are held for one window at a time.
    """
    images = _as_batch(images)
    if settings.crf is None:
        labels = np.empty(images.shape[:3], np.uint8)
        with _prepared(model, settings):
            for n, window, part in _parts(model, images, settings, on_window, order_only=True):
                labels[n, window.rows, window.columns] = part.argmax(0).to(torch.uint8).cpu().numpy()
        return Labels(labels, labels)
    scores = _network_scores(model, images, settings, on_window)
    final = np.empty(images.shape[:3], np.uint8)
    network = np.empty_like(final)
    for n, image in enumerate(images):
        network[n] = most_probable(scores[n])
        final[n] = most_probable(refined(image, scores[n], settings.crf, device_of(model), on_iteration))
    return Labels(final, network)


def refined(
    image: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    crf: CRFParameters,
    device: torch.device | str = "cpu",
    on_iteration: Progress = _silent,
) -> NDArray[np.float32]:
    """The CRF's probabilities (K, H, W) for those of a network (K, h, w), which are resized to the image."""
    energy = energy_of_scores(probabilities, image.shape[:2], "probabilities")
    return refine(image, energy, crf, device=device, on_iteration=on_iteration)


def batches_of_one_size(
    items: Iterable[Item], batch_size: int, shape: Callable[[Item], tuple[int, ...]]
) -> Iterator[list[Item]]:
    """Up to ``batch_size`` consecutive items of one shape, in their order. A consumer that empties the list lets go of
    them before the next ones are made."""
    batch: list[Item] = []
    for item in items:
        if batch and shape(batch[0]) != shape(item):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _as_batch(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    batch = images[None] if images.ndim == 3 else images
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or 0 in batch.shape:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, 3) or (H, W, 3), none of them empty, got {images.dtype} of "
            f"shape {images.shape}"
        )
    return batch


@contextlib.contextmanager
def _prepared(model: nn.Module, settings: Inference) -> Iterator[None]:
    """Evaluation mode, the output stride, no gradients; everything is as it was afterwards."""
    stride: Any = getattr(model, "output_stride", None)
    changed = settings.output_stride is not None and settings.output_stride != stride
    if changed and not hasattr(model, "set_output_stride"):
        raise ValueError(f"output_stride {settings.output_stride}: {type(model).__name__} has no other than its own")
    try:
        if changed:
            model.set_output_stride(settings.output_stride)  # type: ignore[operator]
        with evaluation_mode(model), torch.inference_mode():
            yield
    finally:
        if changed:
            model.set_output_stride(stride)  # type: ignore[operator]


def _network_scores(
    model: nn.Module, images: NDArray[np.uint8], settings: Inference, on_window: Progress
) -> NDArray[np.float32]:
    out: NDArray[np.float32] | None = None
    with _prepared(model, settings):
        for n, window, scores in _parts(model, images, settings, on_window):
            if out is None:
                out = np.empty((len(images), len(scores), *images.shape[1:3]), np.float32)
            out[n, :, window.rows, window.columns] = scores.cpu().numpy()
    assert out is not None
    return out


def _parts(
    model: nn.Module, images: NDArray[np.uint8], settings: Inference, on_window: Progress, *, order_only: bool = False
) -> Iterator[tuple[int, Window, Tensor]]:
    """(image, window, probabilities (K, rows, columns) of what is kept of it) that cover every image once.

    order_only: anything that orders the classes alike will do, so that logits of which there is no mean stay logits.
    """
    grid = windows(images.shape[1], images.shape[2], settings.window, settings.seen_margin)
    jobs = [(n, window) for n in range(len(images)) for window in grid]
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        seen = np.stack([images[n, window.seen_rows, window.seen_columns] for n, window in batch])
        for (n, window), scores in zip(batch, _averaged(model, seen, settings, order_only), strict=True):
            yield n, window, scores[(slice(None), *window.kept)]
        on_window(start + len(batch), len(jobs))


def _averaged(model: nn.Module, images: NDArray[np.uint8], settings: Inference, order_only: bool) -> Tensor:
    """(B, K, H, W) float32: the mean of the softmax over scales and mirror images; see :func:`_parts`."""
    device, size = device_of(model), images.shape[1:3]
    x = to_input(images, getattr(model, "normalization", SYMMETRIC)).to(device)
    count = len(settings.scales) * (1 + settings.flip)
    total: Tensor | None = None
    for scale in settings.scales:
        scaled = _resized(x, _scaled_size(size, scale))
        for mirrored in (False, True) if settings.flip else (False,):
            logits = _logits(model, scaled.flip(-1) if mirrored else scaled)
            logits = _resized(logits.flip(-1) if mirrored else logits, size)
            scores = logits if order_only and count == 1 else logits.softmax(1)
            total = scores if total is None else total.add_(scores)
    assert total is not None
    if not total.isfinite().all():
        raise ValueError("the network's scores are not finite: its weights are unfit, or its dtype overflows")
    return total.div_(count) if count > 1 else total


def _scaled_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    height, width = (int((n - 1) * scale + 1 + 1e-6) for n in size)
    return height, width


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    missing = max(0, _SMALLEST_SIDE - height), max(0, _SMALLEST_SIDE - width)
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
    logits: Tensor = model(x.to(next(model.parameters()).dtype))
    if logits.dim() != 4 or logits.shape[0] != len(x) or logits.shape[2:] != x.shape[2:] or logits.shape[1] > 256:
        raise ValueError(
            f"the model must give logits (N, K, H, W) of at most 256 classes at its input's size, got "
            f"{tuple(logits.shape)} for {tuple(x.shape)}"
        )
    return logits[:, :, :height, :width].float()
