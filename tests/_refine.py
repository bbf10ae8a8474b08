"""A photograph and a coarse annotation of it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def two_halves(height: int = 24, width: int = 30) -> np.ndarray:
    """A photograph, dark on the left and light on the right, with noise."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[:, width // 2 :] = 190
    return image + np.random.default_rng(0).integers(0, 12, image.shape).astype(np.uint8)


def coarse_labels() -> np.ndarray:
    """Of :func:`two_halves`: a corner of label 2 that is not quite its right half, and void above."""
    out = np.zeros((24, 30), np.uint8)
    out[4:, 12:] = 2
    out[:3] = 255
    return out


def save_palette(path, labels, palette=((0, 0, 0), (9, 9, 9), (1, 200, 77))) -> None:
    image = Image.fromarray(labels)
    # All 256 colours: with fewer Pillow stores fewer bits per pixel than label 255 needs.
    image.putpalette(np.array([*palette, *[(0, 0, 0)] * (256 - len(palette))], np.uint8).tobytes())
    image.save(path)
