"""What every feature extractor has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

OUTPUT_STRIDES = (8, 16, 32)
STEM_STRIDE = 2
LOW_LEVEL_STRIDE = 4
LAST_STRIDE = 32


class Features(NamedTuple):
    """What a backbone returns."""

    low_level: Tensor
    """(N, low_level_channels, ceil(H / 4), ceil(W / 4)): the last feature map of stride 4."""
    output: Tensor
    """(N, out_channels, ceil(H / output_stride), ceil(W / output_stride))."""


class Backbone(nn.Module):
    """Base of the feature extractors. forward: (N, 3, H, W) -> :class:`Features`, any H, W >= 1.

    Feature maps are named by their nominal stride: the one that they have at output stride 32. At output stride 16 the
    feature of nominal stride 32 has stride 16, and so on: the names do not depend on the output stride.

    Attributes:
        channels: nominal stride -> channels of its last feature map, in the order of the network.
        output_stride: input pixels per pixel of the deepest feature map.
    """

    channels: Mapping[int, int]
    output_stride: int

    @property
    def low_level_channels(self) -> int:
        return self.channels[LOW_LEVEL_STRIDE]

    @property
    def out_channels(self) -> int:
        return self.channels[max(self.channels)]

    def set_output_stride(self, output_stride: int) -> None:
        """Changes strides and rates in place so that the output has 1 / ``output_stride`` of the image's resolution.
        The weights and the state_dict do not change.

        Raises:
            ValueError: ``output_stride`` is not 8, 16 or 32.
        """
        raise NotImplementedError

    def pyramid(self, x: Tensor, strides: Sequence[int] | None = None) -> list[Tensor]:
        """The last feature map of each of the nominal ``strides`` (None for all there are), in ascending order.

        (N, 3, H, W) -> [(N, channels[s], ceil(H / min(s, output_stride)), ...) for s in strides]. Maps that are not
        asked for are not kept in memory.

        Raises:
            ValueError: the backbone has no feature map of that stride.
        """
        raise NotImplementedError

    def wanted_strides(self, strides: Sequence[int] | None) -> frozenset[int]:
        """``strides`` as a set, if the backbone has them all."""
        wanted = frozenset(self.channels if strides is None else strides)
        if not wanted <= set(self.channels):
            raise ValueError(f"strides must be among {', '.join(map(str, self.channels))}, got {strides!r}")
        return wanted

    def forward(self, x: Tensor) -> Features:
        low_level, output = self.pyramid(x, (LOW_LEVEL_STRIDE, max(self.channels)))
        return Features(low_level, output)


def check_output_stride(output_stride: int) -> None:
    if output_stride not in OUTPUT_STRIDES or isinstance(output_stride, bool):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")


def rates_at(output_stride: int, rates: Iterable[int], own: int) -> list[int]:
    """``rates`` of output stride ``own`` at another one: they keep the field of view in image pixels, rounded down, and
    are at least 1."""
    return [max(1, rate * own // output_stride) for rate in rates]


def strides_and_rates(natural: Iterable[int], stride: int, output_stride: int) -> list[tuple[int, int, int]]:
    """Where atrous convolution takes the place of stride: (stride, rate before, rate after) of consecutive units.

    A unit reached at ``output_stride`` runs with stride 1 and hands the stride it lost on as a factor of the rate: the
    units after it then compute what they would after the stride, only more densely. Whether the unit itself runs at the
    rate before or after depends on where in the unit its stride is.

    Args:
        natural: strides of the units at output stride 32.
        stride: reached before the first of them.

    Raises:
        ValueError: ``output_stride`` is not 8, 16 or 32.
    """
    check_output_stride(output_stride)
    geometry, rate = [], 1
    for unit_stride in natural:
        before = rate
        if stride == output_stride:
            rate *= unit_stride
            unit_stride = 1
        stride *= unit_stride
        geometry.append((unit_stride, before, rate))
    return geometry
