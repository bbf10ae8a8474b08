"""Weights: the package's own file."""

from .file import build_from_file, read_weights_file, save_weights_file

__all__ = ["build_from_file", "read_weights_file", "save_weights_file"]
