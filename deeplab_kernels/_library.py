"""Loads the native libraries, says what is missing and why, and what to do about it."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent


def _find(name: str) -> Path | None:
    suffixes = (".abi3.so", sysconfig.get_config_var("EXT_SUFFIX") or ".so", ".so")
    return next((_HERE / f"{name}{s}" for s in suffixes if (_HERE / f"{name}{s}").exists()), None)


def build_info() -> dict[str, Any]:
    """What setup.py recorded when the package was built; empty if it was not."""
    path = _HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_cpu() -> None:
    path = _find("_C")
    if path is None:
        hint = "reinstall it with `pip install .`"
        if (_HERE.parent / "setup.py").exists():
            hint = (
                f"this is the source tree ({_HERE.parent}), which hides an installed package when Python runs from "
                "here: use `pip install -e .`, or run from another directory"
            )
        raise ImportError(f"deeplab_kernels has no compiled library _C in {_HERE}: {hint}")
    torch.ops.load_library(str(path))


def _load_cuda() -> str | None:
    """Loads the CUDA operators; returns why not, or None if they are loaded."""
    path = _find("_C_cuda")
    if path is None:
        return build_info().get("cuda_missing_because") or "the package was built without CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def cpu_instruction_set() -> str:
    """Instruction set that the CPU kernels use on this machine: "avx512", "avx2" or "portable"."""
    library = ctypes.CDLL(str(_find("_C")))
    library.deeplab_kernels_cpu_instruction_set.restype = ctypes.c_char_p
    return library.deeplab_kernels_cpu_instruction_set().decode()


@cache
def missing() -> dict[str, str]:
    """Backends that cannot serve here, each with the reason: any of "cuda", "triton"."""
    reasons = {"cuda": _CUDA_MISSING, "triton": _triton_missing()}
    return {name: reason for name, reason in reasons.items() if reason}


_load_cpu()
_CUDA_MISSING = _load_cuda()
