"""The decoder of DeepLab v3+ (Chen et al., arXiv:1802.02611, section 3.1 and figure 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BN_MOMENTUM, HEAD_BN_EPS, ConvNormAct, resize_bilinear
from .aspp import conv3x3


class Decoder(nn.Module):
    """Refines the encoder's feature with a reduced low-level feature.

    forward: ``features`` (N, in_channels, h, w) and ``low_level`` (N, low_level_channels, H, W) -> (N, channels, H, W).
    ``features`` is resized to H x W, ``low_level`` reduced to ``reduced_channels`` by a 1x1 convolution; the two are
    concatenated and go through ``num_convs`` 3x3 convolutions. The naive decoder of the paper is no decoder: the logits
    of the encoder's feature are resized to the image.

    Args:
        separable, normalize_depthwise: as in :class:`deeplab_kernels.models.heads.ASPP`.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        channels: int = 256,
        reduced_channels: int = 48,
        num_convs: int = 2,
        *,
        separable: bool = True,
        normalize_depthwise: bool = True,
        eps: float = HEAD_BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        norm: dict[str, Any] = {"eps": eps, "momentum": momentum}
        self.reduce = ConvNormAct(low_level_channels, reduced_channels, **norm)
        widths = [in_channels + reduced_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(
                conv3x3(widths[i], widths[i + 1], separable=separable, normalize_depthwise=normalize_depthwise, **norm)
                for i in range(num_convs)
            )
        )

    def forward(self, features: Tensor, low_level: Tensor) -> Tensor:
        return self.convs(torch.cat([resize_bilinear(features, low_level.shape[2:]), self.reduce(low_level)], 1))
