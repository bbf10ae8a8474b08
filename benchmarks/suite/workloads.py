"""The modules behind a case: ours, and the same computation in PyTorch's own modules with the same parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench_atrous_separable
import depthwise
import measure
import networks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_kernels import models
from deeplab_kernels.models.heads.aspp import ASPP
from deeplab_kernels.nn._halves import conv_norm_act

from .cases import Case
from .devices import TORCH_DTYPES

# Norm of the difference over the norm: what rounding once leaves in each dtype, several layers deep. A result of ours
# may always be twice as far from float64 as PyTorch's own.
FLOORS = {"fp32": 1e-5, "tf32": 4e-3, "bf16": 2e-2, "fp16": 4e-3}
NETWORK_FLOORS = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 2e-1, "fp16": 5e-2}


class Depthwise(nn.Module):
    """Depthwise convolution, batch normalisation and ReLU in one operator."""

    def __init__(self, block: depthwise.Block) -> None:
        super().__init__()
        self.depthwise, self.norm = block.depthwise, block.norm

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.depthwise, self.norm, "relu", x, self.depthwise.padding)


def _randomised(module: nn.Module) -> nn.Module:
    """Statistics and weights as training could have left them, so that an error would show."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            std = part.weight[0].numel() ** -0.5
            part.weight.detach().normal_(0, std, generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            for value, low, high in (
                (part.running_mean, -0.2, 0.2), (part.running_var, 0.5, 1.5), (part.bias, -0.2, 0.2)
            ):  # fmt: skip
                value.detach().uniform_(low, high, generator=generator)
    return module


@functools.lru_cache(1)
def _ours(subject: str, what: str) -> nn.Module:
    """On the CPU in float32; what the contenders are copies of."""
    c = Case(subject, what).computation
    if subject == "depthwise":
        conv = depthwise.Convolution(1, c.channels, c.size, c.size, stride=c.stride, rate=c.rate, padding=c.rate)
        return _randomised(Depthwise(depthwise.Block(conv)))
    if subject == "separable":
        return bench_atrous_separable.build(c)
    if subject == "aspp":
        return _randomised(ASPP(c.channels, c.out_channels, c.rates, dropout=0.0))
    raise ValueError(f"{subject} has no module of its own")


def network_case(case: Case) -> networks.Case:
    c = case.computation
    return networks.Case(case.mode, c.output_stride, case.batch, size=c.size, decoder=c.decoder, separable=c.separable)


def module(case: Case, ours: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the case's module in ``dtype`` (default: the case's), batch norms of half precision in float32.

    PyTorch's has its batch normalisations folded into the convolutions for inference, as its users do.
    """
    training = case.mode == "training"
    if case.subject == "models":
        made = networks.build(network_case(case), networks.OURS if ours else networks.EAGER)
    else:
        made = copy.deepcopy(_ours(case.subject, case.what)).train(training)
        if not ours:
            made = _plain(made).train(training)
            made = made if training else networks.fold(made)
    return in_dtype(made.requires_grad_(training), dtype or TORCH_DTYPES[case.dtype])


def in_dtype(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place; batch norms of half precision stay in float32, as under autocast."""
    made = made.to(dtype)
    if dtype.itemsize < 4:
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.float()
    return made


def _plain(made: nn.Module) -> nn.Module:
    if isinstance(made, Depthwise):
        return nn.Sequential(made.depthwise, made.norm, nn.ReLU())
    return networks.to_plain(nn.Sequential(made))


@dataclass(frozen=True)
class Inputs:
    """x, and for a training step the gradient of the output, or the labels of a network."""

    x: Tensor
    target: Tensor | None = None

    def to(self, device: str, dtype: torch.dtype, layout: str) -> Inputs:
        form = measure.LAYOUTS[layout]

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype).contiguous(memory_format=form) if t.is_floating_point() else t.to(device)

        return Inputs(moved(self.x), None if self.target is None else moved(self.target))


def inputs(case: Case, batch: int | None = None) -> Inputs:
    """The same for every contender; ``batch`` in place of the case's."""
    batch = batch or case.batch
    generator = torch.Generator().manual_seed(1)
    c = case.computation
    if case.subject == "models":
        x = torch.randn(batch, 3, c.size, c.size, generator=generator)
        target = torch.randint(0, 21, (batch, c.size, c.size), generator=generator)
    else:
        layer = c.layer if case.subject == "separable" else c
        x = torch.randn(batch, layer.channels, layer.size, layer.size, generator=generator)
        out_channels = layer.channels if case.subject == "depthwise" else c.out_channels
        out_size = getattr(layer, "out_size", layer.size)
        target = torch.randn(batch, out_channels, out_size, out_size, generator=generator)
    return Inputs(x, target if case.mode == "training" else None)


def call(case: Case, made: nn.Module, given: Inputs, forward: Callable[..., Any] | None = None) -> Callable[[], Any]:
    """What is timed: a forward pass, or a step that returns output (or loss) and gradients. forward: ``made``,
    compiled for instance."""
    forward = forward or made
    if case.mode == "inference":

        def infer() -> Any:
            with torch.inference_mode():
                return forward(given.x)

        return infer
    # Of a layer amid others also the gradient of its input.
    x = given.x if case.subject == "models" else given.x.requires_grad_()
    leaves = [*([] if case.subject == "models" else [x]), *made.parameters()]

    def step() -> list[Tensor]:
        out = forward(x)
        if case.subject == "models":
            loss = F.cross_entropy(out, given.target)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]
        return [out.detach(), *torch.autograd.grad(out, leaves, given.target)]

    return step


def madds(case: Case) -> int:
    """True Multiply-Adds of what is timed; a step is three times its forward pass."""
    steps = 3 if case.mode == "training" else 1
    if case.subject != "models":
        return steps * case.layer_madds
    c = case.computation
    network = models.build(
        "deeplabv3plus_xception65", 21, c.output_stride, decoder=c.decoder, separable=c.separable, device="meta"
    )
    return steps * case.batch * models.madds(network, c.size, "true")


# Checks.


def check(case: Case, device: str) -> float:
    """Relative error of ours on one image (a step: two), gradients too; plain PyTorch's modules are the definition.

    Raises:
        measure.CheckFailed: it is more than twice PyTorch's own error in the same dtype.
    """
    if case.subject == "models" and case.mode == "training":
        return networks.check(network_case(case))  # in float64 on a small image
    network = case.subject == "models"
    exact_dtype = torch.float32 if network or case.element_size == 2 else torch.float64
    few = inputs(case, 1 if case.mode == "inference" else 2)

    def results(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        # Rounded like the case's own, so that only the arithmetic differs.
        rounded = few.to(device, TORCH_DTYPES[case.dtype], "nchw")
        given = rounded.to(device, dtype, "nchw")
        made = _rounded(module(case, ours, torch.float32), TORCH_DTYPES[case.dtype]).to(device)
        made = made if dtype == torch.float32 else in_dtype(made, dtype)
        found = call(case, made, given)()
        return found if isinstance(found, list) else [found]

    with measure.RefusesOurs():
        exact = results(False, exact_dtype)
    same = TORCH_DTYPES[case.dtype] == exact_dtype
    plain = exact if same else results(False, TORCH_DTYPES[case.dtype])
    ours = results(True, TORCH_DTYPES[case.dtype])
    order = range(len(exact)) if case.mode == "inference" else _same_order(case)
    worst = 0.0
    largest = max(float(t.double().norm()) for t in exact)
    for index, other in enumerate(order):
        error, allowed = (_error(found[i], exact[other], largest) for found, i in ((ours, index), (plain, other)))
        floor = (NETWORK_FLOORS if network else FLOORS)[case.dtype]
        if not error <= max(2 * allowed, floor):
            raise measure.CheckFailed(
                f"ours at {case.name}, {case.mode}: result {index} has error {error:.2e}, plain PyTorch {allowed:.2e}"
            )
        worst = max(worst, error)
    return worst


def _rounded(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolutions' weights as ``dtype`` holds them."""
    for part in made.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.to(dtype).to(part.weight.dtype)
    return made


def _same_order(case: Case) -> list[int]:
    """Places of ours' results among PyTorch's: output, grad_x, and the parameters, whose order may differ."""
    made = copy.deepcopy(_ours(case.subject, case.what)).train()
    for index, parameter in enumerate(made.parameters()):
        parameter.data = torch.full((1,), float(index))
    order = [int(p) for p in _plain(made).parameters()]
    return [0, 1, *(2 + order.index(index) for index in range(len(order)))]


def _error(found: Tensor, exact: Tensor, largest: float) -> float:
    """The difference, relative. Gradients that a batch norm after them makes zero are held to the largest result."""
    scale = max(float(exact.double().norm()), 1e-3 * largest, 1e-30)
    error = float((found.double() - exact.double()).norm()) / scale
    return error if error == error else float("inf")
