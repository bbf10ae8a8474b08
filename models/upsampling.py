"""Ways to enlarge a feature map: unpooling, transposed convolution, and resizing followed by a convolution.

A transposed convolution whose kernel is not a multiple of its stride covers some output pixels more often than others,
which shows as a checkerboard (Odena et al., https://distill.pub/2016/deconv-checkerboard). Resizing first does not.
``examples/checkerboard.py`` draws the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.nn.init import he_uniform_

from .layers import resize_bilinear

MODES = ("transposed", "nearest", "bilinear", "max_unpooling", "bed_of_nails")


class Upsampling(nn.Module):
    """(N, in_channels, h, w) -> (N, out_channels, factor * h, factor * w), or the ``size`` asked for.

    Args:
        mode: what is done:

            - "transposed": a transposed convolution of stride ``factor``;
            - "nearest", "bilinear": a resize (pixel centres aligned), then a convolution;
            - "max_unpooling": a convolution, then each value moves to where a max pooling found its maximum, the other
              positions are 0; forward takes the pooling's ``indices``, which have ``out_channels`` channels;
            - "bed_of_nails": a convolution, then each value moves to the first corner of its ``factor`` x ``factor``
              cell.
        factor: at least 1.
        kernel_size: by default ``factor`` for "transposed", whose outputs then do not overlap, else 3. A transposed
            kernel must not be smaller than ``factor``; that of a convolution is odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mode: str = "transposed",
        factor: int = 2,
        kernel_size: int | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_mode(mode)
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"factor must be a positive int, got {factor!r}")
        self.mode, self.factor = mode, factor
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if mode == "transposed":
            kernel_size = factor if kernel_size is None else kernel_size
            surplus = kernel_size - factor  # taken off at both sides, so that the output is ``factor`` times the input
            if surplus < 0:
                raise ValueError(f"kernel_size must be at least factor = {factor}, got {kernel_size}")
            self.conv = nn.ConvTranspose2d(
                in_channels, out_channels, kernel_size, factor, (surplus + 1) // 2, surplus % 2, bias=bias
            )
        else:
            kernel_size = 3 if kernel_size is None else kernel_size
            if kernel_size < 1 or kernel_size % 2 == 0:
                raise ValueError(f"kernel_size must be odd for mode {mode!r}, got {kernel_size}")
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
            he_uniform_(self.conv)

    def forward(self, x: Tensor, size: Sequence[int] | None = None, indices: Tensor | None = None) -> Tensor:
        """``size`` (H, W) is of what a pooling that keeps incomplete windows makes (h, w): ceil(H / factor) = h."""
        height, width = (self.factor * n for n in x.shape[2:]) if size is None else size
        if tuple(-(-n // self.factor) for n in (height, width)) != tuple(x.shape[2:]):
            raise ValueError(
                f"size must be up to {self.factor} times and at most {self.factor - 1} less than that of x "
                f"{tuple(x.shape)}, got {(height, width)}"
            )
        if self.mode in ("nearest", "bilinear"):
            return self.conv(self._resize(x)[:, :, :height, :width])
        x = self.conv(x)
        if self.mode == "max_unpooling":
            if indices is None:
                raise TypeError('indices of the pooling must be given for mode "max_unpooling"')
            return F.max_unpool2d(x, indices, (self.factor, self.factor), output_size=(height, width))
        if self.mode == "bed_of_nails":
            cells = x.new_zeros((*x.shape[:2], self.factor * x.shape[2], self.factor * x.shape[3]))
            cells[:, :, :: self.factor, :: self.factor] = x
            x = cells
        return x[:, :, :height, :width]

    def _resize(self, x: Tensor) -> Tensor:
        size = (self.factor * x.shape[2], self.factor * x.shape[3])
        if self.mode == "nearest":
            return F.interpolate(x, size=size, mode="nearest")
        return resize_centred(x, size)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, factor={self.factor}"


class BilinearDeconvolution(nn.Module):
    """A transposed convolution of each channel by itself that starts as bilinear interpolation and may learn to differ
    (Long et al., arXiv:1411.4038, section 3.3). (N, channels, h, w) -> (N, channels, factor * h, factor * w).

    The input's border is repeated once, so that the output does not fade towards the border: at the start it is exactly
    a bilinear resize with pixel centres aligned.
    """

    def __init__(self, channels: int, factor: int = 2) -> None:
        super().__init__()
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"factor must be a positive int, got {factor!r}")
        self.factor = factor
        taps = 1 - (torch.arange(2 * factor - factor % 2) - (factor - 0.5 - 0.5 * (factor % 2))).abs() / factor
        self.weight = nn.Parameter(torch.outer(taps, taps).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # One more cell at each border, cut off again by the padding.
        return F.conv_transpose2d(
            F.pad(x, (1, 1, 1, 1), mode="replicate"),
            self.weight,
            stride=self.factor,
            padding=self.factor + self.factor // 2,
            groups=self.weight.shape[0],
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, factor={self.factor}"


def resize_centred(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (N, C, H, W) to ``size``, the outer edges of both grids aligned: as most libraries have it,
    and right after 2x2 poolings, whose outputs lie between pixels."""
    return resize_bilinear(x, size, align_corners=False)


def check_mode(mode: object) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
