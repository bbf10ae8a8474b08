"""DeepLab v3 (Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv:1706.05587)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from deeplab_kernels.nn.init import truncated_normal_

from .backbones import Backbone, mobilenetv2, resnet50, resnet101, resnet_small
from .backbones.features import LAST_STRIDE, rates_at
from .builders import Variants, on_backbone
from .heads import ASPP, Decoder, FCNHead
from .heads.aspp import head_convolution
from .heads.fcn import AUXILIARY_STRIDE
from .layers import BN_MOMENTUM, HEAD_BN_EPS, positive_ints, resize_bilinear
from .system import BackboneModel, SegmentationModel, check_images


class DeepLabV3(BackboneModel):
    """Backbone, ASPP and a 1x1 classifier. forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    With ``auxiliary`` and in training mode: (logits, auxiliary logits), both of that shape. Sizes
    k * output_stride + 1 (513, 769) keep every resize exactly aligned.

    Args:
        backbone: a feature extractor.
        num_classes: channels of the logits.
        separable: atrous separable convolutions in place of the 3x3 convolutions behind the backbone (not in the paper;
            the SC of the v3+ paper's table 5).
        normalize_depthwise: as in :class:`deeplab_kernels.models.heads.ASPP`.
        atrous_rates: of the ASPP at output stride 16. They are doubled at 8 and halved at 32, which keeps the field of
            view in image pixels. There may be none.
        head_channels: of the ASPP.
        refine: one more 3x3 convolution after the ASPP, as torchvision and segmentation_models_pytorch have it: "plain"
            or "separable"; None for none.
        auxiliary: a second classifier on the features of nominal stride 16, for a loss in training, as torchvision's
            trained weights have it.
        dropout: after the ASPP's projection, in training.
        align_corners: of every resize. True in the official code, False in torchvision.
        momentum: of the heads' batch normalisations.
        decoder: (channels of the ASPP) -> what refines its feature with low-level ones; None for nothing. See
            :class:`deeplab_kernels.models.deeplabv3plus.DeepLabV3Plus`.
        low_level_strides: nominal strides of the low-level features that the decoder takes, in its order.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        decoder: Callable[[int], Decoder] | None = None,
        low_level_strides: Sequence[int] = (),
        *,
        separable: bool = False,
        normalize_depthwise: bool = True,
        atrous_rates: Sequence[int] = (6, 12, 18),
        head_channels: int = 256,
        refine: Literal["plain", "separable"] | None = None,
        auxiliary: bool = False,
        dropout: float = 0.1,
        align_corners: bool = True,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        if refine not in (None, "plain", "separable"):
            raise ValueError(f"refine must be 'plain', 'separable' or None, got {refine!r}")
        self.num_classes = num_classes
        self.separable, self.align_corners = separable, align_corners
        self.atrous_rates = positive_ints(atrous_rates, "atrous_rates", empty=True)
        self.low_level_strides = tuple(low_level_strides)
        self.backbone = backbone
        options: dict[str, Any] = {
            "separable": separable,
            "normalize_depthwise": normalize_depthwise,
            "momentum": momentum,
        }
        self.aspp = ASPP(backbone.out_channels, head_channels, atrous_rates, dropout=dropout, **options)
        self.refine: nn.Module | None = None
        if refine is not None:
            options["separable"] = refine == "separable"
            self.refine = head_convolution(head_channels, head_channels, eps=HEAD_BN_EPS, **options)
        self.decoder = decoder(head_channels) if decoder is not None else None
        self.classifier = nn.Conv2d(self.decoder.out_channels if self.decoder else head_channels, num_classes, 1)
        truncated_normal_(self.classifier.weight, 0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]
        self.aux_classifier = FCNHead(backbone.channels[AUXILIARY_STRIDE], num_classes) if auxiliary else None
        self.set_output_stride(backbone.output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        super().set_output_stride(output_stride)
        self.aspp.set_rates(rates_at(output_stride, self.atrous_rates, own=16))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_images(x)
        auxiliary = self.training and self.aux_classifier is not None
        strides = {*self.low_level_strides, LAST_STRIDE, *((AUXILIARY_STRIDE,) if auxiliary else ())}
        maps = dict(zip(sorted(strides), self.backbone.pyramid(x, sorted(strides)), strict=True))
        features = self.aspp(maps.pop(LAST_STRIDE))
        if self.refine is not None:
            features = self.refine(features)
        if self.decoder is not None:
            features = self.decoder(features, *(maps[stride] for stride in self.low_level_strides))
        logits = self._to_image(self.classifier(features), x)
        if self.aux_classifier is not None and auxiliary:
            return logits, self._to_image(self.aux_classifier(maps[AUXILIARY_STRIDE]), x)
        return logits

    def _to_image(self, logits: Tensor, x: Tensor) -> Tensor:
        return resize_bilinear(logits, x.shape[2:], align_corners=self.align_corners)


# What the ports leave at PyTorch's defaults, and their dropout.
_PORT: dict[str, Any] = {"momentum": 0.1, "dropout": 0.5}
# The rates of the three units of the last stage at output stride 16, 2 * (1, 2, 4), include the first.
_RESNET_PAPER: dict[str, Any] = {"multi_grid": (1, 2, 4), "dilate_strided_unit": True, "momentum": BN_MOMENTUM}
_RESNET_OFFICIAL: dict[str, Any] = {
    "stem": "3x3",
    "strided_unit": "last",
    "multi_grid": (1, 2, 4),
    "momentum": BN_MOMENTUM,
}
_SMP: dict[str, Any] = {**_PORT, "normalize_depthwise": False, "refine": "plain", "dilate_strided_unit": True}
_MOBILENET_SMP: dict[str, Any] = {**_SMP, "last_convolution": True, "eps": 1e-5}

RESNET: Variants = {
    "paper": _RESNET_PAPER,
    "official": _RESNET_OFFICIAL,
    "torchvision": {**_PORT, "output_stride": 8, "refine": "plain", "align_corners": False},
    "smp": {**_SMP, "output_stride": 8},
}
MOBILENET: Variants = {
    # Sandler et al., arXiv:1801.04381, section 6.3: the ASPP without its atrous branches.
    "paper": {"atrous_rates": ()},
    "official": {"atrous_rates": (), "tf_padding": True},
    "smp": {**_MOBILENET_SMP, "output_stride": 8},
}
# For images of about 128 x 128, and batch normalisations that forget fast enough for a few hundred steps.
SMALL: Mapping[str, Any] = {
    "atrous_rates": (2, 4, 6),
    "head_channels": 64,
    "dropout": 0.0,
    "momentum": 0.05,
}

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "deeplabv3_resnet50": on_backbone(DeepLabV3, resnet50, RESNET),
    "deeplabv3_resnet101": on_backbone(DeepLabV3, resnet101, RESNET),
    "deeplabv3_mobilenetv2": on_backbone(DeepLabV3, mobilenetv2, MOBILENET),
    "deeplabv3_small": on_backbone(
        DeepLabV3, resnet_small, {"paper": {**SMALL, "multi_grid": (1, 2), "dilate_strided_unit": True}}
    ),
}
