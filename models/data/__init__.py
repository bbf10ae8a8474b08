"""Images and labels: scenes that the package draws itself, and the reading of image files."""

from .images import read_image, to_input, to_rgb
from .scenes import CLASS_NAMES, IGNORE, PALETTE, Scene, SceneDataset, draw_scene

__all__ = [
    "CLASS_NAMES",
    "IGNORE",
    "PALETTE",
    "Scene",
    "SceneDataset",
    "draw_scene",
    "read_image",
    "to_input",
    "to_rgb",
]
