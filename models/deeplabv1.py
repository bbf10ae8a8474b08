"""DeepLab v1, LargeFOV (Chen et al., Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs,
arXiv:1412.7062)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .backbones import VGG, Backbone, resnet101, vgg16, vgg16_bn, vgg_small
from .backbones.features import LAST_STRIDE, rates_at
from .builders import PAPER, on_backbone
from .heads import AtrousScores
from .layers import positive_ints, resize_bilinear
from .multi_scale import check_scales, max_over_scales, score_maps
from .system import BackboneModel, SegmentationModel, check_images


class AtrousScoring(BackboneModel):
    """DeepLab v1 and v2: a backbone, the summed scores of atrous branches, and their bilinear resize to the image.

    forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1. Sizes ``output_stride * k + 1`` (321) keep
    the resize exactly aligned. ``build(..., crf=True)`` adds the dense CRF, the papers' last stage; they train the
    networks without it, so that it may as well be added to a trained one.

    Args:
        rates: of the branches at output stride 8, the papers'. At 16 they are halved, at 32 quartered (at least 1),
            which keeps the field of view in image pixels.
        scales: of the image; several are fused by their maximum at the score map
            (:func:`deeplab_kernels.models.multi_scale.max_over_scales`). May be changed at any time: the weights are
            the same.
        scale_losses: in training mode, with several scales, return (fused logits, logits of each scale ...), all
            (N, num_classes, H, W), for a loss at each scale as v2's authors train; see ``auxiliary_weight`` of
            :class:`deeplab_kernels.models.training.TrainingConfig` (theirs is 1).
        hidden, norm, dropout, momentum: as of :class:`deeplab_kernels.models.heads.AtrousScores`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        rates: Sequence[int] = (12,),
        hidden: int | None = 1024,
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
        scales: Sequence[float] = (1.0,),
        scale_losses: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.atrous_rates = positive_ints(rates, "rates")
        self.scales = check_scales(scales)
        self.scale_losses = scale_losses
        self.backbone = backbone
        self.head = AtrousScores(
            backbone.out_channels, num_classes, rates, hidden, norm=norm, dropout=dropout, momentum=momentum
        )
        self.set_output_stride(backbone.output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        super().set_output_stride(output_stride)
        self.head.set_rates(rates_at(output_stride, self.atrous_rates, own=8))

    def scores(self, x: Tensor) -> Tensor:
        """The score map of one scale: (N, num_classes, ceil(H / output_stride), ceil(W / output_stride))."""
        (features,) = self.backbone.pyramid(x, (LAST_STRIDE,))
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_images(x)
        maps = score_maps(self.scores, x, self.scales)
        logits = resize_bilinear(max_over_scales(maps), x.shape[2:])
        if self.training and self.scale_losses and len(maps) > 1:
            return logits, *(resize_bilinear(scores, x.shape[2:]) for scores in maps.values())
        return logits


def on_vgg(backbone: Callable[..., VGG], rates: Sequence[int], **options: Any) -> Callable[..., SegmentationModel]:
    """The builder of v1 or v2 on VGG-16."""
    return on_backbone(AtrousScoring, backbone, {PAPER: {"output_stride": 8, "rates": rates, **options}})


def on_resnet101(rates: Sequence[int]) -> Callable[..., SegmentationModel]:
    """The builder of v1 or v2 on ResNet-101: branches of one 3x3 convolution. The papers' network is the Caffe one,
    strided in the first 1x1 convolution of a unit; the variant "torchvision" is strided in the 3x3."""
    common = {"output_stride": 8, "rates": rates, "hidden": None}
    variants = {name: {**common, "strided_conv": conv} for name, conv in ((PAPER, 1), ("torchvision", 2))}
    return on_backbone(AtrousScoring, resnet101, variants)


# For images of about 128 x 128, whose maps of 17 x 17 are 0.4 of the papers' 41 x 41: so are the rates of the small
# models, here and in v2.
SMALL: dict[str, Any] = {"hidden": 64, "norm": True, "dropout": 0.0}
LARGE_FOV = (12,)
_RELEASED: dict[str, Any] = {"average_pooling": True}  # of LargeFOV alone; v2's have none

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "deeplabv1_vgg16": on_vgg(vgg16, LARGE_FOV, **_RELEASED),
    "deeplabv1_vgg16_bn": on_vgg(vgg16_bn, LARGE_FOV, norm=True, **_RELEASED),
    "deeplabv1_resnet101": on_resnet101(LARGE_FOV),
    "deeplabv1_small": on_vgg(vgg_small, (5,), **SMALL),
}
