"""Plots of an evaluation as PNG files, through matplotlib (the extra "eval")."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .evaluate import Quality


def plot_trimap(path: str | os.PathLike[str], stages: Mapping[str, Quality]) -> None:
    """Mean IoU within b pixels of a boundary, against b: a line for each stage."""
    figure = _figure(6.4, 4)
    axes = figure.add_subplot()
    for name, quality in stages.items():
        axes.plot(quality.trimap.widths, 100 * np.array(quality.trimap.mean_iou()), label=name, marker=".")
    axes.set(xlabel="trimap width b, pixels", ylabel="mean IoU within b, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_iou(path: str | os.PathLike[str], stages: Mapping[str, Quality], class_names: Sequence[str]) -> None:
    """IoU of each class, as bars."""
    positions = np.arange(len(class_names))
    figure = _figure(6.4, 1.2 + 0.26 * len(class_names))
    axes = figure.add_subplot()
    thickness = 0.8 / len(stages)
    for n, (name, quality) in enumerate(stages.items()):
        iou = quality.matrix.iou()
        label = f"{name}: mean {100 * quality.matrix.mean_iou():.1f} %"
        axes.barh(positions + (n - (len(stages) - 1) / 2) * thickness, 100 * np.nan_to_num(iou), thickness, label=label)
    axes.set(xlim=(0, 100), xlabel="IoU, %")
    axes.set_yticks(positions, class_names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def plot_confusion(path: str | os.PathLike[str], quality: Quality, class_names: Sequence[str]) -> None:
    """What the pixels of each true class were called, as shares of the class."""
    counts = quality.matrix.counts
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.4 + 0.28 * len(class_names)
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    picture = axes.imshow(100 * shares, vmin=0, vmax=100, cmap="Blues")
    ticks = np.arange(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=90)
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(picture, ax=axes, label="% of the true class")
    figure.savefig(path)


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib; pip install 'deeplab_kernels[eval]'") from None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")
