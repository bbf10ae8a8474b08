"""Where the fused operators are the faster choice on a CPU.

Measured against PyTorch's own kernels (``benchmarks/results``, README's table, and 3x3 to 9x9 kernels on the maps of
image classifiers, 7x7 to 112x112): at low rates PyTorch's convolutions win on small maps with large kernels, and in
channels_last some at stride 2 or rate 2; at higher rates the fused ones do, by up to 40 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from .._layout import is_channels_last_only

_HIGH_RATE = 4  # from here on PyTorch is nowhere ahead


@dataclass(frozen=True)
class Scope:
    """On a CPU, a fused convolution runs fused where this allows it, and as it was elsewhere."""

    smallest_map: int | None
    """Inference on contiguous maps: from this height and width of the output on; None for never."""
    channels_last: bool
    """Inference on channels_last maps."""
    channels_last_training: bool

    def __str__(self) -> str:
        limits = []
        if self.smallest_map is None:
            limits.append("NCHW inference")
        elif self.smallest_map > 1:
            limits.append(f"NCHW inference below {self.smallest_map} x {self.smallest_map}")
        if not (self.channels_last or self.channels_last_training):
            limits.append("NHWC")
        elif not self.channels_last:
            limits.append("NHWC inference")
        return f"all but {', '.join(limits)}" if limits else "everywhere"


EVERYWHERE = Scope(1, True, True)


@cache
def _scope(kernel: int, stride: int, rate: int, channels: int, alone: bool) -> Scope:
    if rate >= _HIGH_RATE:
        return EVERYWHERE
    large = kernel > 3
    if alone:
        return Scope(None if large else 16, large, large or rate > 1)
    return Scope(48 if kernel > 5 else 20 if large else 10, rate == 1 and (stride == 1 or channels < 128), True)


def scope_of(conv: nn.Conv2d, alone: bool) -> Scope:
    """The scope of ``conv`` in its present geometry; ``alone``: without a norm or an activation in the same pass."""
    return _scope(max(conv.kernel_size), max(conv.stride), max(conv.dilation), conv.in_channels, alone)


def covers(conv: nn.Conv2d, x: Tensor, learns: bool, alone: bool) -> bool:
    """Whether ``conv``, which ``learns`` if its weight needs gradients, runs fused on ``x``."""
    # Compiled and traced code should not depend on sizes.
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    scope = scope_of(conv, alone)
    training = torch.is_grad_enabled() and (x.requires_grad or learns)
    if is_channels_last_only(x):
        return scope.channels_last_training if training else scope.channels_last
    if training or scope.smallest_map is None:
        return training
    return min(x.shape[2] // conv.stride[0], x.shape[3] // conv.stride[1]) >= scope.smallest_map
