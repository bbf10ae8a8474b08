"""Which parameters learn how fast, batch normalisation that stays as it is, and the moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def start_near_identity(model: nn.Module, centre: float = 0.4) -> None:
    """Adds ``centre`` to the middle of every depthwise kernel, in place: a start for short training from scratch.

    The papers' start has kernels around zero, of which a few in a row lose a channel's mean, and so the colours, more
    often than not; a network that starts from trained weights, or trains for days, does not mind.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                height, width = module.kernel_size
                module.weight[:, :, height // 2, width // 2] += centre


def parameter_groups(model: nn.Module, weight_decay: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters, divided for an optimiser; each group has its ``multiplier`` of the learning rate.

    Weight decay is for the kernels of dense convolutions only: not for normalisation, biases, depthwise kernels and the
    parameters of a CRF. ``head_multiplier`` is the multiplier of what does not belong to a module named ``backbone``.

    Raises:
        ValueError: ``head_multiplier`` is not 1, but there is no backbone.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (True, False): []}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if head_multiplier != 1 and not any("backbone" in name.split(".") for name in names):
        raise ValueError(
            f"head_multiplier {head_multiplier} needs a model with a backbone, {type(model).__name__} has none"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = name.split(".")
            depthwise = parameter.ndim == 4 and parameter.shape[1] == 1 and parameter.shape[-1] > 1
            decayed = parameter.ndim > 1 and not depthwise and "crf" not in path
            slow = head_multiplier == 1 or "backbone" in path
            groups.setdefault((slow, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "multiplier": 1.0 if slow else head_multiplier,
        }
        for (slow, decayed), parameters in groups.items()
    ]


def freeze_batch_norm(model: nn.Module) -> None:
    """Every batch normalisation uses its moving averages, and leaves them as they are, until ``model.train()``."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class WeightAverage:
    """An exponential moving average of a model's floating-point parameters and buffers.

    Args:
        decay: weight of the old average; in the first steps (1 + step) / (10 + step) if that is less, so that the
            initial weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in _averaged(model).items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Takes in ``model`` after ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = _averaged(model)
        torch._foreach_lerp_(list(self.values.values()), [current[name] for name in self.values], 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        """Gives ``model`` the averaged values, in place."""
        _copy(self.values, model)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within it ``model`` has the averaged values."""
        own = {name: value.detach().clone() for name, value in _averaged(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(own, model)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in _averaged(model).items():
        value.copy_(values[name])
