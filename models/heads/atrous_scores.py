"""The score heads of DeepLab v1 and v2: one atrous branch (LargeFOV), or several whose scores are summed (ASPP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplab_kernels.nn.init import he_uniform_

from ..layers import positive_ints


class ScoreBranch(nn.Module):
    """fc6 (3x3, atrous), fc7 and fc8 (1x1) of VGG-16 as convolutions. (N, C, h, w) -> scores (N, num_classes, h, w).

    Args:
        hidden: channels of fc6 and fc7; None leaves both out: one 3x3 convolution, as v2 has it on ResNet-101.
        norm: batch normalisation after fc6 and fc7.
        dropout: after fc6 and fc7, in training.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rate: int,
        hidden: int | None = 1024,
        *,
        norm: bool = False,
        dropout: float = 0.5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        width = hidden or in_channels
        if hidden is not None:
            self.fc6 = he_uniform_(nn.Conv2d(in_channels, hidden, 3))
            self.fc7 = he_uniform_(nn.Conv2d(hidden, hidden, 1))
            self.norm6 = nn.BatchNorm2d(hidden, momentum=momentum) if norm else nn.Identity()
            self.norm7 = nn.BatchNorm2d(hidden, momentum=momentum) if norm else nn.Identity()
            self.dropout = nn.Dropout(dropout)
        self.hidden = hidden
        self.fc8 = nn.Conv2d(width, num_classes, 3 if hidden is None else 1)
        nn.init.normal_(self.fc8.weight, std=0.01)
        nn.init.zeros_(self.fc8.bias)  # type: ignore[arg-type]
        self.set_rate(rate)

    def set_rate(self, rate: int) -> None:
        atrous = self.fc8 if self.hidden is None else self.fc6
        atrous.dilation = atrous.padding = (rate, rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is not None:
            x = self.dropout(self.norm6(self.fc6(x)).relu())
            x = self.dropout(self.norm7(self.fc7(x)).relu())
        return self.fc8(x)


class AtrousScores(nn.Module):
    """The sum of one :class:`ScoreBranch` per rate. (N, in_channels, h, w) -> scores (N, num_classes, h, w).

    Args:
        rates: (12,) is LargeFOV, (2, 4, 8, 12) ASPP-S, (6, 12, 18, 24) ASPP-L.
        hidden, norm, dropout, momentum: as of :class:`ScoreBranch`.
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
        self.rates = positive_ints(rates, "rates")
        self.branches = nn.ModuleList(
            ScoreBranch(in_channels, num_classes, rate, hidden, norm=norm, dropout=dropout, momentum=momentum)
            for rate in self.rates
        )

    def set_rates(self, rates: Sequence[int]) -> None:
        """Changes the rates in place; there must be as many as there are branches."""
        self.rates = positive_ints(rates, "rates", len(self.branches))
        for branch, rate in zip(self.branches, self.rates, strict=True):
            assert isinstance(branch, ScoreBranch)
            branch.set_rate(rate)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            scores = torch.add(scores, branch(x))
        return scores
