"""Whole networks to time: ours, the same network in PyTorch's own layers, and the check that they are one."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass, replace

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deeplab_kernels import models
from deeplab_kernels.models.layers import ConvNormAct
from deeplab_kernels.nn import AtrousSeparableConv2d

OURS, EAGER, COMPILED = "ours", "eager", "compiled"
CHECK_SIZE = 33


@dataclass(frozen=True)
class Case:
    mode: str
    output_stride: int
    batch: int
    model: str = "deeplabv3plus_xception65"
    size: int = 513
    rounds: int = 5
    decoder: bool = True
    separable: bool = True  # convolutions of the ASPP and the decoder; the paper's SC

    @property
    def key(self) -> str:
        return f"{self.mode}{self.output_stride}{self._variant('-', '-')}"

    @property
    def name(self) -> str:
        variant = self._variant(", ", " ")
        return f"{self.model}, output stride {self.output_stride}{variant}, {self.size} x {self.size}, N = {self.batch}"

    def _variant(self, before: str, space: str) -> str:
        lacking = [what for what, has in (("decoder", self.decoder), ("SC", self.separable)) if not has]
        return "".join(f"{before}no{space}{what}" for what in lacking)


CASES = (
    Case("inference", 16, 1),
    Case("inference", 8, 1, rounds=3),
    Case("training", 16, 2, rounds=3),
    Case("training", 8, 2, rounds=2),
)
# The rows of table 5 (arXiv:1802.02611) that are not among the cases.
TABLE_5 = tuple(
    Case("inference", stride, 1, rounds=3, decoder=decoder, separable=False)
    for decoder in (False, True)
    for stride in (16, 8)
)
QUICK = tuple(replace(case, batch=2, model="deeplabv3plus_small", size=65, rounds=2) for case in CASES)


# The plain network.


def plain_block(block: AtrousSeparableConv2d) -> nn.Sequential:
    """The same parameters in PyTorch's own modules."""
    old = block.depthwise
    padding = tuple((k - 1) // 2 * r for k, r in zip(old.kernel_size, old.dilation, strict=True))
    depthwise = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        padding,
        old.dilation,
        groups=old.in_channels,
        bias=old.bias is not None,
    )
    depthwise.weight, depthwise.bias = old.weight, old.bias
    activations = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
    parts = [
        activations[block.pre_activation](),
        depthwise,
        block.depthwise_norm,
        activations[block.depthwise_activation](),
        block.pointwise,
        block.pointwise_norm,
        activations[block.pointwise_activation](),
    ]
    return nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity)))


class PlainConvNormAct(ConvNormAct):
    """The convolution of the heads and shortcuts without our operators."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.activation is None:
            return y
        return F.relu6(y, inplace=True) if self.activation == "relu6" else F.relu(y, inplace=True)


def to_plain(model: nn.Module) -> nn.Module:
    """Replaces every module of ``model`` that has operators of ours, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, AtrousSeparableConv2d):
            setattr(model, name, plain_block(child))
        elif isinstance(child, ConvNormAct):
            child.__class__ = PlainConvNormAct  # parameters, buffers and what asks for them stay
        else:
            to_plain(child)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Batch normalisations into the convolutions before them, in place; evaluation mode only."""
    for name, child in list(model.named_children()):
        if isinstance(child, ConvNormAct):
            child.conv, child.norm = fuse_conv_bn_eval(child.conv, child.norm), nn.Identity()
        elif isinstance(child, nn.Sequential):
            parts: list[nn.Module] = []
            for part in child:
                if isinstance(part, nn.BatchNorm2d) and parts and isinstance(parts[-1], nn.Conv2d):
                    parts[-1] = fuse_conv_bn_eval(parts[-1], part)
                else:
                    parts.append(part)
            setattr(model, name, fold(nn.Sequential(*parts)))
        else:
            fold(child)
    return model


@functools.cache
def weights(name: str, decoder: bool = True, separable: bool = True) -> nn.Module:
    """He-initialised: activations keep their size through all layers, so that an error would show."""
    torch.manual_seed(0)
    model = models.build(name, 21, dropout=0.0, decoder=decoder, separable=separable)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def build(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Ours, or the plain network with the same weights."""
    model = copy.deepcopy(weights(case.model, case.decoder, case.separable)).to(dtype).train(case.mode == "training")
    model.set_output_stride(case.output_stride)
    if kind == OURS:
        return model
    plain = to_plain(model).train(model.training)
    return plain if model.training else fold(plain)


def images(case: Case, size: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, 3, size or case.size, size or case.size, generator=generator).to(dtype)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """One training step without the optimiser; the loss."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def check(case: Case) -> float:
    """Largest relative difference of ours from the plain network in float64 on a small image: logits or all gradients.

    Raises:
        measure.CheckFailed: they are not the same network.
    """
    x = images(case, CHECK_SIZE, torch.float64)
    labels = torch.randint(0, 21, (case.batch, CHECK_SIZE, CHECK_SIZE), generator=torch.Generator().manual_seed(2))
    results = []
    for kind in (OURS, EAGER):
        model = build(case, kind, torch.float64)
        with measure.RefusesOurs() if kind == EAGER else contextlib.nullcontext():
            results.append(_loss_and_gradients(model, x, labels) if case.mode == "training" else _logits(model, x))
    error = measure.relative_error(results[0], results[1])
    if not error < 1e-9:
        raise measure.CheckFailed(f"{case.name}, {case.mode}: ours differs from the plain network by {error:.2g}")
    return error


def _loss_and_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The loss and the sizes of all gradients, sorted: the order of the parameters differs."""
    loss = step(model, x, labels)
    norms = sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    return torch.tensor([loss.item(), *norms], dtype=torch.float64)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)
