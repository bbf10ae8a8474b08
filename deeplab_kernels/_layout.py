"""Which memory layout an operator's output has; csrc/torch/tensors.h follows the same rule."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last_only(x: Tensor) -> bool:
    """True if ``x`` is dense in NHWC order and not also in NCHW order (as with one channel or one pixel)."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def output_memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last_only(x) else torch.contiguous_format
