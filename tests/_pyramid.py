"""Spatial pyramids with random tensors, as the Python function takes them and as the operators below it do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _cases import LAYOUTS, Case, activate, conv_by_definition, leaves
from torch import Tensor

from deeplab_kernels import reference
from deeplab_kernels.ops import BatchNorm, atrous_spatial_pyramid


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


Rate = int | tuple[int, int]


@dataclass(frozen=True)
class Pyramid:
    size: tuple[int, int, int, int]
    rates: tuple[Rate, ...]
    kernel: int | tuple[int, int] = 3

    def __str__(self) -> str:
        return f"{self.size}-k{self.kernel}-r{self.rates}".replace(" ", "")

    @property
    def cases(self) -> list[Case]:
        return [Case(self.size, self.kernel, padding="same", dilation=rate) for rate in self.rates]

    @property
    def flat_rates(self) -> list[int]:
        return [n for rate in self.rates for n in (rate if isinstance(rate, tuple) else (rate, rate))]


@dataclass
class Inputs:
    x: Tensor
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    means: list[Tensor]
    variances: list[Tensor]

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.x, *self.weights, *self.gammas, *self.betas]

    def norms(self, running: bool = True, **options: Any) -> list[BatchNorm]:
        statistics = zip(self.means, self.variances, strict=True) if running else [(None, None)] * len(self.means)
        return [
            BatchNorm(mean, var, gamma, beta, **options)
            for (mean, var), gamma, beta in zip(statistics, self.gammas, self.betas, strict=True)
        ]

    def copy(self, dtype: torch.dtype | None = None) -> Inputs:
        lists = (self.weights, self.gammas, self.betas)
        kept = [[v.clone().to(dtype or v.dtype) for v in column] for column in (self.means, self.variances)]
        return Inputs(leaves(self.x, dtype=dtype)[0], *(leaves(*column, dtype=dtype) for column in lists), *kept)

    def stacked(self) -> list[Tensor]:
        columns = self.weights, self.gammas, self.betas, self.means, self.variances
        return [torch.stack(column).detach() for column in columns]


def random_inputs(pyramid: Pyramid, dtype: torch.dtype = torch.float32, layout: str = "nchw", device="cpu") -> Inputs:
    channels, branches = pyramid.size[1], len(pyramid.rates)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(pyramid.size, dtype=torch.float64).to(device, dtype, memory_format=LAYOUTS[layout])

    def column(make: Callable[[], Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [make().to(device, dtype) for _ in range(branches)]

    kernel = pyramid.cases[0].kernel_size
    inputs = Inputs(
        x,
        column(lambda: torch.randn(channels, 1, *kernel), dtype),
        column(lambda: torch.randn(channels) * 2, vectors),
        column(lambda: torch.randn(channels) + 1, vectors),
        column(lambda: torch.randn(channels), vectors),
        column(lambda: torch.rand(channels) * 4 + 0.1, vectors),
    )
    for t in inputs.differentiable:
        t.requires_grad_()
    return inputs


Result = tuple[list[Tensor], Tensor]


def ours(pyramid: Pyramid, inputs: Inputs, *, normalise: bool = True, eps: float = 1e-5, **options: Any) -> Result:
    norms = inputs.norms(eps=eps, momentum=0.2) if normalise else None
    y, pooled = atrous_spatial_pyramid(inputs.x, inputs.weights, pyramid.rates, norms, **options)
    assert pooled is not None
    return y, pooled


def composed(
    conv: Callable[[Tensor, Tensor, Case], Tensor],
    pyramid: Pyramid,
    inputs: Inputs,
    *,
    normalise: bool = True,
    eps: float = 1e-5,
    training: bool = False,
    activation: str | None = None,
) -> Result:
    out = []
    for r, case in enumerate(pyramid.cases):
        y = conv(inputs.x, inputs.weights[r], case)
        if normalise and y.numel():
            vectors = inputs.means[r], inputs.variances[r], inputs.gammas[r], inputs.betas[r]
            y = F.batch_norm(y, *vectors, training, 0.2, eps)
        out.append(activate(y, activation))
    return out, inputs.x.mean((2, 3), keepdim=True)


def double_convolutions(pyramid: Pyramid, inputs: Inputs) -> list[Tensor]:
    weights = [w.detach().double() for w in inputs.weights]
    x = inputs.x.detach().double()
    return [conv_by_definition(x, w, c) for w, c in zip(weights, pyramid.cases, strict=True)]


def away_from_kinks(grads: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """Where an output sits on an activation's kink, rounding decides the gradient: no gradient there."""
    return [
        g.masked_fill((z.abs() < 0.05) | ((z - 6).abs() < 0.05), 0).to(g.dtype)
        for g, z in zip(grads, exact, strict=True)
    ]


def backpropagate(result: Result, grads: Sequence[Tensor], grad_pooled: Tensor) -> None:
    out, pooled = result
    torch.autograd.backward([*out, pooled], [g.to(out[0].dtype) for g in (*grads, grad_pooled)])
