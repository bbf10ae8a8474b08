"""The score heads of DeepLab v1 and v2: one atrous branch (LargeFOV), or several whose scores are summed (ASPP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deeplab_kernels.nn.init import he_uniform_

from ..layers import positive_ints


class FullyConnected(nn.Module):
    """fc6 and fc7 of VGG-16 as convolutions. (N, in_channels, h, w) -> (N, hidden, h, w).

    Args:
        kernel_size: of fc6: 7 in VGG-16 and FCN, 3 in DeepLab. Odd.
        rate: of fc6.
        norm: batch normalisation after both.
        dropout: after both, in training.
        momentum: of the batch normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int = 1024,
        kernel_size: int = 3,
        rate: int = 1,
        *,
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.fc6 = he_uniform_(nn.Conv2d(in_channels, hidden, kernel_size))
        self.fc7 = he_uniform_(nn.Conv2d(hidden, hidden, 1))
        self.norm6 = nn.BatchNorm2d(hidden, momentum=momentum) if norm else nn.Identity()
        self.norm7 = nn.BatchNorm2d(hidden, momentum=momentum) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        set_rate(self.fc6, rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm6(self.fc6(x)).relu())
        return self.dropout(self.norm7(self.fc7(x)).relu())


class ScoreBranch(FullyConnected):
    """:class:`FullyConnected` and fc8, a 1x1 convolution: scores (N, num_classes, h, w)."""

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 1024, *args: Any, **options: Any) -> None:
        super().__init__(in_channels, hidden, *args, **options)
        self.fc8 = score_layer(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc8(super().forward(x))


def score_layer(in_channels: int, num_classes: int, kernel_size: int = 1) -> nn.Conv2d:
    """A convolution that starts near 0: its weights have standard deviation 0.01."""
    conv = nn.Conv2d(in_channels, num_classes, kernel_size)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def set_rate(conv: nn.Conv2d, rate: int) -> None:
    """Changes the rate of a convolution of odd size in place, and its padding so that the output keeps its size."""
    conv.dilation = (rate, rate)
    conv.padding = (rate * (conv.kernel_size[0] // 2), rate * (conv.kernel_size[1] // 2))


class AtrousScores(nn.Module):
    """The summed scores of one branch per rate. (N, in_channels, h, w) -> (N, num_classes, h, w).

    Args:
        rates: (12,) is LargeFOV, (2, 4, 8, 12) ASPP-S, (6, 12, 18, 24) ASPP-L.
        hidden: channels of fc6 and fc7 in each :class:`ScoreBranch`; None for branches of one 3x3 convolution, as v2
            has them on ResNet-101.
        norm, dropout, momentum: as of :class:`FullyConnected`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int],
        hidden: int | None = 1024,
        *,
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        rates = positive_ints(rates, "rates")
        self.branches = nn.ModuleList(
            score_layer(in_channels, num_classes, 3)
            if hidden is None
            else ScoreBranch(in_channels, num_classes, hidden, norm=norm, dropout=dropout, momentum=momentum)
            for _ in rates
        )
        self.set_rates(rates)

    def set_rates(self, rates: Sequence[int]) -> None:
        """Changes the rates in place; there must be as many as there are branches."""
        self.rates = positive_ints(rates, "rates", len(self.branches))
        for branch, rate in zip(self.branches, self.rates, strict=True):
            atrous = branch.fc6 if isinstance(branch, ScoreBranch) else branch
            assert isinstance(atrous, nn.Conv2d)
            set_rate(atrous, rate)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            scores = scores + branch(x)
        return scores
