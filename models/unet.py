"""U-Net (Ronneberger, Fischer, Brox: arXiv:1505.04597), and segmentation_models_pytorch's on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.nn.init import he_uniform_

from .backbones import Backbone, resnet50
from .builders import on_backbone
from .layers import positive_ints
from .system import BackboneModel, SegmentationModel, check_images
from .upsampling import Upsampling, check_mode

WIDTHS = (64, 128, 256, 512, 1024)
DECODER_WIDTHS = (256, 128, 64, 32, 16)


def double_conv(in_channels: int, out_channels: int, *, norm: bool, momentum: float = 0.1) -> nn.Sequential:
    """Two 3x3 convolutions, each followed by batch normalisation (with ``norm``) and ReLU; the size stays."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(he_uniform_(nn.Conv2d(channels, out_channels, 3, padding=1, bias=not norm)))
        if norm:
            layers.append(nn.BatchNorm2d(out_channels, momentum=momentum))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(SegmentationModel):
    """The network of 2015. forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    The paper's convolutions are not padded, so that its output is smaller than its input and skips are cropped. Here
    they are padded, and poolings keep incomplete windows.

    Args:
        widths: channels of the levels, from the image's resolution down.
        up: a mode of :class:`deeplab_kernels.models.upsampling.Upsampling`; "transposed", 2x2 of stride 2, is the
            paper's.
        norm: batch normalisation after every convolution of the levels; the paper has none.
        dropout: of the deepest features, in training.
        momentum: of the batch normalisations.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
        *,
        up: str = "transposed",
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        widths = positive_ints(widths, "widths")
        check_mode(up)
        self.num_classes = num_classes
        conv = partial(double_conv, norm=norm, momentum=momentum)
        self.encoder = nn.ModuleList(conv(n, m) for n, m in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2, ceil_mode=True, return_indices=up == "max_unpooling")
        self.dropout = nn.Dropout(dropout)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (deeper, finer) from the deepest
        self.up = nn.ModuleList(Upsampling(deeper, finer, up) for deeper, finer in pairs)
        self.decoder = nn.ModuleList(conv(2 * finer, finer) for _, finer in pairs)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    @property
    def output_stride(self) -> int:
        """Of the deepest features: 16 with the paper's four poolings."""
        return 1 << len(self.up)

    def set_output_stride(self, output_stride: int) -> None:
        """Raises ValueError unless ``output_stride`` is the network's own."""
        if output_stride != self.output_stride:
            raise ValueError(
                f"output_stride must be {self.output_stride}, the only one of U-Net, got {output_stride!r}"
            )

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        skips: list[Tensor] = []
        indices: list[Tensor | None] = []
        for level, conv in enumerate(self.encoder):
            if level:
                pooled = self.pool(x)
                x, found = pooled if self.pool.return_indices else (pooled, None)
                indices.append(found)
            x = conv(x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, conv in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = conv(torch.cat([skip, up(x, skip.shape[2:], indices.pop())], 1))
        return self.classifier(x)


def unet(
    num_classes: int = 21,
    output_stride: int | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    up: str = "transposed",
    norm: bool = False,
    dropout: float = 0.5,
    momentum: float = 0.1,
) -> UNet:
    """Builds the U-Net of 2015. See :class:`UNet`."""
    model = UNet(num_classes, widths, up=up, norm=norm, dropout=dropout, momentum=momentum)
    if output_stride is not None:
        model.set_output_stride(output_stride)
    return model


class BackboneUNet(BackboneModel):
    """segmentation_models_pytorch's Unet: a backbone as the contracting path, and nearest resizes in the expanding one.

    forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    Args:
        backbone: with features of nominal strides 2 to 32.
        widths: of the decoder's levels, deepest first; the last is at the image's resolution and has no skip.
        up: "nearest" or "bilinear": how features are resized to the size of the skip. No convolution precedes the
            concatenation.
        momentum: of the decoder's batch normalisations.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        widths: Sequence[int] = DECODER_WIDTHS,
        up: str = "nearest",
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if up not in ("nearest", "bilinear"):
            raise ValueError(f"up must be 'nearest' or 'bilinear', got {up!r}")
        self.num_classes, self.interpolation = num_classes, up
        self.backbone = backbone
        *skips, deepest = (backbone.channels[s] for s in self.STRIDES)
        widths = positive_ints(widths, "widths", len(self.STRIDES))
        inputs = [n + skip for n, skip in zip((deepest, *widths), (*reversed(skips), 0), strict=False)]
        self.decoder = nn.ModuleList(
            double_conv(n, width, norm=True, momentum=momentum) for n, width in zip(inputs, widths, strict=True)
        )
        self.classifier = nn.Conv2d(widths[-1], num_classes, 3, padding=1)

    STRIDES = (2, 4, 8, 16, 32)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        size = x.shape[2:]
        *skips, x = self.backbone.pyramid(x, self.STRIDES)
        for conv in self.decoder:
            skip = skips.pop() if skips else None
            x = F.interpolate(x, size if skip is None else skip.shape[2:], mode=self.interpolation)
            x = conv(x if skip is None else torch.cat([x, skip], 1))
        return self.classifier(x)


BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "unet": unet,
    "unet_small": partial(unet, widths=(16, 24, 32, 48, 64), norm=True, dropout=0.0),
    "unet_resnet50": on_backbone(BackboneUNet, resnet50, {"smp": {"output_stride": 32}}),
}
