"""What the tests of every system check alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import randomise, relative_error
from torch import nn
from torch.nn import functional as F

SIZES = [(1, 1), (1, 7), (64, 50), (33, 65)]


@torch.no_grad()
def check_any_size(model: nn.Module, sizes: list[tuple[int, int]] = SIZES) -> None:
    """Logits of the image's size at every size, and a refusal of what is no image."""
    randomise(model).eval()
    for size in sizes:
        logits = model(torch.randn(1, 3, *size))
        assert logits.shape == (1, model.num_classes, *size)
        assert logits.isfinite().all()
        assert size == (1, 1) or logits.std() > 0
    for shape in ((3, 65, 65), (1, 4, 65, 65), (1, 3, 0, 65)):
        with pytest.raises(ValueError, match="x must have"):
            model(torch.randn(shape))


def check_training(
    model: nn.Module,
    learning_rate: float = 0.1,
    steps: int = 10,
    fall: float = 0.7,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = F.cross_entropy,
) -> None:
    """A few steps of SGD on stripes told apart by colour: the loss, ``loss_of`` the output and the labels, falls below
    ``fall`` of the first, and reaches every parameter."""
    labels = (torch.arange(33) * model.num_classes // 33).expand(4, 33, 33)
    x = F.one_hot(labels, 3).permute(0, 3, 1, 2) + 0.2 * torch.randn(4, 3, 33, 33)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < fall * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def check_compile(model: nn.Module, size: tuple[int, int] = (33, 49)) -> None:
    """One graph, the same output and gradients. Dropout must be 0."""
    compiled = randomise(model).double().train()
    reference = copy.deepcopy(compiled)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    actual, expected = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x), reference(x)
    assert relative_error(actual, expected) < 1e-10
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    largest = max(p.grad.abs().max() for p in reference.parameters())
    for (name, p), q in zip(compiled.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < 1e-8 * q.grad.abs().max().clamp(min=1e-3 * largest), name


@torch.no_grad()
def check_output_stride(model: nn.Module, strides: tuple[int, ...] = (8, 16, 32)) -> None:
    """Switching there and back changes the logits and then restores them; other strides are refused."""
    randomise(model).eval()
    own = model.output_stride
    x = torch.randn(1, 3, 65, 49)
    before = model(x)
    for stride in strides:
        model.set_output_stride(stride)
        assert model.output_stride == stride
        assert torch.allclose(model(x), before, atol=1e-4) == (stride == own)
    for stride in {4, 8, 16, 32} - set(strides):
        with pytest.raises(ValueError, match=rf"output_stride must be .*, got {stride}"):
            model.set_output_stride(stride)
    model.set_output_stride(own)
    assert torch.equal(model(x), before)
