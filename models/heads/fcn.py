"""The convolutional head that torchvision's FCN has, and the auxiliary classifiers of PSPNet and others."""

from __future__ import annotations

from torch import nn

AUXILIARY_STRIDE = 16  # nominal, of the features that auxiliary classifiers see: the third stage of a ResNet


class FCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, batch normalisation, ReLU, dropout, 1x1 convolution.

    (N, in_channels, h, w) -> scores (N, num_classes, h, w), with the parameter names of torchvision's.
    """

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float = 0.1) -> None:
        channels = in_channels // 4
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )
