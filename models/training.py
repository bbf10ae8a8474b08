"""Training as the DeepLab papers do it: SGD with momentum, the "poly" learning rate, random crops and flips."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .data import IGNORE, Scene, to_input


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The same seed, thread count and number of steps give the same result.

    learning_rate: step s of S uses ``learning_rate * (1 - s / S) ** power``, after a linear warm-up.
    crop: side of the square crops, pixels.
    time_limit: seconds; if the pace of the first steps would exceed it, S is lowered, so that the schedule still ends
        at 0.
    """

    steps: int = 400
    batch_size: int = 8
    crop: int = 129
    learning_rate: float = 0.1
    power: float = 0.9
    warmup_steps: int = 10
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass
class TrainingResult:
    """losses: one per step. steps: how many were done; planned_steps differs if the time limit shortened the run."""

    planned_steps: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


def poly_learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of ``step`` (from 0) in a run of ``steps``."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warmup * max(0.0, 1 - step / steps) ** config.power


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for the kernels of dense convolutions only: not for normalisation, biases and depthwise kernels."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            depthwise = parameter.ndim == 4 and parameter.shape[1] == 1 and parameter.shape[-1] > 1
            (decayed if parameter.ndim > 1 and not depthwise else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of ``logits`` (N, K, H, W) over the pixels of ``target`` (N, H, W) that are not 255."""
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)  # all ignored: 0, not 0 / 0


def train(
    model: nn.Module,
    scenes: Sequence[Scene],
    config: TrainingConfig,
    *,
    on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None,
) -> TrainingResult:
    """Trains ``model`` in place on random crops of ``scenes`` and leaves it in evaluation mode.

    Args:
        model: (N, 3, crop, crop) -> logits (N, K, crop, crop).
        on_step: called with (steps done, steps planned by now, loss) after every step.

    Raises:
        ValueError: no scenes.
        FloatingPointError: the loss is no longer finite (the learning rate is too high).
    """
    if len(scenes) == 0:
        raise ValueError("scenes must not be empty")
    device = next(model.parameters()).device
    sampler = np.random.default_rng([config.seed, 1])
    optimiser = torch.optim.SGD(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, momentum=config.momentum
    )
    result, steps = TrainingResult(config.steps), config.steps
    durations: list[float] = []
    start = time.perf_counter()
    model.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(config.seed)
        step = 0
        while step < steps:
            step_start = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = poly_learning_rate(step, steps, config)
            images, labels = _batch(scenes, config, sampler)
            loss = segmentation_loss(model(to_input(images).to(device)), torch.from_numpy(labels).long().to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            value = float(loss.detach())
            if not np.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate")
            result.losses.append(value)
            step += 1
            durations.append(time.perf_counter() - step_start)
            if config.time_limit is not None and step in _PACE_CHECKS:
                left = config.time_limit - (time.perf_counter() - start)
                steps = min(steps, step + max(1, int(left / median(durations[-_PACE_CHECKS[1] :]))))
            on_step(step, steps, value)
    model.eval()
    result.seconds = time.perf_counter() - start
    return result


_PACE_CHECKS = (8, 20, 60, 150)  # after so many steps the pace is held against the time limit


def _batch(
    scenes: Sequence[Scene], config: TrainingConfig, sampler: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(N, crop, crop, 3) and (N, crop, crop): random places, mirrored half of the time. A scene smaller than the crop
    is continued with black that is ignored."""
    size = config.crop
    images = np.zeros((config.batch_size, size, size, 3), np.uint8)
    labels = np.full((config.batch_size, size, size), IGNORE, np.uint8)
    for n, index in enumerate(sampler.integers(len(scenes), size=config.batch_size)):
        scene = scenes[int(index)]
        height, width = scene.labels.shape
        top = int(sampler.integers(max(height - size, 0) + 1))
        left = int(sampler.integers(max(width - size, 0) + 1))
        step = -1 if sampler.random() < 0.5 else 1
        image = scene.image[top : top + size, left : left + size][:, ::step]
        images[n, : image.shape[0], : image.shape[1]] = image
        labels[n, : image.shape[0], : image.shape[1]] = scene.labels[top : top + size, left : left + size][:, ::step]
    return images, labels
