"""Hypercolumns (Hariharan et al., arXiv:1411.5752): the features of several depths at one pixel, stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplab_kernels.nn.init import he_uniform_

from ..layers import positive_ints, resize_bilinear


class Hypercolumn(nn.Module):
    """Feature maps of several depths -> scores (N, num_classes, h, w) at the size of the first.

    Each map is reduced by a 1x1 convolution and resized (bilinear, corners aligned) to the size of the first; stacked,
    they go through ReLU and a 1x1 classifier. Reducing before resizing gives what reducing after it would, since both
    are linear and the weights of a resize sum to 1, and takes a fraction of the time.

    Args:
        in_channels: of the maps, the finest first.
        channels: of each map in the hypercolumn.
        norm: batch normalisation of the hypercolumn.
        momentum: of it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        *,
        norm: bool = False,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        in_channels = positive_ints(in_channels, "in_channels")
        self.reduce = nn.ModuleList(he_uniform_(nn.Conv2d(n, channels, 1)) for n in in_channels)
        stacked = channels * len(in_channels)
        self.norm = nn.BatchNorm2d(stacked, momentum=momentum) if norm else nn.Identity()
        self.classifier = nn.Conv2d(stacked, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        reduced = [reduce(m) for reduce, m in zip(self.reduce, maps, strict=True)]
        column = torch.cat([reduced[0], *(resize_bilinear(m, size) for m in reduced[1:])], 1)
        return self.classifier(self.norm(column).relu())
