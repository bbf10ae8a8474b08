"""The pyramid pooling module (Zhao et al., Pyramid Scene Parsing Network, arXiv:1612.01105, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import HEAD_BN_EPS, ConvNormAct, check_batch_statistics, positive_ints, resize_bilinear


class PyramidPooling(nn.Module):
    """Means over grids of several sizes, reduced, resized and concatenated with the input.

    (N, in_channels, h, w) -> (N, in_channels + len(bins) * (in_channels // len(bins)), h, w): the means first, in the
    order of ``bins``, then the input.

    Args:
        bins: a bin of b averages over b x b cells of the map.
        normalize_global: batch normalisation also where b = 1. segmentation_models_pytorch has a bias instead, which
            makes training on a single image possible.
        momentum: of the batch normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        *,
        normalize_global: bool = True,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.bins = positive_ints(bins, "bins")
        channels = in_channels // len(self.bins)
        self.branches = nn.ModuleList(
            ConvNormAct(in_channels, channels, eps=HEAD_BN_EPS, momentum=momentum)
            if b > 1 or normalize_global
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))
            for b in self.bins
        )
        self.out_channels = in_channels + len(self.bins) * channels

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for b, branch in zip(self.bins, self.branches, strict=True):
            if b == 1 and isinstance(branch, ConvNormAct):
                check_batch_statistics(branch.norm, x, "the pooling to one value of the pyramid")
            parts.append(resize_bilinear(branch(F.adaptive_avg_pool2d(x, b)), x.shape[2:]))
        return torch.cat([*parts, x], 1)
