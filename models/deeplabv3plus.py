"""DeepLab v3+ (Chen et al., Encoder-Decoder with Atrous Separable Convolution, arXiv:1802.02611)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from deeplab_kernels.nn.init import truncated_normal_

from .backbones import Xception, xception41, xception65, xception71, xception_small
from .backbones.features import check_output_stride
from .heads import ASPP, Decoder
from .layers import BN_MOMENTUM, positive_ints, resize_bilinear
from .system import SegmentationModel, check_images


class DeepLabV3Plus(SegmentationModel):
    """Backbone, ASPP, decoder (or none) and a 1x1 classifier. forward: (N, 3, H, W) -> logits (N, num_classes, H, W).

    Any H, W >= 1 works. Sizes k * output_stride + 1 (513, 769) keep every resize exactly aligned.

    Args:
        backbone: with ``out_channels``, ``low_level_channels`` and ``set_output_stride``.
        num_classes: channels of the logits.
        decoder: False is the paper's naive decoder: the logits are resized by the output stride in one step.
        separable: atrous separable convolutions in the ASPP and the decoder (SC in the paper's table 5).
        atrous_rates: of the ASPP at output stride 16. They are doubled at 8 and halved at 32, which keeps the field of
            view in image pixels.
        head_channels, low_level_channels: 256 and 48 in the paper.
        decoder_convs: 3x3 convolutions of the decoder; 2 in the paper.
        dropout: after the ASPP's projection, in training.
        momentum: of the heads' batch normalisations.
    """

    def __init__(
        self,
        backbone: Xception,
        num_classes: int,
        *,
        decoder: bool = True,
        separable: bool = True,
        atrous_rates: Sequence[int] = (6, 12, 18),
        head_channels: int = 256,
        low_level_channels: int = 48,
        decoder_convs: int = 2,
        dropout: float = 0.1,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.separable = separable
        self.atrous_rates = positive_ints(atrous_rates, "atrous_rates")
        self.backbone = backbone
        self.aspp = ASPP(
            backbone.out_channels, head_channels, atrous_rates, separable=separable, dropout=dropout, momentum=momentum
        )
        self.decoder: Decoder | None = None
        if decoder:
            self.decoder = Decoder(
                head_channels,
                backbone.low_level_channels,
                head_channels,
                low_level_channels,
                decoder_convs,
                separable=separable,
                momentum=momentum,
            )
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)
        truncated_normal_(self.classifier.weight, 0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]
        self.set_output_stride(backbone.output_stride)

    @property
    def output_stride(self) -> int:
        """Input pixels per pixel of the encoder's feature, 8, 16 or 32."""
        return self.backbone.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Changes strides and rates of the built model in place. The state_dict is the same at every output stride, so
        that a model trained at 16 can be evaluated at 8.

        Raises:
            ValueError: ``output_stride`` is not 8, 16 or 32.
        """
        check_output_stride(output_stride)
        self.backbone.set_output_stride(output_stride)
        self.aspp.set_rates([max(1, rate * 16 // output_stride) for rate in self.atrous_rates])

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        low_level, features = self.backbone(x)
        features = self.aspp(features)
        if self.decoder is not None:
            features = self.decoder(features, low_level)
        return resize_bilinear(self.classifier(features), x.shape[2:])


def deeplabv3plus(
    backbone: Callable[..., Xception],
    num_classes: int = 21,
    output_stride: int = 16,
    *,
    decoder: bool = True,
    separable: bool = True,
    multi_grid: Sequence[int] = (1, 2, 4),
    atrous_rates: Sequence[int] = (6, 12, 18),
    head_channels: int = 256,
    low_level_channels: int = 48,
    decoder_convs: int = 2,
    dropout: float = 0.1,
    momentum: float = BN_MOMENTUM,
) -> DeepLabV3Plus:
    """Builds DeepLab v3+ on ``backbone``, e.g. :func:`deeplab_kernels.models.backbones.xception65`.

    ``momentum`` is that of every batch normalisation. For the other arguments see :class:`DeepLabV3Plus` and
    :class:`deeplab_kernels.models.backbones.Xception`.
    """
    return DeepLabV3Plus(
        backbone(output_stride=output_stride, multi_grid=multi_grid, momentum=momentum),
        num_classes,
        decoder=decoder,
        separable=separable,
        atrous_rates=atrous_rates,
        head_channels=head_channels,
        low_level_channels=low_level_channels,
        decoder_convs=decoder_convs,
        dropout=dropout,
        momentum=momentum,
    )


BUILDERS: dict[str, Callable[..., DeepLabV3Plus]] = {
    "deeplabv3plus_xception41": partial(deeplabv3plus, xception41),
    "deeplabv3plus_xception65": partial(deeplabv3plus, xception65),
    "deeplabv3plus_xception71": partial(deeplabv3plus, xception71),
    # Trains on a CPU in about a minute on images of about 128 x 128: the rates suit their 8 x 8 feature maps, and the
    # batch normalisations forget fast enough for a few hundred steps.
    "deeplabv3plus_small": partial(
        deeplabv3plus,
        xception_small,
        atrous_rates=(2, 4, 6),
        head_channels=64,
        low_level_channels=24,
        dropout=0.0,
        momentum=0.05,
    ),
}
