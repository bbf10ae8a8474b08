"""DeepLab v3+ (Chen et al., Encoder-Decoder with Atrous Separable Convolution, arXiv:1802.02611)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .backbones import (
    Backbone,
    mobilenetv2,
    resnet50,
    resnet101,
    xception41,
    xception65,
    xception71,
    xception_small,
)
from .builders import Variants, on_backbone
from .deeplabv3 import MOBILENET as V3_MOBILENET
from .deeplabv3 import RESNET as V3_RESNET
from .deeplabv3 import SMALL, DeepLabV3
from .heads import Decoder
from .layers import BN_MOMENTUM, positive_ints
from .system import SegmentationModel

# Nominal strides of the paper's Conv2 and Conv3, coarsest first, as the decoder takes them.
LOW_LEVEL = {"conv2": (4,), "conv3": (8,), "conv2+conv3": (8, 4)}


class DeepLabV3Plus(DeepLabV3):
    """DeepLab v3 with a decoder. forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    Args:
        decoder: False is the paper's naive decoder: the logits are resized by the output stride in one step.
        low_level: the decoder's low-level features: "conv2", the last of stride 4; "conv3", the last of stride 8; or
            "conv2+conv3", one decoder after the other (the paper's table 2).
        low_level_channels: what they are reduced to (table 1: 8 to 64, best 48).
        decoder_channels, decoder_convs, decoder_kernel: channels (None for ``head_channels``), number and kernel size
            of the decoder's convolutions; table 2 has 256 or 128, one to three, 3 or 1.
        separable: atrous separable convolutions in the ASPP and the decoder (SC in table 5).
        options: those of :class:`deeplab_kernels.models.deeplabv3.DeepLabV3`: normalize_depthwise, atrous_rates,
            head_channels, refine, auxiliary, dropout, align_corners, momentum.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        decoder: bool = True,
        separable: bool = True,
        low_level: Literal["conv2", "conv3", "conv2+conv3"] = "conv2",
        low_level_channels: int = 48,
        decoder_channels: int | None = None,
        decoder_convs: int = 2,
        decoder_kernel: int = 3,
        normalize_depthwise: bool = True,
        atrous_rates: Sequence[int] = (6, 12, 18),
        head_channels: int = 256,
        refine: Literal["plain", "separable"] | None = None,
        auxiliary: bool = False,
        dropout: float = 0.1,
        align_corners: bool = True,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        if low_level not in LOW_LEVEL:
            raise ValueError(f"low_level must be {' or '.join(map(repr, LOW_LEVEL))}, got {low_level!r}")
        if decoder_kernel not in (1, 3):
            raise ValueError(f"decoder_kernel must be 1 or 3, got {decoder_kernel!r}")
        positive_ints((low_level_channels, decoder_convs), "low_level_channels and decoder_convs")
        strides = LOW_LEVEL[low_level]

        def build_decoder(channels: int) -> Decoder:
            built: Decoder | None = None
            for stride in strides:
                built = Decoder(
                    channels,
                    backbone.channels[stride],
                    channels if decoder_channels is None else decoder_channels,
                    low_level_channels,
                    decoder_convs,
                    coarser=built,
                    kernel_size=decoder_kernel,
                    separable=separable,
                    normalize_depthwise=normalize_depthwise,
                    align_corners=align_corners,
                    momentum=momentum,
                )
            assert built is not None
            return built

        super().__init__(
            backbone,
            num_classes,
            build_decoder if decoder else None,
            strides if decoder else (),
            separable=separable,
            normalize_depthwise=normalize_depthwise,
            atrous_rates=atrous_rates,
            head_channels=head_channels,
            refine=refine,
            auxiliary=auxiliary,
            dropout=dropout,
            align_corners=align_corners,
            momentum=momentum,
        )


# segmentation_models_pytorch's departures from the paper: a separable convolution after the ASPP, one not two in the
# decoder, no normalisation between the halves, and rates of 12, 24 and 36 at output stride 16.
_SMP: dict[str, Any] = {"refine": "separable", "decoder_convs": 1, "atrous_rates": (12, 24, 36), "output_stride": 16}

RESNET: Variants = {
    "paper": V3_RESNET["paper"],
    "official": V3_RESNET["official"],
    "smp": {**V3_RESNET["smp"], **_SMP},
}
MOBILENET: Variants = {"paper": {}, "smp": {**V3_MOBILENET["smp"], **_SMP}}

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "deeplabv3plus_xception41": on_backbone(DeepLabV3Plus, xception41),
    "deeplabv3plus_xception65": on_backbone(DeepLabV3Plus, xception65),
    "deeplabv3plus_xception71": on_backbone(DeepLabV3Plus, xception71),
    "deeplabv3plus_resnet50": on_backbone(DeepLabV3Plus, resnet50, RESNET),
    "deeplabv3plus_resnet101": on_backbone(DeepLabV3Plus, resnet101, RESNET),
    "deeplabv3plus_mobilenetv2": on_backbone(DeepLabV3Plus, mobilenetv2, MOBILENET),
    "deeplabv3plus_small": on_backbone(DeepLabV3Plus, xception_small, {"paper": {**SMALL, "low_level_channels": 24}}),
}
