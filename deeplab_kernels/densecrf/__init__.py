"""Permutohedral lattice for numpy users. Importing this package does not import torch."""

from .lattice import lattice_embed

__all__ = ["lattice_embed"]
