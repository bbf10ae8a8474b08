"""Segmentation of any image with trained weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .data import read_image, to_input, to_rgb
from .refinement import CRFParameters, check_memory, energy_of_scores, most_probable, refine
from .weights import build_from_file

_SMALLEST_SIDE = 33  # smaller images are continued by their border: below that the deepest feature map is one pixel


class Segmenter:
    """A trained network, ready for images of any size::

        segmenter = Segmenter.from_file("demo/weights.pt")
        labels = segmenter("photo.jpg")              # (H, W) uint8, indices into segmenter.class_names
        segmenter.colourise(labels).save("labels.png")

    Images larger than ``tile`` are cut into tiles that see ``margin`` more pixels on every side, so that memory does
    not grow with the image; the network's context (the image pooling of the ASPP, too) then ends at that margin.

    Args:
        model: (1, 3, H, W) in [-1, 1] -> logits (1, K, H, W).
        class_names: K names, K at most 256.
        palette: K colours (red, green, blue) in 0..255.
        tile: largest side, in pixels, of what the network sees at once, ``2 * margin`` included.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        *,
        tile: int = 769,
        margin: int = 96,
    ) -> None:
        if not 0 < len(class_names) <= 256 or len(class_names) != len(palette):
            raise ValueError(
                f"class_names and palette must have one length from 1 to 256, got {len(class_names)} and {len(palette)}"
            )
        if margin < 0 or tile <= 2 * margin:
            raise ValueError(f"tile must exceed twice the margin, got {tile=}, {margin=}")
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.palette = np.array(palette, np.uint8).reshape(-1, 3)
        self.tile, self.margin = tile, margin

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu", **options: Any) -> Segmenter:
        """Builds the model that the weights file names and loads the weights. ``options``: ``tile``, ``margin``.

        Raises:
            UserError: see :func:`deeplab_kernels.models.weights.build_from_file`.
        """
        model, content = build_from_file(path, device)
        return cls(model, content["class_names"], content["palette"], **options)

    @torch.inference_mode()
    def __call__(
        self,
        image: str | os.PathLike[str] | Image.Image | NDArray[np.generic],
        *,
        max_side: int | None = None,
        crf: CRFParameters | None = None,
        on_tile: Callable[[int, int], object] = lambda done, total: None,
        on_iteration: Callable[[int, int], object] = lambda done, total: None,
    ) -> NDArray[np.uint8]:
        """The label map (H, W) uint8 of ``image``: a file, a Pillow image, or an array as in ``data.to_rgb``.

        Args:
            max_side: an image with a longer side is shrunk to it first, and its labels are enlarged again (nearest
                neighbour; with ``crf`` its scores, bilinear): faster, and better where things are much larger than in
                the training images.
            crf: refine the scores by a dense CRF at the resolution of ``image``
                (:func:`deeplab_kernels.models.refinement.refine`); it takes memory in proportion to classes and pixels.
            on_tile, on_iteration: called with (tiles, or the CRF's iterations, done; the same in all).

        Raises:
            UserError: what is given is no image; too little memory for ``crf``.
        """
        rgb = to_rgb(image) if isinstance(image, (Image.Image, np.ndarray)) else read_image(image)
        if crf is not None:
            check_memory(len(self.class_names), rgb.shape[0], rgb.shape[1], crf)
            energy = energy_of_scores(self._scores(rgb, max_side, on_tile), rgb.shape[:2], "logits")
            device = next(self.model.parameters()).device
            return most_probable(refine(rgb, energy, crf, device=device, on_iteration=on_iteration)).astype(np.uint8)
        labels = np.empty(shrunk(rgb, max_side).shape[:2], np.uint8)
        for rows, columns, logits in self._parts(shrunk(rgb, max_side), on_tile):
            labels[rows, columns] = logits.argmax(0).to(torch.uint8).cpu().numpy()
        if labels.shape == rgb.shape[:2]:
            return labels
        return np.asarray(Image.fromarray(labels).resize(rgb.shape[1::-1], Image.Resampling.NEAREST))

    @torch.inference_mode()
    def scores(
        self,
        image: str | os.PathLike[str] | Image.Image | NDArray[np.generic],
        *,
        max_side: int | None = None,
        on_tile: Callable[[int, int], object] = lambda done, total: None,
    ) -> NDArray[np.float32]:
        """The logits (K, H, W) of ``image``, all of them in memory; K, h, w where ``max_side`` shrinks it."""
        rgb = to_rgb(image) if isinstance(image, (Image.Image, np.ndarray)) else read_image(image)
        return self._scores(rgb, max_side, on_tile)

    def _scores(
        self, rgb: NDArray[np.uint8], max_side: int | None, on_tile: Callable[[int, int], object]
    ) -> NDArray[np.float32]:
        rgb = shrunk(rgb, max_side)
        scores = np.empty((len(self.class_names), *rgb.shape[:2]), np.float32)
        for rows, columns, logits in self._parts(rgb, on_tile):
            scores[:, rows, columns] = logits.float().cpu().numpy()
        return scores

    def _parts(
        self, rgb: NDArray[np.uint8], on_tile: Callable[[int, int], object]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, logits (K, rows, columns)) that together cover the image once."""
        height, width = rgb.shape[:2]
        rows, columns = _tiles(height, self.tile, self.margin), _tiles(width, self.tile, self.margin)
        done = 0
        for top, bottom, outer_top, outer_bottom in rows:
            for left, right, outer_left, outer_right in columns:
                part = self._logits(rgb[outer_top:outer_bottom, outer_left:outer_right])
                inner = part[:, top - outer_top : bottom - outer_top, left - outer_left : right - outer_left]
                yield slice(top, bottom), slice(left, right), inner
                done += 1
                on_tile(done, len(rows) * len(columns))

    def _logits(self, rgb: NDArray[np.uint8]) -> Tensor:
        height, width = rgb.shape[:2]
        missing = max(0, _SMALLEST_SIDE - height), max(0, _SMALLEST_SIDE - width)
        if any(missing):
            rgb = np.pad(rgb, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        parameter = next(self.model.parameters())
        logits: Tensor = self.model(to_input(rgb).to(parameter.device, parameter.dtype))
        return logits[0, :, :height, :width]

    def shares(self, labels: NDArray[np.uint8]) -> dict[str, float]:
        """Class name -> share of the pixels, 0..1."""
        counts = np.bincount(labels.ravel(), minlength=len(self.class_names))
        return {name: int(count) / labels.size for name, count in zip(self.class_names, counts, strict=True)}

    def colourise(self, labels: NDArray[np.uint8]) -> Image.Image:
        """The label map as a palette image: pixel values are class indices, shown in the classes' colours."""
        return colourise(labels, self.palette)

    def overlay(
        self, image: str | os.PathLike[str] | Image.Image | NDArray[np.generic], labels: NDArray[np.uint8]
    ) -> Image.Image:
        """The image with each class but the first tinted in its colour."""
        rgb = to_rgb(image) if isinstance(image, (Image.Image, np.ndarray)) else read_image(image)
        return overlay(rgb, labels, self.palette)


def colourise(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """A palette image: pixel values are ``labels`` (H, W), shown in the colours of ``palette`` (K, 3)."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(np.ascontiguousarray(palette, np.uint8).tobytes())
    return image


def overlay(rgb: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """``rgb`` (H, W, 3) with every pixel whose label is not 0 tinted in the colour of its class."""
    if rgb.shape[:2] != labels.shape:
        raise ValueError(f"image {rgb.shape[:2]} and labels {labels.shape} must have the same size")
    out = rgb.copy()
    for top in range(0, out.shape[0], 256):  # in strips, so that the mixture takes little memory
        strip = out[top : top + 256]
        marked = labels[top : top + 256] > 0
        colours = palette[labels[top : top + 256][marked]].astype(np.uint16)
        strip[marked] = (2 * strip[marked].astype(np.uint16) + 3 * colours) // 5
    return Image.fromarray(out)


def shrunk(rgb: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    """``rgb``, or a smaller copy whose longer side is ``max_side``."""
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    height, width = rgb.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return rgb
    scale = max_side / max(height, width)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb).resize(small, Image.Resampling.BOX))


def _tiles(length: int, tile: int, margin: int) -> list[tuple[int, int, int, int]]:
    """(start, end, outer start, outer end) along one axis: the first two partition 0 .. length, the outer ones add up
    to ``margin`` on both sides and are at most ``tile`` long."""
    if length <= tile:
        return [(0, length, 0, length)]
    step = tile - 2 * margin
    count = -(-length // step)
    edges = [round(i * length / count) for i in range(count + 1)]
    return [(a, b, max(0, a - margin), min(length, b + margin)) for a, b in itertools.pairwise(edges)]
