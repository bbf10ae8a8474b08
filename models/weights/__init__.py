"""Weights: of other libraries, and the package's own file."""

from .file import build_from_file, read_weights_file, save_weights_file
from .load import LoadReport, load_weights, origins
from .sources import known_weights

__all__ = [
    "LoadReport",
    "build_from_file",
    "known_weights",
    "load_weights",
    "origins",
    "read_weights_file",
    "save_weights_file",
]
