"""Modified aligned Xception, the backbone of DeepLab v3+ (Chen et al., arXiv:1802.02611, section 3.2 and figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.nn.init import truncated_normal_

from ..layers import BACKBONE_BN_EPS, BN_MOMENTUM, ConvNormAct, positive_ints
from .features import LAST_STRIDE, STEM_STRIDE, Backbone, strides_and_rates

WEIGHT_STD = 0.09  # of the truncated normal distribution that the official code draws every weight from


@dataclass(frozen=True)
class BlockConfig:
    """One Xception block: three separable convolutions, the stride in the third."""

    channels: tuple[int, int, int]
    stride: int = 1
    shortcut: Literal["conv", "identity", "none"] = "conv"
    inner_activation: bool = False
    """False: ReLU before each separable convolution. True: after its depthwise and after its pointwise half."""


class XceptionBlock(nn.Module):
    """Three separable convolutions and a shortcut. See :class:`BlockConfig`."""

    def __init__(self, in_channels: int, config: BlockConfig, *, eps: float, momentum: float) -> None:
        super().__init__()
        inner = "relu" if config.inner_activation else None
        channels = (in_channels, *config.channels)
        self.convs = nn.ModuleList(
            AtrousSeparableConv2d(
                channels[i],
                channels[i + 1],
                kernel_size=3,
                padding="same",
                depthwise_norm=True,
                depthwise_activation=inner,
                pointwise_norm=True,
                pointwise_activation=inner,
                pre_activation=None if config.inner_activation else "relu",
                eps=eps,
                momentum=momentum,
                weight_std=(WEIGHT_STD, WEIGHT_STD),
            )
            for i in range(3)
        )
        self.shortcut: nn.Module | None = None
        if config.shortcut == "conv":
            self.shortcut = ConvNormAct(in_channels, channels[-1], activation=None, eps=eps, momentum=momentum)
        elif config.shortcut == "identity":
            self.shortcut = nn.Identity()
        self.config = config

    def set_geometry(self, stride: int, rates: Sequence[int]) -> None:
        """Sets the stride of the block and the rate of each of its three convolutions; weights stay as they are."""
        for i, (conv, rate) in enumerate(zip(self.convs, rates, strict=True)):
            assert isinstance(conv, AtrousSeparableConv2d)
            conv.stride = (stride, stride) if i == 2 else (1, 1)
            conv.dilation = (rate, rate)
        if isinstance(self.shortcut, ConvNormAct):
            self.shortcut.set_stride(stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and what the second convolution gave (the decoder's low-level feature is one of those)."""
        second = self.convs[1](self.convs[0](x))
        last = self.convs[2]
        if self.shortcut is None:
            return last(second), second
        # One operator adds the shortcut too; the others have it after their activation, or have been put in its place.
        if isinstance(last, AtrousSeparableConv2d) and last.pointwise_activation is None:
            return last(second, self.shortcut(x)), second
        return last(second) + self.shortcut(x), second


class Xception(Backbone):
    """Modified aligned Xception as a feature extractor. forward: (N, 3, H, W) -> :class:`Features`.

    Args:
        blocks: entry, middle and exit flow in order.
        stem_channels: of the two 3x3 convolutions in front, the first with stride 2.
        output_stride: 8, 16 or 32; see :meth:`set_output_stride`.
        multi_grid: multiplies the rates of the three convolutions of the last block.
        eps, momentum: of every batch normalisation. The official decay 0.9997 is momentum 3e-4.

    Every stride-2 convolution uses fixed padding, so that any H, W >= 1 works, and sizes 32 k + 1 keep the corners of
    all feature maps aligned with those of the image.
    """

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        stem_channels: tuple[int, int] = (32, 64),
        *,
        output_stride: int = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        eps: float = BACKBONE_BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        self.multi_grid = positive_ints(multi_grid, "multi_grid", 3)
        self.stem = nn.Sequential(
            ConvNormAct(3, stem_channels[0], 3, stride=2, eps=eps, momentum=momentum),
            ConvNormAct(stem_channels[0], stem_channels[1], 3, eps=eps, momentum=momentum),
        )
        channels, stride = stem_channels[1], STEM_STRIDE
        self.blocks = nn.ModuleList()
        self.channels: dict[int, int] = {}
        # The last feature map of a stride lies inside the block that leaves it (for stride 4 entry_flow/block2 of
        # Xception-41 and -65, block3 of -71; separable_conv2_pointwise in the official code).
        self._leaving: dict[int, int] = {}
        for index, config in enumerate(blocks):
            if config.stride > 1:
                self._leaving[index] = stride
                self.channels[stride] = config.channels[1]
            self.blocks.append(XceptionBlock(channels, config, eps=eps, momentum=momentum))
            channels = config.channels[-1]
            stride *= config.stride
        self.channels[LAST_STRIDE] = channels
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                truncated_normal_(module.conv.weight, WEIGHT_STD)
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """See :class:`Backbone`. A block reached at the target stride keeps it, and the blocks after it take its stride
        into their rate."""
        natural = [block.config.stride for block in self.blocks]  # type: ignore[union-attr]
        geometry = strides_and_rates(natural, STEM_STRIDE, output_stride)  # type: ignore[arg-type]
        for block, (stride, rate, _) in zip(self.blocks, geometry, strict=True):
            assert isinstance(block, XceptionBlock)
            grid = self.multi_grid if block is self.blocks[-1] else (1, 1, 1)
            block.set_geometry(stride, [rate * g for g in grid])
        self.output_stride = output_stride

    def pyramid(self, x: Tensor, strides: Sequence[int] | None = None) -> list[Tensor]:
        """See :class:`Backbone`. All maps but the last are taken after a batch normalisation, before any activation."""
        wanted = self.wanted_strides(strides)
        features = []
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x, second = block(x)
            if self._leaving.get(index) in wanted:
                features.append(second)
            del second  # not to be kept while the next block runs
        return [*features, x] if LAST_STRIDE in wanted else features


def _flows(
    entry: Sequence[tuple[int, int]], middle: int, exit_1: tuple[int, int, int], exit_2: tuple[int, int, int]
) -> list[BlockConfig]:
    """Entry blocks as (channels, stride), the number of middle blocks, the channels of the two exit blocks."""
    width = entry[-1][0]
    return [
        *(BlockConfig((c, c, c), stride) for c, stride in entry),
        *[BlockConfig((width, width, width), shortcut="identity")] * middle,
        BlockConfig(exit_1, stride=2),
        BlockConfig(exit_2, shortcut="none", inner_activation=True),
    ]


_ENTRY = [(128, 2), (256, 2), (728, 2)]
_ENTRY_71 = [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)]
_EXIT = (728, 1024, 1024), (1536, 1536, 2048)


# Builders: keyword arguments of Xception -> Xception.
xception41 = partial(Xception, _flows(_ENTRY, 8, *_EXIT))
xception65 = partial(Xception, _flows(_ENTRY, 16, *_EXIT))
xception71 = partial(Xception, _flows(_ENTRY_71, 16, *_EXIT))
# The same structure at a width and depth that train on a CPU.
xception_small = partial(
    Xception, _flows([(32, 2), (64, 2), (128, 2)], 2, (128, 160, 160), (192, 192, 256)), stem_channels=(16, 32)
)
