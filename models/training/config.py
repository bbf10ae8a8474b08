"""How to train: the settings of a run and of its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..data.transforms import Augmentation
from ..losses import CrossEntropy

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Stage:
    """A part of a run with a learning-rate schedule of its own. None: the run's value.

    output_stride: of the network from here on. freeze_batch_norm: normalise by the moving averages, which then stay as
    they are; scales and shifts go on learning.
    """

    steps: int
    learning_rate: float | None = None
    output_stride: int | None = None
    freeze_batch_norm: bool | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 1, "steps")
        _at_least(self, 0, "warmup_steps")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.output_stride is not None and self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {self.output_stride}")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The same seed, thread count and number of steps give the same result, and so do an interrupted run
    and its continuation.

    Attributes:
        steps: updates of the weights; ``stages`` have their own.
        batch_size: images of one pass through the network in one process.
        accumulation: passes whose gradients make one step.
        crop: side of the square crops, pixels.
        min_scale, max_scale, flip, color_jitter: see :class:`deeplab_kernels.models.data.Augmentation`.
        learning_rate: step s of S uses ``learning_rate * (1 - s / S) ** power``, after a linear warm-up.
        head_multiplier: factor of the learning rate outside the backbone.
        weight_decay: of the kernels of dense convolutions.
        output_stride: of the network; None leaves it as it is.
        freeze_batch_norm: see :class:`Stage`.
        precision: of the passes: "fp32", or "bf16" or "fp16" under autocast (fp16 with a scaled loss).
        ema_decay: see :class:`WeightAverage`; the average is then what is validated and kept. 0 for none; the papers
            use 0.9999.
        class_weights, hard_fraction: see :class:`deeplab_kernels.models.losses.CrossEntropy`.
        hard_steps: in which the share of the pixels that enter falls linearly from all to ``hard_fraction``.
        auxiliary_weight: factor of the loss of a network's auxiliary scores, if it gives any in training.
        stages: replace ``steps``; each has its own schedule.
        time_limit: seconds; if the pace would exceed it, the last stage is shortened, so that the schedule still ends
            at 0.
    """

    steps: int = 400
    batch_size: int = 8
    accumulation: int = 1
    crop: int = 129
    min_scale: float = 1.0
    max_scale: float = 1.0
    flip: float = 0.5
    color_jitter: float = 0.0
    learning_rate: float = 0.1
    power: float = 0.9
    warmup_steps: int = 10
    head_multiplier: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    output_stride: int | None = None
    freeze_batch_norm: bool = False
    precision: str = "fp32"
    ema_decay: float = 0.0
    class_weights: tuple[float, ...] | None = None
    hard_fraction: float = 1.0
    hard_steps: int = 0
    auxiliary_weight: float = 0.4
    seed: int = 0
    stages: tuple[Stage, ...] = ()
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("stages", "class_weights"):  # lists, as TOML has them
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        _check_types(self)
        _at_least(self, 1, "steps", "batch_size", "accumulation", "crop")
        _at_least(self, 0, "warmup_steps", "hard_steps", "weight_decay", "auxiliary_weight", "seed", "power")
        for name in ("learning_rate", "head_multiplier", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.output_stride is not None and self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {self.output_stride}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        self.augmentation()
        self.loss()

    def augmentation(self) -> Augmentation:
        """How samples are cut, scaled, mirrored and coloured. Raises ValueError for settings out of range."""
        return Augmentation(self.crop, self.min_scale, self.max_scale, self.flip, self.color_jitter)

    def loss(self, step: int | None = None) -> CrossEntropy:
        """Of ``step``, counted from the start of the run; None: after ``hard_steps``."""
        fraction = self.hard_fraction
        if step is not None and step < self.hard_steps:
            fraction += (1 - fraction) * (1 - (step + 1) / (self.hard_steps + 1))
        return CrossEntropy(self.class_weights, fraction)

    def all_stages(self) -> tuple[Stage, ...]:
        """The stages with every value filled in; one if none were given."""
        return tuple(
            Stage(
                stage.steps,
                _or(stage.learning_rate, self.learning_rate),
                _or(stage.output_stride, self.output_stride),
                _or(stage.freeze_batch_norm, self.freeze_batch_norm),
                _or(stage.warmup_steps, self.warmup_steps),
            )
            for stage in self.stages or (Stage(self.steps),)
        )

    @property
    def planned_steps(self) -> int:
        return sum(stage.steps for stage in self.all_stages())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _at_least(config: object, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


_WORDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _check_types(config: Any) -> None:
    """Raises TypeError where a value is not of its field's type; ints serve as floats."""
    for item in fields(config):
        value, (word, *rest) = getattr(config, item.name), str(item.type).split(" | ")
        if value is None and rest:
            continue
        if word == "tuple[float, ...]":
            sound = isinstance(value, tuple) and all(is_a(v, "float") for v in value)
            word = "list of numbers"
        elif word == "tuple[Stage, ...]":
            sound = isinstance(value, tuple) and all(isinstance(v, Stage) for v in value)
            word = "list of stages"
        else:
            sound = is_a(value, word)
        if not sound:
            raise TypeError(f"{item.name} must be {'an' if word == 'int' else 'a'} {word}, got {value!r}")


def is_a(value: object, word: str) -> bool:
    """Whether ``value`` is an "int", "float", "bool" or "str"; ints are floats, bools are no ints."""
    return isinstance(value, _WORDS[word]) and (word == "bool" or not isinstance(value, bool))


def poly_learning_rate(
    step: int, steps: int, learning_rate: float, *, power: float = 0.9, warmup_steps: int = 0
) -> float:
    """The learning rate of ``step`` (from 0) of ``steps``: a linear warm-up, and a power of the share that is left."""
    return learning_rate * min(1.0, (step + 1) / (warmup_steps + 1)) * max(0.0, 1 - step / steps) ** power


def stage_at(step: int, lengths: Sequence[int]) -> tuple[int, int]:
    """(which stage ``step`` lies in, its number there) for stages of these lengths."""
    for index, length in enumerate(lengths):
        if step < length:
            return index, step
        step -= length
    raise ValueError(f"step {step} lies after the last stage")
