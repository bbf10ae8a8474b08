"""Which backend serves each operator on each device: the one place where kernels are registered from Python.

CPU: C++ (registered by the library _C). CUDA: CUDA C++ (_C_cuda), else Triton, else plain torch. Any other device:
plain torch (deeplab_kernels.reference). The environment variable DEEPLAB_KERNELS_CUDA_BACKEND = cuda | triton |
reference, read at import, rules the others out; :func:`implementation` calls one backend whatever is registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import _library, reference

NAMESPACE = "deeplab_kernels"

# operator -> module stem in triton/ that has a function of the same name, or None
OPERATORS: dict[str, str | None] = {
    "atrous_depthwise_conv2d": "atrous_depthwise",
    "atrous_depthwise_conv2d_backward": "atrous_depthwise",
    "atrous_depthwise_bn_act_inference": "atrous_depthwise",
    "atrous_depthwise_bn_act_training": "atrous_depthwise",
    "atrous_depthwise_bn_act_backward": "atrous_depthwise",
    "atrous_separable_conv2d": "atrous_separable",
    "atrous_spatial_pyramid": "atrous_spatial_pyramid",
    "atrous_spatial_pyramid_training": "atrous_spatial_pyramid",
    "atrous_spatial_pyramid_backward": "atrous_spatial_pyramid",
    "pointwise_conv2d": None,
    "pointwise_conv2d_backward": None,
    "pointwise_bn_act_training": None,
    "batch_norm_act_training": None,
    "batch_norm_act_backward": None,
    "gaussian_filter": "gaussian_filter",
    "gaussian_filter_backward": "gaussian_filter",
    "local_gaussian_filter": "local_gaussian_filter",
    "local_gaussian_filter_backward": "local_gaussian_filter",
    "permutohedral_lattice": "permutohedral",
    "permutohedral_filter": "permutohedral",
    "permutohedral_filter_backward": "permutohedral",
    "dense_crf_mean_field": "dense_crf",
    "dense_crf_mean_field_backward": "dense_crf",
}

_library_impl = torch.library.Library(NAMESPACE, "IMPL")
_autocast_impl = torch.library.Library(NAMESPACE, "IMPL")
_on_triton: set[str] = set()  # operators that Triton serves on CUDA devices


def transforms_active() -> bool:
    """Whether torch.func's transforms (vmap, grad, jvp ...) or forward-mode differentiation are at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _lazy_triton(stem: str, name: str) -> Callable[..., Any]:
    # Triton is imported at the first call: the import takes longer than that of the rest of the package.
    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"deeplab_kernels.triton.{stem}"), name)(*args)

    kernel.__name__ = name
    return kernel


def implementation(operator: str, backend: str) -> Callable[..., Any]:
    """``operator`` as "triton" or "reference" computes it, below the dispatcher: no autograd, no autocast."""
    stem = OPERATORS[operator]
    if backend == "triton":
        if stem is None:
            raise ValueError(f"{operator} has no Triton kernel")
        return _lazy_triton(stem, operator)
    if backend == "reference":
        return getattr(reference, operator)
    raise ValueError(f'backend must be "triton" or "reference", got {backend!r}')


def cuda_backend() -> str:
    """Backend of CUDA tensors: "cuda", "triton" or "reference"."""
    missing = _library.missing()
    return next((name for name in ("cuda", "triton") if name not in missing), "reference")


def _registered(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key)


def serving(operator: str) -> dict[str, str]:
    """Backend that serves ``operator`` on each device type."""
    cpu = f"C++ ({_library.cpu_instruction_set()})" if _registered(operator, "CPU") else "reference"
    cuda = "triton" if on_triton(operator) else "cuda" if _registered(operator, "CUDA") else "reference"
    return {"cpu": cpu, "cuda": cuda, "other": "reference"}


def on_triton(operator: str) -> bool:
    """Whether Triton serves ``operator`` on CUDA devices."""
    return operator in _on_triton


def register_kernels() -> None:
    for operator, stem in OPERATORS.items():
        _library_impl.impl(operator, getattr(reference, operator), "CompositeExplicitAutograd")
        # Also beside the CUDA library, for the operators that it does not have.
        if stem is not None and "triton" not in _library.missing() and not _registered(operator, "CUDA"):
            _on_triton.add(operator)
            _library_impl.impl(operator, _lazy_triton(stem, operator), "CUDA")


def _autocast_arguments(
    args: tuple[Any, ...], device_type: str, cast_arguments: int, dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    dtype = dtype or torch.get_autocast_dtype(device_type)
    return (
        *(a.to(dtype) if a is not None and a.dtype != torch.float64 else a for a in args[:cast_arguments]),
        *args[cast_arguments:],
    )


def register_autocast(operator: str, cast_arguments: int, dtype: torch.dtype | None = None) -> None:
    """Under autocast the operator's first ``cast_arguments`` tensors take the autocast dtype, as torch's convolutions
    do, or ``dtype``; per-channel vectors stay as they are, as in torch's batch normalisation."""
    overload = getattr(torch.ops.deeplab_kernels, operator).default
    for device_type, key in (("cpu", torch.DispatchKey.AutocastCPU), ("cuda", torch.DispatchKey.AutocastCUDA)):

        def kernel(*args: Any, device_type: str = device_type, key: torch.DispatchKey = key) -> Any:
            args = _autocast_arguments(args, device_type, cast_arguments, dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*args)

        _autocast_impl.impl(operator, kernel, key.name)


def without_autocast(function: Callable[..., Any], cast_arguments: int) -> Callable[..., Any]:
    """``function`` under the rule of :func:`register_autocast`, for plain torch code, which autocast would enter."""

    def wrapped(*args: Any) -> Any:
        device_type = args[0].device.type
        if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
            return function(*args)
        args = _autocast_arguments(args, device_type, cast_arguments)
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return wrapped
