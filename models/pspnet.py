"""PSPNet (Zhao et al., Pyramid Scene Parsing Network, arXiv:1612.01105)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .backbones import Backbone, resnet50, resnet101, resnet_small
from .builders import PAPER, on_backbone
from .heads import FCNHead
from .heads.fcn import AUXILIARY_STRIDE
from .heads.pyramid_pooling import PyramidPooling
from .layers import HEAD_BN_EPS, ConvNormAct, resize_bilinear
from .system import BackboneModel, SegmentationModel, check_images


class PSPNet(BackboneModel):
    """Backbone, pyramid pooling, a convolution and a classifier.

    forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1; with ``auxiliary`` and in training
    mode (logits, auxiliary logits), both of that shape. Sizes ``output_stride * k + 1`` keep every resize aligned.

    Args:
        backbone: its features of nominal stride ``feature_stride`` are pooled.
        bins: of the pyramid.
        channels: of the convolution after it.
        kernel_size, classifier_kernel_size: of that convolution, 3 in the paper, and of the classifier, 1.
        normalize_global: as of :class:`deeplab_kernels.models.heads.PyramidPooling`.
        dropout, drop_channels: share of the values, or of whole channels, dropped before the classifier in training.
        auxiliary: a second classifier on the features of nominal stride 16, for a loss in training.
        momentum: of the head's batch normalisations.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        feature_stride: int = 32,
        bins: Sequence[int] = (1, 2, 3, 6),
        channels: int = 512,
        kernel_size: int = 3,
        classifier_kernel_size: int = 1,
        normalize_global: bool = True,
        dropout: float = 0.1,
        drop_channels: bool = False,
        auxiliary: bool = False,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        for name, size in (("kernel_size", kernel_size), ("classifier_kernel_size", classifier_kernel_size)):
            if size not in (1, 3):
                raise ValueError(f"{name} must be 1 or 3, got {size!r}")
        if feature_stride not in backbone.channels:
            raise ValueError(
                f"feature_stride must be one of {', '.join(map(str, backbone.channels))}, got {feature_stride!r}"
            )
        self.num_classes, self.feature_stride = num_classes, feature_stride
        self.backbone = backbone
        self.pyramid_pooling = PyramidPooling(
            backbone.channels[feature_stride], bins, normalize_global=normalize_global, momentum=momentum
        )
        self.project = ConvNormAct(
            self.pyramid_pooling.out_channels, channels, kernel_size, eps=HEAD_BN_EPS, momentum=momentum
        )
        self.dropout = (nn.Dropout2d if drop_channels else nn.Dropout)(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, classifier_kernel_size, padding=classifier_kernel_size // 2)
        self.aux_classifier = (
            FCNHead(backbone.channels[AUXILIARY_STRIDE], num_classes, dropout=dropout) if auxiliary else None
        )

    @property
    def output_stride(self) -> int:
        """Input pixels per pixel of the pooled features."""
        return min(self.backbone.output_stride, self.feature_stride)

    def _logits(self, features: Tensor, size: Sequence[int]) -> Tensor:
        features = self.dropout(self.project(self.pyramid_pooling(features)))
        return resize_bilinear(self.classifier(features), (size[0], size[1]))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_images(x)
        size = x.shape[2:]
        if self.training and self.aux_classifier is not None:
            maps = self.backbone.pyramid(x, (AUXILIARY_STRIDE, self.feature_stride))
            deep, middle = (maps[-1], maps[0]) if self.feature_stride >= AUXILIARY_STRIDE else (maps[0], maps[-1])
            return self._logits(deep, size), resize_bilinear(self.aux_classifier(middle), size)
        (features,) = self.backbone.pyramid(x, (self.feature_stride,))
        return self._logits(features, size)


# segmentation_models_pytorch's PSPNet with its defaults: the encoder ends at stride 8 (its depth 3; depth 5 is
# feature_stride 32 at output stride 32), so that nothing is atrous.
SMP_OPTIONS: dict[str, Any] = {
    "feature_stride": 8,
    "kernel_size": 1,
    "classifier_kernel_size": 3,
    "normalize_global": False,
    "dropout": 0.2,
    "drop_channels": True,
}

_VARIANTS = {PAPER: {"output_stride": 8}, "smp": {"output_stride": 32, **SMP_OPTIONS}}

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "pspnet_resnet50": on_backbone(PSPNet, resnet50, _VARIANTS),
    "pspnet_resnet101": on_backbone(PSPNet, resnet101, _VARIANTS),
    "pspnet_small": on_backbone(PSPNet, resnet_small, {PAPER: {"output_stride": 8, "channels": 64, "dropout": 0.0}}),
}
