"""Fused atrous separable convolution and DeepLab models for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AtrousSeparableConv2d", "densecrf", "fuse", "models", "nn", "ops", "unfuse"]

# Where the names live that are no modules.
_HOMES = {"AtrousSeparableConv2d": ".nn", "fuse": ".fusion", "unfuse": ".fusion"}

if TYPE_CHECKING:
    from . import densecrf, models, nn, ops
    from .fusion import fuse, unfuse
    from .nn import AtrousSeparableConv2d


def __getattr__(name: str) -> Any:
    # Lazy, so that `deeplab_kernels.densecrf` imports without torch and `import deeplab_kernels` costs nothing.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
