"""A spatial pyramid with random tensors, as the operators below the Python function take them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from _cases import LAYOUTS
from torch import Tensor

from deeplab_kernels import reference


class RawPyramid:
    """Arguments of the three operators, on one problem."""

    OPERATORS = ("atrous_spatial_pyramid", "atrous_spatial_pyramid_training", "atrous_spatial_pyramid_backward")

    def __init__(
        self,
        size: Sequence[int],
        rates: Sequence[int],
        kernel: Sequence[int],
        dtype: torch.dtype,
        layout: str,
        device: str = "cpu",
        *,
        norm: bool = True,
        affine: bool = True,
        pool: bool = True,
        keep_conv: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rates, self.pool, self.keep_conv, self.activation = list(rates), pool, keep_conv, 2 * norm
        batch, channels, _, _ = size
        branches = len(rates) // 2
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def image(t: Tensor) -> Tensor:
            return t.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])

        x = draw(*size) + 2 * draw(1, channels, 1, 1)
        self.weight = (draw(branches, channels, 1, *kernel) / 3).to(device, dtype)
        # Large enough not to vanish beside the branches' gradients.
        self.grad_pooled = (30 * draw(batch, channels, 1, 1)).to(device, dtype) if pool else None
        self.x, self.grads = image(x), [image(draw(*size)) for _ in range(branches)]
        alone = (self.x.double().cpu(), self.weight.double().cpu(), *[None] * 4, 0.0, 0, self.rates, False)
        conv, _ = reference.atrous_spatial_pyramid(*alone)
        self.conv = [image(y) for y in conv]
        self.vectors: list[Tensor | None] = [None] * 4
        if norm:
            gamma, beta = ((draw(branches, channels) + s) if affine else None for s in (1.5, 3.0))
            mean, var = (torch.stack([f(y) for y in conv]) for f in (self._mean, self._var))
            self.vectors = [None if v is None else v.to(device, acc) for v in (gamma, beta, mean, var)]

    @staticmethod
    def _mean(y: Tensor) -> Tensor:
        return y.mean((0, 2, 3)).nan_to_num()

    @staticmethod
    def _var(y: Tensor) -> Tensor:
        return y.var((0, 2, 3), correction=0).nan_to_num() + 0.01

    def arguments(self, operator: str) -> tuple[Any, ...]:
        if operator == "atrous_spatial_pyramid":
            return (self.x, self.weight, *self.vectors, 1e-3, self.activation, self.rates, self.pool)
        if operator == "atrous_spatial_pyramid_training":
            settings = (1e-3, self.activation, self.rates, self.pool, self.keep_conv)
            return (self.x, self.weight, *self.vectors[:2], *settings)
        conv = self.conv if self.keep_conv else []
        settings = (1e-3, self.activation, True, self.rates, True, True)
        return (self.grads, self.grad_pooled, self.x, self.weight, conv, *self.vectors, *settings)

    def double(self) -> RawPyramid:
        """The same values in float64 on the CPU."""
        wide = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(wide, name, value.double().cpu())
            elif name in ("grads", "conv", "vectors"):
                setattr(wide, name, [None if t is None else t.double().cpu() for t in value])
        return wide
