"""DeepLab models on the package's operators."""

from .madds import LayerMadds, madds, paper_table
from .registry import build, list_models

__all__ = ["LayerMadds", "build", "list_models", "madds", "paper_table"]
