"""Loads the native libraries, says what is missing and why, and what to do about it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

import torch

from ._artefacts import HERE, build_info, find_library, not_built_hint

CUDA_BACKENDS = ("cuda", "triton", "reference")


def _load_cpu() -> None:
    path = find_library("_C")
    if path is None:
        raise ImportError(f"deeplab_kernels has no compiled library _C in {HERE}: {not_built_hint()}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_info().get("torch", "an unknown version")
        raise ImportError(
            f"{path} does not load with torch {torch.__version__} (it was built with {built} and needs torch >= 2.10): "
            f"{error}"
        ) from error


def _deselected(backend: str) -> str | None:
    """Why not to use ``backend`` on CUDA devices, or None: DEEPLAB_KERNELS_CUDA_BACKEND names the only one wanted."""
    wanted = os.environ.get("DEEPLAB_KERNELS_CUDA_BACKEND") or backend
    if wanted not in CUDA_BACKENDS:
        raise ImportError(f"DEEPLAB_KERNELS_CUDA_BACKEND must be one of {', '.join(CUDA_BACKENDS)}, got {wanted!r}")
    return None if wanted == backend else f"DEEPLAB_KERNELS_CUDA_BACKEND={wanted}"


def _load_cuda() -> str | None:
    """Loads the CUDA operators; returns why not, or None if they are loaded."""
    if reason := _deselected("cuda"):
        return reason
    path = find_library("_C_cuda")
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
    if reason := _deselected("triton"):
        return reason
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@cache
def cpu_instruction_set() -> str:
    """Instruction set that the CPU kernels use on this machine: "avx512", "avx2" or "portable"."""
    library = ctypes.CDLL(str(find_library("_C")))
    library.deeplab_kernels_cpu_instruction_set.restype = ctypes.c_char_p
    return library.deeplab_kernels_cpu_instruction_set().decode()


@cache
def missing() -> dict[str, str]:
    """Backends that cannot serve here, each with the reason: any of "cuda", "triton"."""
    reasons = {"cuda": _CUDA_MISSING, "triton": _triton_missing()}
    return {name: reason for name, reason in reasons.items() if reason}


_load_cpu()
_CUDA_MISSING = _load_cuda()
