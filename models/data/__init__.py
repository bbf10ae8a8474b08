"""Images and labels: scenes that the package draws itself, datasets in files, and the reading of images, label maps and
scores."""

from .annotations import VOID, LabelMap, read_annotation, voc_palette
from .cityscapes import Cityscapes
from .folder import FolderDataset
from .generated import generated_dataset, write_generated_dataset
from .images import read_image, to_input, to_rgb
from .opening import Dataset, open_dataset
from .pairs import PairedDataset
from .sbd import add_sbd
from .scenes import CLASS_NAMES, IGNORE, PALETTE, Scene, SceneDataset, Scenes, draw_scene
from .transforms import Augmentation
from .voc import PascalVOC

__all__ = [
    "CLASS_NAMES",
    "IGNORE",
    "PALETTE",
    "VOID",
    "Augmentation",
    "Cityscapes",
    "Dataset",
    "FolderDataset",
    "LabelMap",
    "PairedDataset",
    "PascalVOC",
    "Scene",
    "SceneDataset",
    "Scenes",
    "add_sbd",
    "draw_scene",
    "generated_dataset",
    "open_dataset",
    "read_annotation",
    "read_image",
    "to_input",
    "to_rgb",
    "voc_palette",
    "write_generated_dataset",
]
