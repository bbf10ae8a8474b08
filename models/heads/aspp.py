"""Atrous spatial pyramid pooling of DeepLab v3 and v3+ (Chen et al., arXiv:1706.05587, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deeplab_kernels.nn import AtrousSeparableConv2d, AtrousSpatialPyramid

from ..layers import BN_MOMENTUM, HEAD_BN_EPS, ConvNormAct, check_batch_statistics, positive_ints


class ASPP(nn.Module):
    """A 1x1 convolution, one 3x3 convolution per rate and the image's mean, concatenated and projected.

    (N, in_channels, H, W) -> (N, channels, H, W). Each branch has ``channels`` outputs, batch normalisation and ReLU.

    Args:
        rates: of the 3x3 branches; there may be none (the official code's MobileNetV2 has none).
        separable: atrous separable convolutions in the 3x3 branches (the SC of the paper's table 5).
        normalize_depthwise: batch normalisation and ReLU also between the depthwise and the pointwise half, as in the
            official code. Several ports leave them out.
        dropout: share of the projected features dropped in training.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        *,
        separable: bool = True,
        normalize_depthwise: bool = True,
        dropout: float = 0.1,
        eps: float = HEAD_BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        rates = positive_ints(rates, "rates", empty=True)
        norm: dict[str, Any] = {"eps": eps, "momentum": momentum}
        self.pooling = ConvNormAct(in_channels, channels, **norm)
        self.pointwise = ConvNormAct(in_channels, channels, **norm)
        self.atrous = AtrousSpatialPyramid(
            head_convolution(
                in_channels, channels, separable=separable, normalize_depthwise=normalize_depthwise, **norm
            )
            for _ in rates
        )
        self.project = ConvNormAct((2 + len(rates)) * channels, channels, **norm)
        self.dropout = nn.Dropout(dropout)
        self.set_rates(rates)

    def set_rates(self, rates: Sequence[int]) -> None:
        """Changes the rates in place; there must be as many as there are branches."""
        self.rates = positive_ints(rates, "rates", len(self.atrous), empty=True)
        for branch, rate in zip(self.atrous, self.rates, strict=True):
            if isinstance(branch, ConvNormAct):
                branch.set_rate(rate)
            else:
                assert isinstance(branch, AtrousSeparableConv2d)
                branch.dilation = (rate, rate)

    def forward(self, x: Tensor) -> Tensor:
        check_batch_statistics(self.pooling.norm, x, "the image pooling of the ASPP")
        branches, mean = self.atrous(x)
        # Resizing one pixel to H x W with aligned corners repeats it.
        image = self.pooling(mean).expand(-1, -1, *x.shape[2:])
        return self.dropout(self.project(torch.cat([image, self.pointwise(x), *branches], 1)))


def head_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    separable: bool,
    normalize_depthwise: bool,
    eps: float,
    momentum: float,
) -> nn.Module:
    """A convolution of a head with batch normalisation and ReLU, plain or (unless it is 1x1) separable."""
    if not separable or kernel_size == 1:
        return ConvNormAct(in_channels, out_channels, kernel_size, eps=eps, momentum=momentum)
    return AtrousSeparableConv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding="same",
        depthwise_norm=normalize_depthwise,
        depthwise_activation="relu" if normalize_depthwise else None,
        pointwise_norm=True,
        pointwise_activation="relu",
        eps=eps,
        momentum=momentum,
    )
