"""Fused atrous separable convolution and DeepLab models for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AtrousSeparableConv2d", "densecrf", "models", "nn", "ops"]

if TYPE_CHECKING:
    from . import densecrf, models, nn, ops
    from .nn import AtrousSeparableConv2d


def __getattr__(name: str) -> Any:
    # Lazy, so that `deeplab_kernels.densecrf` imports without torch and `import deeplab_kernels` costs nothing.
    if name == "AtrousSeparableConv2d":
        return importlib.import_module(".nn", __name__).AtrousSeparableConv2d
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
