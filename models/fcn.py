"""Fully convolutional networks (Long, Shelhamer, Darrell: arXiv:1411.4038) on VGG-16, and torchvision's on ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .backbones import VGG, Backbone, resnet50, resnet101, vgg16, vgg_small
from .backbones.features import LAST_STRIDE
from .backbones.vgg import FC6_KERNEL, FC_CHANNELS
from .builders import PAPER, on_backbone
from .heads import FCNHead, ScoreBranch
from .heads.fcn import AUXILIARY_STRIDE
from .system import BackboneModel, SegmentationModel, check_images
from .upsampling import BilinearDeconvolution, resize_centred

_SKIP_STAGE = {8: 2, 16: 3}  # stride -> index of the pooling, pool3 and pool4


class FCN(BackboneModel):
    """FCN-32s, -16s and -8s. forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    VGG-16 with its fully connected layers as convolutions and a 1x1 score layer; scores of pool4 and pool3 are added
    after upsampling by 2 with a deconvolution that starts bilinear and is learned; the last upsampling is fixed
    bilinear. Scores of skips start at 0, so that the network starts as the coarser one.

    The original pads the image by 100 pixels, since its fc6 is not padded, and crops with offsets found by
    trial. Here fc6 is padded by 3 and poolings keep incomplete windows: feature i of stride s stands for the pixels s i
    to s i + s - 1 everywhere, and all crops start at the first pixel.

    Args:
        backbone: with 2x2 poolings (``aligned=False``).
        stride: 32, 16 or 8: of the finest scores.
        hidden, kernel_size: channels of fc6 and fc7, and the size of fc6.
        norm, dropout: as of :class:`deeplab_kernels.models.heads.ScoreBranch`.
    """

    backbone: VGG

    def __init__(
        self,
        backbone: VGG,
        num_classes: int,
        *,
        stride: int = 8,
        hidden: int = FC_CHANNELS,
        kernel_size: int = FC6_KERNEL,
        norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"stride must be 8, 16 or 32, got {stride!r}")
        if backbone.aligned:
            raise ValueError("backbone must have 2x2 poolings: aligned must be False, got True")
        self.num_classes, self.stride = num_classes, stride
        self.backbone = backbone
        self.head = ScoreBranch(backbone.out_channels, num_classes, hidden, kernel_size, norm=norm, dropout=dropout)
        skips = [s for s in (16, 8) if s >= stride]
        self.skips = nn.ModuleList(nn.Conv2d(backbone.widths[_SKIP_STAGE[s]], num_classes, 1) for s in skips)
        self.deconvolutions = nn.ModuleList(BilinearDeconvolution(num_classes, 2) for _ in skips)
        for parameter in self.skips.parameters():
            nn.init.zeros_(parameter)

    def set_output_stride(self, output_stride: int) -> None:
        """Raises ValueError unless ``output_stride`` is 32: skips, not atrous convolution, make FCN's scores denser."""
        if output_stride != 32:
            raise ValueError(f"output_stride must be 32, the only one of FCN on VGG-16, got {output_stride!r}")

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        maps = self.backbone.pools(x)
        scores = self.head(maps[-1])
        for stage, skip, deconvolution in zip((3, 2), self.skips, self.deconvolutions, strict=False):
            finer = skip(maps[stage])
            scores = deconvolution(scores)[:, :, : finer.shape[2], : finer.shape[3]] + finer
        scores = resize_centred(scores, [self.stride * n for n in scores.shape[2:]])
        return scores[:, :, : x.shape[2], : x.shape[3]]


class FCNOnBackbone(BackboneModel):
    """torchvision's FCN: a head on the last features, logits resized to the image.

    forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1. With ``auxiliary`` and in training mode:
    (logits, auxiliary logits), both of that shape.

    Args:
        auxiliary: a second head on the features of nominal stride 16, for a loss in training; torchvision's trained
            weights have it.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, auxiliary: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.classifier = FCNHead(backbone.out_channels, num_classes, dropout=dropout)
        self.aux_classifier: FCNHead | None = None
        if auxiliary:
            self.aux_classifier = FCNHead(backbone.channels[AUXILIARY_STRIDE], num_classes, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_images(x)
        size = x.shape[2:]
        if self.training and self.aux_classifier is not None:
            middle, features = self.backbone.pyramid(x, (AUXILIARY_STRIDE, LAST_STRIDE))
            return (
                resize_centred(self.classifier(features), size),
                resize_centred(self.aux_classifier(middle), size),
            )
        (features,) = self.backbone.pyramid(x, (LAST_STRIDE,))
        return resize_centred(self.classifier(features), size)


def _on_vgg(backbone: Callable[..., VGG], stride: int, **options: Any) -> Callable[..., SegmentationModel]:
    variant = {"output_stride": 32, "aligned": False, "stride": stride, **options}
    return on_backbone(FCN, backbone, {PAPER: variant})


_TORCHVISION = {"torchvision": {"output_stride": 8}}

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "fcn32s_vgg16": _on_vgg(vgg16, 32),
    "fcn16s_vgg16": _on_vgg(vgg16, 16),
    "fcn8s_vgg16": _on_vgg(vgg16, 8),
    "fcn8s_small": _on_vgg(vgg_small, 8, hidden=96, kernel_size=3, norm=True, dropout=0.0),
    "fcn_resnet50": on_backbone(FCNOnBackbone, resnet50, _TORCHVISION),
    "fcn_resnet101": on_backbone(FCNOnBackbone, resnet101, _TORCHVISION),
}
