"""MobileNetV2 (Sandler et al., arXiv:1801.04381) with atrous convolution, a small backbone of DeepLab v3 and v3+."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.nn.init import truncated_normal_

from ..layers import BACKBONE_BN_EPS, ConvNormAct
from .features import LAST_STRIDE, STEM_STRIDE, Backbone, strides_and_rates

BN_MOMENTUM = 3e-3  # the official decay of 0.997
WEIGHT_STD = 0.09
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


class Stage(NamedTuple):
    """A row of the paper's table 2."""

    expansion: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least ``divisor``, and not more than 10 % below."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _pad_as_tensorflow(x: Tensor) -> Tensor:
    """The padding of TensorFlow's SAME for a 3x3 convolution with stride 2: one row before only where H is odd."""
    top, left = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (left, 1, top, 1))


class InvertedResidual(nn.Module):
    """1x1 expansion with ReLU6, depthwise 3x3 with ReLU6, linear 1x1; with a shortcut where the shapes agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        *,
        tf_padding: bool,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__()
        hidden = divisible(in_channels * expansion)
        self.expand: ConvNormAct | None = None
        if expansion > 1:
            self.expand = ConvNormAct(in_channels, hidden, activation="relu6", eps=eps, momentum=momentum)
        self.separable = AtrousSeparableConv2d(
            hidden,
            out_channels,
            3,
            padding="same",
            depthwise_norm=True,
            depthwise_activation="relu6",
            pointwise_norm=True,
            eps=eps,
            momentum=momentum,
            weight_std=(WEIGHT_STD, WEIGHT_STD),
        )
        self.natural_stride = stride
        self.tf_padding = tf_padding
        # By the natural stride: a block that lost it to the output stride computes the same as with it, more densely.
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def set_geometry(self, stride: int, rate: int) -> None:
        """Sets stride and rate of the depthwise convolution."""
        conv = self.separable
        conv.stride, conv.dilation = (stride, stride), (rate, rate)
        conv.padding = 0 if self._pads else "same"

    @property
    def _pads(self) -> bool:
        return self.tf_padding and self.separable.stride != (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.separable(_pad_as_tensorflow(y) if self._pads else y)
        return x + y if self.has_shortcut else y


class MobileNetV2(Backbone):
    """MobileNetV2 as a feature extractor. forward: (N, 3, H, W) -> :class:`Features`.

    Args:
        width_multiplier: of all channels; they are rounded to multiples of 8.
        last_convolution: the 1x1 convolution to 1280 channels of the classification network. The official DeepLab ends
            at the 320 channels before it; torchvision and segmentation_models_pytorch keep it.
        output_stride: 8, 16 or 32.
        dilate_strided_unit: where a block loses its stride to the output stride, the blocks *after* it get that stride
            as a factor of their rates; True gives it to the block itself too, as segmentation_models_pytorch does.
        tf_padding: pad the convolutions of stride 2 as TensorFlow's SAME does, which depends on the parity of the size:
            at even sizes by a row after the image and none before. The same as the fixed padding at sizes 32 k + 1.
            Costs a copy of the input of each.
        eps, momentum: of every batch normalisation.

    The feature of a stride is the output of its last block.
    """

    def __init__(
        self,
        *,
        width_multiplier: float = 1.0,
        last_convolution: bool = False,
        output_stride: int = 16,
        dilate_strided_unit: bool = False,
        tf_padding: bool = False,
        eps: float = BACKBONE_BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        if not width_multiplier > 0:
            raise ValueError(f"width_multiplier must be positive, got {width_multiplier!r}")
        self.dilate_strided_unit, self.tf_padding = dilate_strided_unit, tf_padding
        channels, stride = divisible(STEM_CHANNELS * width_multiplier), STEM_STRIDE
        self.stem = ConvNormAct(3, channels, 3, stride=2, activation="relu6", eps=eps, momentum=momentum)
        if tf_padding:
            self.stem.conv.padding = (0, 0)
        self.channels: dict[int, int] = {}
        self._strides: list[int] = []  # nominal ones of the blocks' outputs
        self.blocks = nn.ModuleList()
        for stage in STAGES:
            width = divisible(stage.channels * width_multiplier)
            for i in range(stage.blocks):
                block_stride = stage.stride if i == 0 else 1
                self.blocks.append(
                    InvertedResidual(
                        channels,
                        width,
                        block_stride,
                        stage.expansion,
                        tf_padding=tf_padding,
                        eps=eps,
                        momentum=momentum,
                    )
                )
                channels = width
                stride *= block_stride
                self._strides.append(stride)
                self.channels[stride] = channels
        self.last: ConvNormAct | None = None
        if last_convolution:
            last_channels = divisible(LAST_CHANNELS * max(1.0, width_multiplier))
            self.last = ConvNormAct(channels, last_channels, activation="relu6", eps=eps, momentum=momentum)
            self.channels[LAST_STRIDE] = last_channels
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                truncated_normal_(module.conv.weight, WEIGHT_STD)
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """See :class:`Backbone` and the class's ``dilate_strided_unit``."""
        natural = [block.natural_stride for block in self.blocks]  # type: ignore[union-attr]
        geometry = strides_and_rates(natural, STEM_STRIDE, output_stride)  # type: ignore[arg-type]
        for block, (stride, before, after) in zip(self.blocks, geometry, strict=True):
            assert isinstance(block, InvertedResidual)
            block.set_geometry(stride, after if self.dilate_strided_unit else before)
        self.output_stride = output_stride

    def pyramid(self, x: Tensor, strides: Sequence[int] | None = None) -> list[Tensor]:
        """See :class:`Backbone`."""
        wanted = self.wanted_strides(strides)
        features = []
        x = self.stem(_pad_as_tensorflow(x) if self.tf_padding else x)
        following = [*self._strides[1:], None]
        for block, stride, next_stride in zip(self.blocks, self._strides, following, strict=True):
            x = block(x)
            if stride != next_stride and stride in wanted and stride != LAST_STRIDE:
                features.append(x)
        if LAST_STRIDE in wanted:
            features.append(x if self.last is None else self.last(x))
        return features


# Builder: keyword arguments of MobileNetV2 -> MobileNetV2.
mobilenetv2 = MobileNetV2
