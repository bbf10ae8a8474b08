"""Pictures side by side, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_GAP = 6


def side_by_side(panels: Sequence[NDArray[np.uint8]], scale: int = 1) -> bytes:
    """RGB panels (H, W, 3) of one height in a row with transparent gaps, enlarged ``scale`` times; the PNG's bytes."""
    height = panels[0].shape[0]
    if any(panel.shape[0] != height for panel in panels):
        raise ValueError(f"panels must have one height, got {[panel.shape for panel in panels]}")
    width = sum(panel.shape[1] for panel in panels) + _GAP * (len(panels) - 1)
    canvas = np.zeros((height, width, 4), np.uint8)
    left = 0
    for panel in panels:
        canvas[:, left : left + panel.shape[1], :3] = panel
        canvas[:, left : left + panel.shape[1], 3] = 255
        left += panel.shape[1] + _GAP
    image = Image.fromarray(canvas)
    if scale > 1:
        image = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def mistakes(image: NDArray[np.uint8], labels: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image in faint grey, with the pixels whose prediction differs from the label in red."""
    out = faint(image)
    out[labels != prediction] = (220, 30, 30)
    return out


def faint(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image (H, W, 3) in light grey, to mark something on it."""
    grey = image.mean(axis=2, keepdims=True) * 0.35 + 150
    return np.repeat(grey, 3, axis=2).astype(np.uint8)


def probability(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Values (H, W) in 0..1 as grey, black to white."""
    grey = np.round(np.clip(np.asarray(values, np.float32), 0, 1) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
