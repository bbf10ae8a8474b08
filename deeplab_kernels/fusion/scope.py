"""Where the fused operators are the faster choice on a CPU.

Measured against the modules that they replace, 3x3 to 7x7 kernels on maps of 7x7 to 112x112
(``benchmarks/bench_fuse.py``; its figures stand in ``benchmarks/NOTES.md``). PyTorch's convolutions win with large
kernels in contiguous inference on small maps or without a norm, and in channels_last training at stride 2; where
kernels reach far the fused ones win by up to 40 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from .._layout import is_channels_last_only

# Between the outer taps of a kernel. From here on oneDNN's fast depthwise code does not serve: 3x3 at rate 6, 5x5 at
# rate 3, 7x7 at rate 2. At rate 4, too, PyTorch is nowhere ahead.
_FAR, _HIGH_RATE = 12, 4


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
        elif not self.channels_last_training:
            limits.append("NHWC training")
        return f"all but {', '.join(limits)}" if limits else "everywhere"


EVERYWHERE = Scope(1, True, True)


@cache
def _scope(kernel: int, stride: int, rate: int, alone: bool) -> Scope:
    if rate >= _HIGH_RATE or rate * (kernel - 1) >= _FAR:
        return EVERYWHERE
    if kernel <= 3:
        return Scope(1, True, channels_last_training=stride == 1)
    if alone:
        return Scope(None, rate == 1, True)
    return Scope(1 if rate > 1 else 20 if kernel <= 5 else 48, True, True)


def scope_of(conv: nn.Conv2d, alone: bool) -> Scope:
    """The scope of ``conv`` in its present geometry; ``alone``: without a norm or an activation in the same pass."""
    return _scope(max(conv.kernel_size), max(conv.stride), max(conv.dilation), alone)


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
