"""Random scale, crop, mirroring and colours of training samples, alike for an image and its labels.

Scaling and colours are kornia's (https://github.com/kornia/kornia: Apache-2.0, needs only torch and numpy, works beside
any build of torch); a crop without them is a slice and needs nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .scenes import IGNORE, Scene

_FILL = 127  # grey: next to 0 in the networks' input


@dataclass(frozen=True)
class Augmentation:
    """(image (H, W, 3), labels (H, W)) of any size -> one of crop x crop, as the DeepLab papers train.

    The image is resized by a random factor, bilinearly and with aligned corners, its labels to the nearest neighbour; a
    random window is cut out; where the image is smaller than the window, grey with label 255 follows below and to the
    right. Half of the samples are mirrored.

    Args:
        crop: side of the result, pixels.
        min_scale, max_scale: the factor is drawn uniformly between them (the papers: 0.5 to 2). 1, 1 does not resize.
        flip: share of samples that are mirrored.
        color_jitter: brightness, contrast and saturation are multiplied by factors up to this far from 1; 0 for none.

    Everything random comes from the generator that the call gets: the same generator state gives the same sample.
    """

    crop: int
    min_scale: float = 1.0
    max_scale: float = 1.0
    flip: float = 0.5
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise ValueError(f"crop must be at least 1, got {self.crop}")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"min_scale and max_scale must be positive and in this order, got {self.min_scale}, {self.max_scale}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be 0 to 1, got {self.flip}")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color_jitter must be at least 0 and below 1, got {self.color_jitter}")

    def check_installed(self) -> None:
        """Raises ImportError, which says what to install, if a library that this needs is missing."""
        if self.max_scale != 1 or self.min_scale != 1 or self.color_jitter:
            _kornia("geometry")

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Scene:
        height, width = scene.labels.shape
        scale = (
            float(rng.uniform(self.min_scale, self.max_scale)) if self.min_scale < self.max_scale else self.max_scale
        )
        size = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in size)
        part = window(scene, size, top, left, self.crop)
        if self.color_jitter:
            part = Scene(_jittered(part.image, rng.uniform(-1, 1, 3) * self.color_jitter + 1), part.labels)
        step = -1 if rng.random() < self.flip else 1
        image = np.full((self.crop, self.crop, 3), _FILL, np.uint8)
        labels = np.full((self.crop, self.crop), IGNORE, np.uint8)
        rows, columns = part.labels.shape
        image[:rows, :columns], labels[:rows, :columns] = part.image, part.labels
        return Scene(image[:, ::step], labels[:, ::step])


def window(scene: Scene, size: tuple[int, int], top: int, left: int, crop: int) -> Scene:
    """What lies at rows top .. top + crop and columns left .. left + crop, or up to the border, of ``scene`` resized to
    ``size``; only that part is computed."""
    height, width = scene.labels.shape
    rows, columns = min(crop, size[0] - top), min(crop, size[1] - left)
    if size == (height, width):
        part = slice(top, top + rows), slice(left, left + columns)
        return Scene(scene.image[part], scene.labels[part])
    # Aligned corners: the first and the last pixel of both grids coincide.
    scales = _scale(height, size[0]), _scale(width, size[1])
    return _resampled(scene, scales, (top, left), (rows, columns))


def _scale(old: int, new: int) -> float:
    return (new - 1) / (old - 1) if min(old, new) > 1 else new / old


def _resampled(scene: Scene, scales: tuple[float, float], corner: tuple[int, int], size: tuple[int, int]) -> Scene:
    """Rows and columns ``corner + 0 .. size`` of ``scene`` enlarged by ``scales``."""
    # The part of the source that is seen, so that a large image is not converted as a whole.
    (height, width), (sy, sx), (top, left) = scene.labels.shape, scales, corner
    rows, columns = _seen(height, sy, top, size[0]), _seen(width, sx, left, size[1])
    matrix = torch.tensor([[[sx, 0.0, sx * columns.start - left], [0.0, sy, sy * rows.start - top]]])

    def warp(values: Tensor, mode: str) -> Tensor:
        warped: Tensor = _kornia("geometry").warp_affine(
            values[None].float(), matrix, size, mode=mode, padding_mode="border", align_corners=True
        )
        return warped[0].round_().to(torch.uint8)

    image = warp(torch.from_numpy(scene.image[rows, columns].transpose(2, 0, 1).copy()), "bilinear")
    labels = warp(torch.from_numpy(scene.labels[rows, columns].copy())[None], "nearest")
    return Scene(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), labels[0].numpy())


def _seen(side: int, scale: float, start: int, count: int) -> slice:
    return slice(min(side - 1, int(start / scale)), min(side, int((start + count - 1) / scale) + 3))


def _jittered(image: NDArray[np.uint8], factors: NDArray[np.float64]) -> NDArray[np.uint8]:
    enhance = _kornia("enhance")
    brightness, contrast, saturation = (float(f) for f in factors)
    values = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    values = enhance.adjust_brightness_accumulative(values, brightness)
    values = enhance.adjust_contrast_with_mean_subtraction(values, contrast)
    values = enhance.adjust_saturation(values, saturation).clamp(0, 1)
    return np.ascontiguousarray((values[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _kornia(module: str) -> Any:
    try:
        return importlib.import_module(f"kornia.{module}")
    except ImportError as error:
        raise ImportError(
            f"random scales and colours need kornia ({error}): pip install kornia, or min_scale = max_scale = 1 and "
            "color_jitter = 0"
        ) from None
