"""VGG-16 (Simonyan, Zisserman: arXiv:1409.1556), plain for FCN and as DeepLab v1 and v2 changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from deeplab_kernels.nn.init import he_uniform_

from ..layers import positive_ints
from .features import LAST_STRIDE, Backbone, check_output_stride

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)
FC6_KERNEL, FC_CHANNELS = 7, 4096  # of the classification network


class VGG(Backbone):
    """The convolutions of VGG-16. forward: (N, 3, H, W) -> :class:`Features`, the maps of conv3_3 and of pool5.

    The feature of a nominal stride is the last convolution before the next pooling: conv1_2 of 1 to conv5_3 of 16, and
    pool5 of 32. ``features`` has the order and the parameter names of torchvision's ``vgg16().features`` (``vgg16_bn``
    with ``norm``), whose weights load by name.

    Args:
        widths, convolutions: channels, and how many 3x3 convolutions, of each of the five stages.
        aligned: 3x3 poolings with padding 1, as DeepLab's: they centre every feature on an input pixel, so that sizes
            ``output_stride * k + 1`` keep corners aligned. False: the 2x2 poolings of VGG; the last one of an odd row
            takes what there is, so that (H, W) become (ceil(H / 2), ceil(W / 2)).
        average_pooling: a 3x3 average pooling of stride 1 after pool5, at every output stride: pool5a of the LargeFOV
            model that DeepLab v1's authors released. Zeros beyond the border count, as in Caffe.
        norm: batch normalisation after every convolution.
        output_stride: 8, 16 or 32; 32 alone where ``aligned`` is False. See :meth:`set_output_stride`.
        momentum: of the batch normalisations.
    """

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        convolutions: Sequence[int] = CONVOLUTIONS,
        *,
        aligned: bool = True,
        average_pooling: bool = False,
        norm: bool = False,
        output_stride: int = 8,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.widths = positive_ints(widths, "widths", 5)
        convolutions = positive_ints(convolutions, "convolutions", 5)
        self.aligned = aligned
        layers: list[nn.Module] = []
        for (before, width), count in zip(pairwise((3, *self.widths)), convolutions, strict=True):
            for i in range(count):
                layers.append(he_uniform_(nn.Conv2d(before if i == 0 else width, width, 3)))
                if norm:
                    layers.append(nn.BatchNorm2d(width, momentum=momentum))
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.MaxPool2d(3, 2, 1) if aligned else nn.MaxPool2d(2, 2, ceil_mode=True))
        if average_pooling:
            layers.append(nn.AvgPool2d(3, 1, 1))
        self.features = nn.Sequential(*layers)
        self.channels = {1 << i: width for i, width in enumerate((*self.widths, self.widths[-1]))}
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """See :class:`Backbone`. At 8 pool4 and pool5 have stride 1 and conv5 rate 2, as in DeepLab v1 and v2; at 16
        pool5 alone has stride 1. With 2x2 poolings there is 32 alone."""
        check_output_stride(output_stride)
        if not self.aligned and output_stride != 32:
            raise ValueError(f"output_stride must be 32 with 2x2 poolings, got {output_stride}")
        stride = rate = 1
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (rate, rate)
            elif isinstance(layer, nn.MaxPool2d):
                if stride < output_stride:
                    layer.stride = 2
                    stride *= 2
                else:
                    layer.stride = 1
                    rate *= 2
        self.output_stride = output_stride

    def pools(self, x: Tensor) -> list[Tensor]:
        """The maps after the five poolings, (N, widths[i], ceil(H / s), ceil(W / s)) with s = 2, 4, 8, then up to the
        output stride."""
        maps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
        return maps

    def pyramid(self, x: Tensor, strides: Sequence[int] | None = None) -> list[Tensor]:
        """See :class:`Backbone`. All maps are taken after ReLU."""
        wanted = self.wanted_strides(strides)
        maps = []
        nominal = 1
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                if nominal in wanted:
                    maps.append(x)
                if nominal == max(wanted, default=0):
                    break
                nominal *= 2
            x = layer(x)
        return [*maps, x] if LAST_STRIDE in wanted else maps


def classifier_convolutions(
    state_dict: Mapping[str, Tensor], channels: int = FC_CHANNELS, kernel_size: int = FC6_KERNEL
) -> dict[str, Tensor]:
    """fc6 and fc7 of torchvision's ``vgg16().state_dict()`` as convolutions: ``fc6.weight`` (channels, 512,
    kernel_size, kernel_size), ``fc7.weight`` (channels, channels, 1, 1) and their biases.

    Fewer channels or taps are taken at equal distances from the 4096 and the 7 x 7, as DeepLab did: every third tap of
    a kernel that spans 7 features at stride 32 makes a 3x3 kernel of rate 12 at stride 8.

    Raises:
        ValueError: not the weights of a VGG-16 with its classifier, or sizes beyond the original's.
    """
    if not 1 <= channels <= FC_CHANNELS or not 1 <= kernel_size <= FC6_KERNEL:
        raise ValueError(
            f"channels must be 1 to {FC_CHANNELS} and kernel_size 1 to {FC6_KERNEL}, got {channels} and {kernel_size}"
        )
    names = {f"fc{6 + i}.{kind}": f"classifier.{3 * i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    if missing := [name for name in names.values() if name not in state_dict]:
        raise ValueError(f"state_dict must be that of torchvision's vgg16; there is no {', '.join(missing)}")
    source = {name: state_dict[key] for name, key in names.items()}
    device = source["fc6.weight"].device
    units = torch.linspace(0, FC_CHANNELS - FC_CHANNELS // channels, channels, device=device).round().long()
    taps = torch.linspace(0, FC6_KERNEL - 1, kernel_size, device=device).round().long()
    if kernel_size == 1:
        taps += FC6_KERNEL // 2
    fc6 = source["fc6.weight"].view(FC_CHANNELS, -1, FC6_KERNEL, FC6_KERNEL)
    return {
        "fc6.weight": fc6[units][:, :, taps][..., taps],
        "fc6.bias": source["fc6.bias"][units],
        "fc7.weight": source["fc7.weight"][units][:, units, None, None],
        "fc7.bias": source["fc7.bias"][units],
    }


# Builders: keyword arguments of VGG -> VGG.
vgg16 = partial(VGG)
vgg16_bn = partial(VGG, norm=True)
# The same depth at a width that trains on a CPU.
vgg_small = partial(VGG, (16, 32, 48, 64, 64), norm=True)
