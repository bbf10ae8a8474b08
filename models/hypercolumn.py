"""Hypercolumns on VGG-16 for semantic segmentation (Hariharan et al., arXiv:1411.5752)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .backbones import Backbone, vgg16, vgg_small
from .backbones.features import LAST_STRIDE, rates_at
from .builders import PAPER, on_backbone
from .heads import FullyConnected, Hypercolumn
from .heads.atrous_scores import set_rate
from .layers import positive_ints, resize_bilinear
from .system import BackboneModel, SegmentationModel, check_images


class HypercolumnNet(BackboneModel):
    """Backbone, fc6 and fc7 as convolutions, and a classifier of hypercolumns, resized to the image.

    forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1. The paper classifies the pixels of given
    boxes; this is its hypercolumn as the head of a network for whole images.

    Args:
        strides: nominal strides of the backbone's features in the hypercolumn, ascending; fc7 is always the last part.
            (4, 16) are conv3_3 and conv5_3 of VGG-16.
        channels: of each part of the hypercolumn.
        hidden, rate: channels of fc6 and fc7, and the rate of fc6 (3x3) at output stride 8, as in LargeFOV.
        norm, dropout, momentum: as of the heads.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        strides: Sequence[int] = (4, 16),
        channels: int = 256,
        hidden: int = 1024,
        rate: int = 12,
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.strides = positive_ints(strides, "strides")
        allowed = [s for s in backbone.channels if s < LAST_STRIDE]
        if list(self.strides) != sorted(set(self.strides)) or not set(self.strides) <= set(allowed):
            raise ValueError(f"strides must be ascending and among {', '.join(map(str, allowed))}, got {strides!r}")
        self.num_classes, self.rate = num_classes, rate
        self.backbone = backbone
        self.fc = FullyConnected(backbone.out_channels, hidden, norm=norm, dropout=dropout, momentum=momentum)
        self.head = Hypercolumn(
            [*(backbone.channels[s] for s in self.strides), hidden],
            num_classes,
            channels,
            norm=norm,
            momentum=momentum,
        )
        self.set_output_stride(backbone.output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        super().set_output_stride(output_stride)
        set_rate(self.fc.fc6, *rates_at(output_stride, [self.rate], own=8))

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        *maps, deepest = self.backbone.pyramid(x, (*self.strides, LAST_STRIDE))
        return resize_bilinear(self.head([*maps, self.fc(deepest)]), x.shape[2:])


_SMALL = {"output_stride": 16, "channels": 32, "hidden": 64, "rate": 5, "norm": True, "dropout": 0.0}

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "hypercolumn_vgg16": on_backbone(HypercolumnNet, vgg16, {PAPER: {"output_stride": 32}}),
    "hypercolumn_small": on_backbone(HypercolumnNet, vgg_small, {PAPER: _SMALL}),
}
