"""The decoder of DeepLab v3+ (Chen et al., arXiv:1802.02611, section 3.1 and figure 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BN_MOMENTUM, HEAD_BN_EPS, ConvNormAct, resize_bilinear
from .aspp import head_convolution


class Decoder(nn.Module):
    """Refines the encoder's feature with a reduced low-level feature.

    forward: ``features`` (N, in_channels, h, w) and ``low_level`` (N, low_level_channels, H, W) -> (N, channels, H, W).
    ``features`` is resized to H x W, ``low_level`` reduced to ``reduced_channels`` by a 1x1 convolution; the two are
    concatenated and go through ``num_convs`` convolutions. The naive decoder of the paper is no decoder: the logits of
    the encoder's feature are resized to the image.

    Args:
        coarser: a decoder that comes first; ``features`` and all low-level features but the last go through it, and
            this one takes its output (the "Conv2 and Conv3" of the paper's table 2, like U-Net's).
        kernel_size: of the convolutions; 3, or 1 as in a row of the paper's table 2.
        separable, normalize_depthwise: as in :class:`deeplab_kernels.models.heads.ASPP`.
        align_corners: of the resize.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        channels: int = 256,
        reduced_channels: int = 48,
        num_convs: int = 2,
        *,
        coarser: Decoder | None = None,
        kernel_size: int = 3,
        separable: bool = True,
        normalize_depthwise: bool = True,
        align_corners: bool = True,
        eps: float = HEAD_BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        self.out_channels: int = channels
        norm: dict[str, Any] = {"eps": eps, "momentum": momentum}
        conv: dict[str, Any] = {"separable": separable, "normalize_depthwise": normalize_depthwise, **norm}
        if coarser is not None:
            in_channels = coarser.out_channels
        self.coarser = coarser
        self.reduce = ConvNormAct(low_level_channels, reduced_channels, **norm)
        widths = [in_channels + reduced_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(head_convolution(widths[i], widths[i + 1], kernel_size, **conv) for i in range(num_convs))
        )
        self.align_corners = align_corners

    def forward(self, features: Tensor, *low_levels: Tensor) -> Tensor:
        *coarser, low_level = low_levels
        if self.coarser is not None:
            features = self.coarser(features, *coarser)
        features = resize_bilinear(features, low_level.shape[2:], align_corners=self.align_corners)
        return self.convs(torch.cat([features, self.reduce(low_level)], 1))
