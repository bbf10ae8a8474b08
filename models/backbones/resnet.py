"""ResNet (He et al., arXiv:1512.03385) with atrous convolution, the backbone of DeepLab v2, v3 and v3+.

Parameter names are torchvision's. Two arrangements exist of where a stage is strided, and both are here: torchvision
and most others stride the first unit of a stage, the official DeepLab code the last unit of the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import positive_ints
from .features import LAST_STRIDE, LOW_LEVEL_STRIDE, STEM_STRIDE, Backbone, strides_and_rates

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


def _set_geometry(conv: nn.Conv2d, stride: int, rate: int) -> None:
    conv.stride, conv.dilation = (stride, stride), (rate, rate)
    conv.padding = (rate * (conv.kernel_size[0] // 2),) * 2


class ResidualUnit(nn.Module):
    """Base of the two kinds of units: relu(residual(x) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, norm: partial[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = 1
        self.downsample: nn.Sequential | None = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))

    def set_geometry(self, stride: int, rate: int, first_rate: int) -> None:
        """Sets the stride of the unit and the rates of its 3x3 convolutions: ``first_rate`` of the first one, ``rate``
        of those after it."""
        self.stride = stride
        if self.downsample is not None:
            _set_geometry(self.downsample[0], stride, 1)  # type: ignore[arg-type]

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        return F.relu(y.add_(self.shortcut(x)), inplace=True)


class BasicBlock(ResidualUnit):
    """Two 3x3 convolutions; the unit of ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, norm: partial[nn.BatchNorm2d], **_: object) -> None:
        super().__init__(in_channels, width, norm)
        self.conv1 = _conv3x3(in_channels, width)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = norm(width)

    def set_geometry(self, stride: int, rate: int, first_rate: int) -> None:
        super().set_geometry(stride, rate, first_rate)
        _set_geometry(self.conv1, stride, first_rate)
        _set_geometry(self.conv2, 1, rate)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


class Bottleneck(ResidualUnit):
    """1x1, 3x3 and 1x1 convolution; the unit of ResNet-50 and deeper.

    Args:
        width: channels of the first two; four times that leave the unit.
        strided_conv: which of the three carries the unit's stride: 2 in torchvision and in the official DeepLab code
            ("v1.5"), 1 in the ResNet paper and its Caffe models.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, norm: partial[nn.BatchNorm2d], strided_conv: int = 2) -> None:
        super().__init__(in_channels, width * self.expansion, norm)
        self.strided_conv = strided_conv
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)

    def set_geometry(self, stride: int, rate: int, first_rate: int) -> None:
        super().set_geometry(stride, rate, first_rate)
        _set_geometry(self.conv1, stride if self.strided_conv == 1 else 1, 1)
        _set_geometry(self.conv2, stride if self.strided_conv == 2 else 1, first_rate)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))


class ResNet(Backbone):
    """Residual network as a feature extractor. forward: (N, 3, H, W) -> :class:`Features`.

    Args:
        units: per stage.
        unit: the kind of unit.
        width: of the first stage (channels inside a bottleneck, before expansion); it doubles from stage to stage.
        stem: "7x7" as in the paper, or "3x3": three convolutions of 64, 64 and 128 channels (the official code's "beta"
            root; those of ``width``, ``width`` and ``2 width`` in general).
        output_stride: 8, 16 or 32.
        multi_grid: factors of the rates of the last stage's units; None for ones.
        strided_unit: "first": the first unit of stages 2, 3 and 4 has stride 2, as in torchvision. "last": the last
            unit of stages 1, 2 and 3, as in the official code.
        dilate_strided_unit: where a unit loses its stride to the output stride, the units *after* it get that stride
            as a factor of their rates. True gives it to the unit itself too. False is torchvision's, timm's and (with
            ``strided_unit="last"``) the official code's rule; True is segmentation_models_pytorch's, and gives the
            rates that the v3 paper writes for its last stage, 2 * (1, 2, 4) at output stride 16. None: whichever
            computes the features of the strided network, only more densely (True with ``strided_conv=1``, since the
            unit's 3x3 convolution then comes after the stride).
        strided_conv: 1 or 2, see :class:`Bottleneck`.
        eps, momentum: of every batch normalisation.

    The feature of a stage is the output of its last unit that has not been strided; with ``strided_unit="last"`` of
    that unit's residual branch, before the sum (block1/unit_2/bottleneck_v1/conv3 in the official code).
    """

    def __init__(
        self,
        units: Sequence[int],
        unit: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        width: int = 64,
        *,
        stem: Literal["7x7", "3x3"] = "7x7",
        output_stride: int = 16,
        multi_grid: Sequence[int] | None = None,
        strided_unit: Literal["first", "last"] = "first",
        dilate_strided_unit: bool | None = None,
        strided_conv: int = 2,
        eps: float = BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("stem", stem, ("7x7", "3x3")),
            ("strided_unit", strided_unit, ("first", "last")),
            ("strided_conv", strided_conv, (1, 2)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        units = positive_ints(units, "units", 4)
        if strided_unit == "last" and min(units[:3]) < 2:
            raise ValueError(f'strided_unit="last" needs at least two units per stage, got units={units}')
        self.multi_grid = positive_ints((1,) * units[3] if multi_grid is None else multi_grid, "multi_grid", units[3])
        self.strided_unit = strided_unit
        if dilate_strided_unit is None:
            dilate_strided_unit = strided_conv == 1 and unit is Bottleneck
        self.dilate_strided_unit = dilate_strided_unit
        norm = partial(nn.BatchNorm2d, eps=eps, momentum=momentum)
        stem_channels = width if stem == "7x7" else 2 * width
        self.conv1: nn.Module
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Sequential(
                _conv3x3(3, width, 2),
                norm(width),
                nn.ReLU(inplace=True),
                _conv3x3(width, width),
                norm(width),
                nn.ReLU(inplace=True),
                _conv3x3(width, stem_channels),
            )
        self.bn1 = norm(stem_channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = {STEM_STRIDE: stem_channels}
        channels = stem_channels
        for stage in range(4):
            modules = []
            for _ in range(units[stage]):
                modules.append(unit(channels, width << stage, norm, strided_conv=strided_conv))
                channels = modules[-1].out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
            self.channels[LOW_LEVEL_STRIDE << stage] = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.set_output_stride(output_stride)

    def _units(self) -> list[tuple[ResidualUnit, int, bool, int]]:
        """(unit, nominal stride of its stage, whether it is the last whose output has that stride, factor of its
        rate), in order."""
        found = []
        for stage in range(4):
            units = list(self.get_submodule(f"layer{stage + 1}").children())
            last = len(units) - 1
            tap = last - 1 if self.strided_unit == "last" and stage < 3 else last
            for i, unit in enumerate(units):
                assert isinstance(unit, ResidualUnit)
                found.append((unit, LOW_LEVEL_STRIDE << stage, i == tap, self.multi_grid[i] if stage == 3 else 1))
        return found

    def set_output_stride(self, output_stride: int) -> None:
        """See :class:`Backbone` and the class's ``dilate_strided_unit``."""
        units = self._units()
        nominal = [stride for _, stride, _, _ in units]
        natural = [2 if a != b else 1 for a, b in pairwise(nominal)]  # where the stage changes
        natural = [1, *natural] if self.strided_unit == "first" else [*natural, 1]
        geometry = strides_and_rates(natural, LOW_LEVEL_STRIDE, output_stride)
        for (unit, _, _, grid), (stride, before, after) in zip(units, geometry, strict=True):
            unit.set_geometry(stride, after * grid, (after if self.dilate_strided_unit else before) * grid)
        self.output_stride = output_stride

    def pyramid(self, x: Tensor, strides: Sequence[int] | None = None) -> list[Tensor]:
        """See :class:`Backbone`. Stride 2 is the stem before its max pooling."""
        wanted = self.wanted_strides(strides)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x] if STEM_STRIDE in wanted else []
        x = self.maxpool(x)
        for unit, nominal, last, _ in self._units():
            if nominal > max(wanted, default=0):
                break
            if self.strided_unit == "last" and last and nominal in wanted and nominal < LAST_STRIDE:
                features.append(unit.residual(x))
                x = F.relu(features[-1] + unit.shortcut(x), inplace=True)
                continue
            x = unit(x)
            if last and nominal in wanted:
                features.append(x)
        return features


# Builders: keyword arguments of ResNet -> ResNet.
resnet18 = partial(ResNet, (2, 2, 2, 2), BasicBlock)
resnet34 = partial(ResNet, (3, 4, 6, 3), BasicBlock)
resnet50 = partial(ResNet, (3, 4, 6, 3))
resnet101 = partial(ResNet, (3, 4, 23, 3))
# Narrow and shallow enough to train on a CPU.
resnet_small = partial(ResNet, (2, 2, 2, 2), BasicBlock, 16)
