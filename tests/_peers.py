"""Third-party packages that the tests compare with. The package itself imports none of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_libraries: list[torch.library.Library] = []


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        # torchvision built for CUDA does not load its operators beside a CPU torch, and then misses their schemas.
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


def peer(name: str) -> ModuleType:
    """Imports ``name`` (timm, torchvision, segmentation_models_pytorch); skips the test where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        _import_torchvision()
    return pytest.importorskip(name)
