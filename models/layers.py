"""Small pieces that the backbones and heads share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.nn.functional import pointwise_norm_act

# Official DeepLab code: the moving averages keep 0.9997 of their old value in every layer, but the backbone and the
# heads differ in epsilon.
BN_MOMENTUM = 3e-4
BACKBONE_BN_EPS = 1e-3
HEAD_BN_EPS = 1e-5


def positive_ints(value: object, name: str, count: int | None = None, *, empty: bool = False) -> tuple[int, ...]:
    """``value`` as a tuple if it is a sequence of positive ints: ``count`` of them if that is given, and at least one
    unless ``empty``."""
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if (
        items is None
        or len(items) < (0 if empty else 1)
        or (count is not None and len(items) != count)
        or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in items)
    ):
        raise ValueError(f"{name} must be {'' if count is None else f'{count} '}positive ints, got {value!r}")
    return items


class ConvNormAct(nn.Module):
    """Convolution with fixed padding, batch normalisation, and ``activation``: "relu", "relu6" or None.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)); ``kernel_size`` must be odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        *,
        activation: Literal["relu", "relu6"] | None = "relu",
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        nn.init.xavier_uniform_(self.conv.weight)  # as the official code's heads; the backbone draws its own
        self.norm = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.activation = activation

    def set_stride(self, stride: int) -> None:
        self.conv.stride = (stride, stride)

    def set_rate(self, rate: int) -> None:
        """Changes the dilation; the padding follows, so that the output keeps its size."""
        vertical, horizontal = self.conv.kernel_size
        self.conv.dilation = (rate, rate)
        self.conv.padding = (rate * (vertical - 1) // 2, rate * (horizontal - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_norm_act(self.conv, self.norm, self.activation, x)


def check_batch_statistics(norm: nn.Module, x: Tensor, what: str) -> None:
    """Raises ValueError where ``norm`` would have one value per channel to take its statistics of: ``x`` (N, ...) is
    reduced to one value per image, and N is 1."""
    # SyncBatchNorm counts the images of every process, and says itself when they are too few.
    if norm.training and x.shape[0] < 2 and type(norm) is nn.BatchNorm2d:
        raise ValueError(
            f"training needs at least 2 images in a batch, got {x.shape[0]}: {what} has one value per image to "
            "normalise (call .eval() on the model, or on its batch normalisations to train with theirs)"
        )


def resize_bilinear(x: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Bilinear resize of (N, C, H, W) to ``size``, the corner pixels of both grids aligned, or else their outer edges.

    The official code aligns corners everywhere: with sizes n = stride * k + 1 the pixels of a feature map then lie
    exactly on every stride-th input pixel, which is where a convolution with fixed padding centres them. Most other
    libraries align edges, which is right where outputs lie between pixels, as after 2x2 pooling.
    """
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=align_corners)
