"""What the demo found: everything that its report tells, and the figures of it as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .crf import WIDTHS, Comparison
from .speed import SpeedRow


@dataclass
class Figure:
    """A picture with its caption. png: the file's bytes."""

    png: bytes
    caption: str
    alt: str


@dataclass
class Results:
    """Everything that the report tells."""

    command: str
    seed: int
    quick: bool
    model: str
    parameters: int
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]]
    train_scenes: int
    crop: int
    batch_size: int
    planned_steps: int
    scene_size: int
    losses: Sequence[float] = ()
    test_scenes: int = 0
    iou: Sequence[float] = ()
    mean_iou: float = math.nan
    pixel_accuracy: float = math.nan
    background_only: float = math.nan  # mIoU of calling every pixel background
    scenes: list[Figure] = field(default_factory=list)
    photographs: list[Figure] = field(default_factory=list)
    annotations: list[Figure] = field(default_factory=list)  # coarse ones of photographs, refined
    crf: Comparison | None = None
    refined_scenes: list[Figure] = field(default_factory=list)
    refined_photographs: list[Figure] = field(default_factory=list)
    madds: list[Mapping[str, Any]] = field(default_factory=list)
    model_madds: int = 0
    upsampling: Figure | None = None  # the checkerboard
    speed: list[SpeedRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {
            "command": self.command,
            "seed": self.seed,
            "quick": self.quick,
            "model": self.model,
            "parameters": self.parameters,
            "training": {
                "scenes": self.train_scenes,
                "steps": len(self.losses),
                "planned_steps": self.planned_steps,
                "batch_size": self.batch_size,
                "crop": self.crop,
                "final_loss": mean(self.losses[-20:]),
            },
            "evaluation": {
                "scenes": self.test_scenes,
                "mean_iou": self.mean_iou,
                "pixel_accuracy": self.pixel_accuracy,
                "background_only_mean_iou": self.background_only,
                "iou": {n: None if math.isnan(v) else v for n, v in zip(self.class_names, self.iou, strict=True)},
            },
            "crf": None if self.crf is None else _crf_summary(self.crf),
            "madds": [dict(row) for row in self.madds],
            "model_madds": self.model_madds,
            "speed": [
                {
                    "layer": row.layer.name,
                    "channels": row.layer.channels,
                    "size": row.layer.size,
                    "rate": row.layer.rate,
                    "layout": row.layout,
                    "task": row.task,
                    "ours_ms": row.ours_ms,
                    "torch_ms": row.torch_ms,
                    "ratio": row.ratio,
                    "relative_difference": row.error,
                }
                for row in self.speed
            ],
            "seconds": self.seconds,
            "machine": dict(self.machine),
        }


def _crf_summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "validation_scenes": comparison.validation_scenes,
        "trimap_widths": list(WIDTHS),
        "rows": [
            {
                "name": row.name,
                "parameters": None if row.parameters is None else asdict(row.parameters),
                "candidates": row.tried,
                "validation_mean_iou": _or_none(row.validation),
                "mean_iou": _or_none(row.mean_iou),
                "trimap_mean_iou": [_or_none(value) for value in row.trimap],
            }
            for row in comparison.rows
        ],
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def mean(values: Sequence[float]) -> float:
    """NaN of no values."""
    return sum(values) / len(values) if values else math.nan
