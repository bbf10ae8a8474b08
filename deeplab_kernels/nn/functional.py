"""What surrounds a convolution in training, as functions of the modules that hold the parameters. Each is the same as
calling the modules, and does so where anything (hooks, another type) makes that necessary."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import _validation, batch_norm_act
from ..ops._pointwise import pointwise_conv2d
from ._halves import activate, norm_in_place, running
from ._separable_blocks import untouched


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, the gradient of a 1x1 convolution's weights by a matrix product where that is faster."""
    if (
        conv.bias is None
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and untouched(conv, nn.Conv2d)
        and not _has_any_global_hook()
    ):
        return pointwise_conv2d(x, conv.weight)
    return conv(x)


def norm_act(
    norm: nn.Module, activation: str | None, z: Tensor, residual: Tensor | None = None, *, owned: bool = False
) -> Tensor:
    """``act(norm(z) + residual)``; in training, on the CPU, batch normalisation, residual and activation are one
    operator (:func:`ops.batch_norm_act`). ``owned``: nobody else holds z, and ``norm`` has no hooks."""
    if _one_operator(norm, z, residual):
        mean, var, momentum, counted = running(norm)
        out = batch_norm_act(
            z, norm.weight, norm.bias, mean, var, momentum=momentum, eps=norm.eps, activation=activation,
            residual=residual,
        )  # fmt: skip
        if counted:
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return out
    out = norm_in_place(norm, z) if owned else norm(z)
    return activate(out if residual is None else out + residual, activation, inplace=True)


def _one_operator(norm: nn.Module, z: Tensor, residual: Tensor | None) -> TypeGuard[nn.BatchNorm2d]:
    return (
        untouched(norm, nn.BatchNorm2d)
        and not _has_any_global_hook()
        and z.device.type == "cpu"
        and (norm.training or norm.running_mean is None)
        and (norm.running_mean is None) == (norm.running_var is None)
        and z.dtype in _validation.DTYPES
        and z.dim() == 4
        and z.shape[1] == norm.num_features
        and (residual is None or (residual.dtype == z.dtype and residual.shape == z.shape))
    )
