"""A separable block with random weights: what its tests compute, and what they compare with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _cases import LAYOUTS, Case, activate, conv_by_definition
from torch import Tensor

from deeplab_kernels import ops


class Problem:
    """A block with everything that it may have, in one dtype and layout."""

    def __init__(
        self,
        case: Case,
        out_channels: int,
        dtype: torch.dtype,
        layout: str,
        *,
        residual: bool = True,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator).to(device)

        channels = case.out_channels
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.case = case
        self.x = draw(*case.size).to(dtype).to(memory_format=LAYOUTS[layout])
        self.depthwise_weight = draw(channels, 1, *case.kernel_size).to(dtype)
        self.pointwise_weight = (draw(out_channels, channels, 1, 1) / max(channels, 1) ** 0.5).to(dtype)
        self.residual = None
        if residual:
            size = (case.size[0], out_channels, *case.out_size[2:])
            self.residual = draw(*size).to(dtype).to(memory_format=LAYOUTS[layout])
        self.norms = [
            ops.BatchNorm(
                draw(n).to(acc), (draw(n).abs() + 0.5).to(acc), draw(n).to(acc), draw(n).to(acc), eps=1e-3, momentum=0.2
            )
            for n in (channels, out_channels)
        ]

    def run(self, execution: str = "whole", **changes: Any) -> Tensor:
        arguments: dict[str, Any] = {
            "depthwise_norm": self.norms[0],
            "pointwise_norm": self.norms[1],
            "pre_activation": "relu",
            "depthwise_activation": "relu6",
            "pointwise_activation": "relu",
            "residual": self.residual,
            **self.case.geometry,
        }
        weights = (self.depthwise_weight, self.pointwise_weight)
        return ops.atrous_separable_conv2d(self.x, *weights, **arguments | changes, execution=execution)

    def composed(self, dtype: torch.dtype, between: torch.dtype | None = None) -> Tensor:
        """What a user would write in plain torch, in ``dtype``; the depthwise result is stored in ``between``."""
        first, second = ([v.to(dtype) for v in norm[:4]] for norm in self.norms)
        y = conv_by_definition(F.relu(self.x.to(dtype)), self.depthwise_weight.to(dtype), self.case)
        y = activate(F.batch_norm(y, *first, eps=1e-3), "relu6")
        y = y.to(between or dtype).to(dtype)
        z = torch.einsum("nchw,oc->nohw", y, self.pointwise_weight.to(dtype)[:, :, 0, 0])
        z = F.batch_norm(z, *second, eps=1e-3)
        return F.relu(z if self.residual is None else z + self.residual.to(dtype))

    def raw(self) -> tuple[Any, ...]:
        """Arguments of the operator below the function."""
        (mean, var, gamma, beta, eps, _), (mean2, var2, gamma2, beta2, eps2, _) = self.norms
        weights = (self.x, self.depthwise_weight, self.pointwise_weight, self.residual)
        vectors = (gamma, beta, mean, var, gamma2, beta2, mean2, var2)
        return (*weights, *vectors, eps, eps2, 1, 2, 1, *self.case.normalised)
