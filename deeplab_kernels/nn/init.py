"""Weight initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> Tensor:
    """Fills ``weight`` with normal values of standard deviation ``std``, cut at two of them, as TensorFlow draws them.

    By the inverse of the distribution function, in place: several times faster than ``nn.init.trunc_normal_``, which
    would be most of the time that an Xception-65 takes to build.
    """
    bound = math.erf(math.sqrt(2))
    # Rounding may put the inverse slightly outside.
    return weight.uniform_(-bound, bound).erfinv_().mul_(math.sqrt(2) * std).clamp_(-2 * std, 2 * std)
