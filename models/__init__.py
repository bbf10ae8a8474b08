"""DeepLab models on the package's operators."""

from typing import TYPE_CHECKING, Any

from .madds import LayerMadds, madds, paper_table
from .registry import build, list_models
from .weights import known_weights, load_weights

if TYPE_CHECKING:
    from .segmenter import Segmenter

__all__ = ["LayerMadds", "Segmenter", "build", "known_weights", "list_models", "load_weights", "madds", "paper_table"]


def __getattr__(name: str) -> Any:
    if name == "Segmenter":  # lazy: building a network does not need Pillow
        from .segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
