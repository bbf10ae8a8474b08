"""Images and labels: scenes that the package draws itself, and the reading of images, label maps and scores."""

from .annotations import VOID, LabelMap, read_annotation, voc_palette
from .images import read_image, to_input, to_rgb
from .scenes import CLASS_NAMES, IGNORE, PALETTE, Scene, SceneDataset, draw_scene

__all__ = [
    "CLASS_NAMES",
    "IGNORE",
    "PALETTE",
    "VOID",
    "LabelMap",
    "Scene",
    "SceneDataset",
    "draw_scene",
    "read_annotation",
    "read_image",
    "to_input",
    "to_rgb",
    "voc_palette",
]
