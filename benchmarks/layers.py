"""The shapes that are timed: the depthwise layers of DeepLab v3+ Xception-65, and the few shapes with names.

`xception65_layers` follows the definition of the network (modified aligned Xception, separable ASPP and decoder), not
the built model; tests/test_benchmarks.py checks that both agree.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Layer:
    """A 3 x 3 depthwise convolution on (N, channels, size, size) with padding = rate: stride 1 keeps the size."""

    channels: int
    size: int
    stride: int = 1
    rate: int = 1

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def name(self) -> str:
        """For example A12:2048x33r12, 728x65s2."""
        text = f"{self.channels}x{self.size}"
        text += f"s{self.stride}" * (self.stride > 1) + f"r{self.rate}" * (self.rate > 1)
        alias = ALIASES.get(self)
        return f"{alias}:{text}" if alias else text


# Middle flow at output stride 8, ASPP branches, decoder, entry flow.
NAMED: dict[str, Layer] = {
    "M8": Layer(728, 65, rate=2),
    "A6": Layer(2048, 33, rate=6),
    "A12": Layer(2048, 33, rate=12),
    "A18": Layer(2048, 33, rate=18),
    "A24": Layer(2048, 65, rate=24),
    "D304": Layer(304, 129),
    "E128": Layer(128, 257),
    "E128s2": Layer(128, 257, stride=2),
    "X4": Layer(1536, 65, rate=4),  # exit flow at output stride 8 without multi-grid
}
ALIASES = {layer: alias for alias, layer in NAMED.items()}


def _halved(size: int) -> int:
    return (size - 1) // 2 + 1


@dataclass(frozen=True, order=True)
class Block:
    """A separable convolution: depthwise, batch norm, 1 x 1, batch norm. ReLU is before it, or after either half."""

    layer: Layer
    out_channels: int
    inner_activation: bool

    @property
    def name(self) -> str:
        """For example 728x33->728 (ReLU before it), A12:2048x33r12->relu->256 (ReLU after either half)."""
        return f"{self.layer.name}->{'relu->' * self.inner_activation}{self.out_channels}"

    @property
    def names(self) -> set[str]:
        """What it may be asked for by: its name, also without the ReLU."""
        return {self.name, self.name.replace("relu->", "")}


def xception65_blocks(
    output_stride: int, input_size: int = 513, multi_grid: Sequence[int] = (1, 2, 4)
) -> Counter[Block]:
    """Every separable convolution of DeepLab v3+ Xception-65 (separable ASPP and decoder) -> how often it occurs."""
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
    # (channels of the three separable convolutions, stride of the third, units, multi-grid)
    blocks = [
        ((128, 128, 128), 2, 1),
        ((256, 256, 256), 2, 1),
        ((728, 728, 728), 2, 1),
        ((728, 728, 728), 1, 16),
        ((728, 1024, 1024), 2, 1),
        ((1536, 1536, 2048), 1, 1),
    ]
    found: Counter[Block] = Counter()
    size, channels = _halved(input_size), 64  # after the root: 3x3/2, 3x3
    current_stride, rate = 2, 1
    low_level_size = 0
    for index, (widths, stride, units) in enumerate(blocks):
        last = index == len(blocks) - 1
        grid = multi_grid if last else (1, 1, 1)
        for _ in range(units):
            at_target = current_stride == output_stride
            unit_stride = 1 if at_target else stride
            for i, width in enumerate(widths):
                layer = Layer(channels, size, unit_stride if i == 2 else 1, rate * grid[i])
                found[Block(layer, width, inner_activation=last)] += 1
                channels = width
            if index == 1:
                low_level_size = size  # the decoder's feature is taken before the stride of entry block 2
            if at_target:
                rate *= stride
            else:
                current_stride *= stride
                size = _halved(size) if stride == 2 else size
    for branch in (6, 12, 18):
        found[Block(Layer(channels, size, 1, branch * 16 // output_stride), 256, True)] += 1
    found[Block(Layer(256 + 48, low_level_size), 256, True)] += 1
    found[Block(Layer(256, low_level_size), 256, True)] += 1
    return found


def xception65_layers(
    output_stride: int, input_size: int = 513, multi_grid: Sequence[int] = (1, 2, 4)
) -> Counter[Layer]:
    """The depthwise halves of :func:`xception65_blocks` -> how often each occurs."""
    layers: Counter[Layer] = Counter()
    for block, count in xception65_blocks(output_stride, input_size, multi_grid).items():
        layers[block.layer] += count
    return layers


def all_layers() -> list[Layer]:
    """The named shapes and every distinct layer at output strides 16 and 8, largest maps first."""
    distinct = {*NAMED.values(), *xception65_layers(16), *xception65_layers(8)}
    return sorted(distinct, key=lambda layer: (-layer.size, layer.channels, layer.stride, layer.rate))


@dataclass(frozen=True)
class Shape:
    """A layer with a batch size; what one row of the tables is about."""

    layer: Layer
    batch: int

    @property
    def name(self) -> str:
        return f"{self.layer.name}/N{self.batch}"

    def input_bytes(self, element_size: int = 4) -> int:
        return self.batch * self.layer.channels * self.layer.size**2 * element_size

    def output_bytes(self, element_size: int = 4) -> int:
        return self.batch * self.layer.channels * self.layer.out_size**2 * element_size


def shapes(layers: Iterable[Layer] | None = None, batches: Sequence[int] = (1, 4)) -> list[Shape]:
    chosen = all_layers() if layers is None else list(layers)
    return [Shape(layer, batch) for batch, layer in itertools.product(batches, chosen)]
