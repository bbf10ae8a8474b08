"""What surrounds a convolution in training, as functions of the modules that hold the parameters. Each is the same as
calling the modules, and does so where anything (hooks, another type) makes that necessary."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import _validation, batch_norm_act
from ..ops._pointwise import is_one_operator, pointwise_bn_act, pointwise_conv2d
from ._halves import activate, norm_in_place, running
from ._separable_blocks import untouched


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, the products of a 1x1 convolution and its gradients by own kernels where they are faster."""
    return pointwise_conv2d(x, conv.weight) if _is_pointwise(conv, x) else conv(x)


def pointwise_norm_act(
    conv: nn.Conv2d,
    norm: nn.Module,
    activation: str | None,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    owned: bool = False,
) -> Tensor:
    """``norm_act(norm, activation, pointwise(conv, x), residual)``, in training one operator where
    that is faster (:func:`ops._pointwise.pointwise_bn_act`)."""
    if _is_pointwise(conv, x) and is_one_operator(x, conv.weight):
        size = torch.Size((x.shape[0], conv.out_channels, *x.shape[2:]))
        if _one_operator(norm, x, size, residual):
            mean, var, momentum, counted = running(norm)
            out = pointwise_bn_act(
                x, conv.weight, norm.weight, norm.bias, mean, var, momentum=momentum, eps=norm.eps,
                activation=activation, residual=residual,
            )  # fmt: skip
            return _counted(norm, out, counted)
    return norm_act(norm, activation, pointwise(conv, x), residual, owned=owned)


def norm_act(
    norm: nn.Module, activation: str | None, z: Tensor, residual: Tensor | None = None, *, owned: bool = False
) -> Tensor:
    """``act(norm(z) + residual)``; in training, on the CPU, batch normalisation, residual and activation are one
    operator (:func:`ops.batch_norm_act`). ``owned``: nobody else holds z, and ``norm`` has no hooks."""
    if _one_operator(norm, z, z.shape, residual):
        mean, var, momentum, counted = running(norm)
        out = batch_norm_act(
            z, norm.weight, norm.bias, mean, var, momentum=momentum, eps=norm.eps, activation=activation,
            residual=residual,
        )  # fmt: skip
        return _counted(norm, out, counted)
    out = norm_in_place(norm, z) if owned else norm(z)
    return activate(out if residual is None else out + residual, activation, inplace=True)


def _counted(norm: nn.BatchNorm2d, out: Tensor, counted: bool) -> Tensor:
    if counted:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return out


def _is_pointwise(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        conv.bias is None
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and untouched(conv, nn.Conv2d)
        and not _has_any_global_hook()
    )


def _one_operator(norm: nn.Module, z: Tensor, size: torch.Size, residual: Tensor | None) -> TypeGuard[nn.BatchNorm2d]:
    """For what is normalised, of this size and otherwise like ``z``."""
    return (
        untouched(norm, nn.BatchNorm2d)
        and not _has_any_global_hook()
        and z.device.type == "cpu"
        and (norm.training or norm.running_mean is None)
        and (norm.running_mean is None) == (norm.running_var is None)
        and z.dtype in _validation.DTYPES
        and len(size) == 4
        and size[1] == norm.num_features
        and (residual is None or (residual.dtype == z.dtype and residual.shape == size))
    )
