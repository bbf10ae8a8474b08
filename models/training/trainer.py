"""Training as the DeepLab papers do it: SGD with momentum, the "poly" learning rate, random crops and flips."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Scenes
from ..system import SYMMETRIC
from .config import TrainingConfig, poly_learning_rate, stage_at
from .distributed import rank_and_size, summed, synchronised_batch_norm
from .optimiser import WeightAverage, freeze_batch_norm, parameter_groups
from .samples import batches

# After so many steps the pace is held against the time limit, and then again and again: a machine may get busy.
_PACE_CHECKS, _PACE_EVERY = (8, 20, 60), 100
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingResult:
    """losses: one per step of this call. planned_steps: how many were planned; ``steps`` differs if the time limit
    shortened the run, or it was continued."""

    planned_steps: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


class Trainer:
    """Trains ``model`` in place on random crops of ``scenes``; can be stopped after any step and continued.

    In a torch.distributed process group every process has its own Trainer, on the same scenes; each takes
    ``batch_size`` images a pass, losses and batch normalisations are those of all together, and so are the weights.

    Args:
        model: (N, 3, crop, crop) -> logits (N, K, crop, crop), or in training (logits, auxiliary logits), where the
            loss of the latter counts by ``auxiliary_weight``. On the device to train on.
        scenes: decoded one at a time, when needed.
        workers: processes that prepare batches; the result does not depend on it.
        compile: run the network through ``torch.compile``.

    Attributes:
        step: steps done. lengths: steps of each stage. average: the moving average of the weights, if it is kept.

    Raises:
        ValueError: no scenes; a crop, number of classes or setting that does not go with the model.
        ImportError: the augmentation needs a library that is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: Scenes,
        config: TrainingConfig,
        *,
        workers: int = 0,
        compile: bool = False,
    ) -> None:
        _check(model, scenes, config)
        self.model, self.scenes, self.config, self.workers, self.compile = model, scenes, config, workers, compile
        self.device = next(model.parameters()).device
        self.memory_format = _memory_format(model)
        self.stages = config.all_stages()
        self.lengths = [stage.steps for stage in self.stages]
        self.step = 0
        self.loss = config.loss(self.step)
        groups = parameter_groups(model, config.weight_decay, config.head_multiplier)
        self.optimiser = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None

    @property
    def planned_steps(self) -> int:
        return sum(self.lengths)

    def learning_rate(self, step: int) -> float:
        """Of the backbone, at ``step``."""
        index, at = stage_at(step, self.lengths)
        stage = self.stages[index]
        assert stage.learning_rate is not None
        assert stage.warmup_steps is not None
        return poly_learning_rate(
            at, self.lengths[index], stage.learning_rate, power=self.config.power, warmup_steps=stage.warmup_steps
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if nothing had happened: tensors and plain values,
        not copied."""
        return {
            "step": self.step,
            "lengths": list(self.lengths),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.values,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken; model and configuration must be the same."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(state["average"][name])
        self.step, self.lengths = state["step"], list(state["lengths"])

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model as it would be kept now: in evaluation mode, with the averaged weights if there are any."""
        with self.average.applied_to(self.model) if self.average is not None else contextlib.nullcontext():
            self.model.eval()
            yield self.model

    def run(self, on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None) -> TrainingResult:
        """Trains up to the last step and leaves the model in evaluation mode.

        Args:
            on_step: called with (steps done, steps planned by now, loss) after every step. It may use the model in
                evaluation mode, take :meth:`state_dict`, and stop the training by an exception.

        Raises:
            FloatingPointError: the loss is no longer finite (the learning rate is too high); the weights are those
                before that step.
        """
        result = TrainingResult(self.planned_steps)
        start, durations = time.perf_counter(), []
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            synchronised_batch_norm(self.model),
            torch.random.fork_rng(devices=cuda),
            contextlib.closing(self._passes()) as passes,
        ):
            network = self._network()
            while self.step < self.planned_steps:
                step_start = time.perf_counter()
                self._enter(stage_at(self.step, self.lengths)[0])
                value = self._step(network, list(itertools.islice(passes, self.config.accumulation)))
                result.losses.append(value)
                durations.append(time.perf_counter() - step_start)
                self._keep_time(len(durations), durations, time.perf_counter() - start)
                on_step(self.step, self.planned_steps, value)
        self.model.eval()
        result.seconds = time.perf_counter() - start
        return result

    def _passes(self) -> Generator[tuple[Tensor, Tensor]]:
        rank, processes = rank_and_size()
        return batches(
            self.scenes,
            self.config,
            step=self.step,
            rank=rank,
            processes=processes,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _network(self) -> Any:
        network: Any = self.model
        if rank_and_size()[1] > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # The buffers are those of batch normalisation, which is synchronised.
            network = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)
        return torch.compile(network) if self.compile else network

    def _enter(self, index: int) -> None:
        stage = self.stages[index]
        if stage.output_stride is not None and stage.output_stride != getattr(self.model, "output_stride", None):
            self.model.set_output_stride(stage.output_stride)  # type: ignore[operator]
        self.model.train()
        if stage.freeze_batch_norm:
            freeze_batch_norm(self.model)

    def _step(self, network: Any, passes: list[tuple[Tensor, Tensor]]) -> float:
        """One update of the weights; returns the loss, which is that of all passes in all processes."""
        rank, processes = rank_and_size()
        self.loss = self.config.loss(self.step)
        learning_rate = self.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate * group["multiplier"]
        torch.manual_seed(_seed(self.config.seed, self.step, rank))  # dropout, the same after an interruption
        counted = torch.stack([self.loss.count(labels) for _, labels in passes]).sum()
        count = float(summed(counted.to(self.device))) or 1.0  # all ignored: 0, not 0 / 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimiser.zero_grad(set_to_none=True)
        for number, (images, labels) in enumerate(passes):
            last = number == len(passes) - 1
            with contextlib.nullcontext() if last or processes == 1 else network.no_sync():
                loss = self._loss(network, images, labels) / count
                # DistributedDataParallel takes the mean over the processes, of which this is to be the sum.
                self.scaler.scale(loss * processes).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        value = float(summed(total))
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: lower the learning rate")
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, self.step)
        return value

    def _loss(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """The sum over the pixels, auxiliary heads included."""
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        labels = labels.to(self.device, non_blocking=True)
        x = getattr(self.model, "normalization", SYMMETRIC).apply(images.float())
        x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, _DTYPES.get(self.config.precision), self.config.precision != "fp32"):
            outputs = network(x)
        main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self.loss.sum(main, labels)
        for scores in auxiliary:
            loss = loss + self.config.auxiliary_weight * self.loss.sum(scores, labels)
        return loss

    def _keep_time(self, done: int, durations: list[float], elapsed: float) -> None:
        if self.config.time_limit is None:
            return
        left = self.config.time_limit - elapsed
        if done in _PACE_CHECKS or done % _PACE_EVERY == 0 or left < 0:
            possible = max(1, int(left / median(durations[-_PACE_CHECKS[1] :])))
            surplus = self.planned_steps - (self.step + possible)
            if surplus > 0:
                self.lengths[-1] = max(1, self.lengths[-1] - surplus)


def train(
    model: nn.Module,
    scenes: Scenes,
    config: TrainingConfig,
    *,
    on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None,
    workers: int = 0,
) -> TrainingResult:
    """Trains ``model`` in place on random crops of ``scenes`` and leaves it in evaluation mode.

    With ``ema_decay`` the model has the averaged weights afterwards. See :class:`Trainer` for arguments and errors.
    """
    trainer = Trainer(model, scenes, config, workers=workers)
    result = trainer.run(on_step)
    if trainer.average is not None:
        trainer.average.copy_to(model)
    return result


def _memory_format(model: nn.Module) -> torch.memory_format:
    """That of the convolutions' weights."""
    weights = (p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous())
    channels_last = any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    return torch.channels_last if channels_last else torch.contiguous_format


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _check(model: nn.Module, scenes: Scenes, config: TrainingConfig) -> None:
    if len(scenes) == 0:
        raise ValueError("scenes must not be empty")
    config.augmentation().check_installed()
    classes = getattr(model, "num_classes", None)
    if classes is not None:
        config.loss().check_classes(classes)
        names = getattr(scenes, "class_names", None)
        if names is not None and len(names) != classes:
            raise ValueError(f"the model has {classes} classes, the dataset {len(names)}")
    for stage in config.all_stages():
        stride = stage.output_stride or getattr(model, "output_stride", None)
        if stage.output_stride is not None and not hasattr(model, "set_output_stride"):
            raise ValueError(f"output_stride {stage.output_stride}: {type(model).__name__} has no set_output_stride")
        if stride is not None and config.crop <= stride:
            raise ValueError(f"crop must exceed the output stride {stride}, got {config.crop}")
    if config.time_limit is not None and rank_and_size()[1] > 1:
        raise ValueError("time_limit is for one process: several would not agree on the time")
