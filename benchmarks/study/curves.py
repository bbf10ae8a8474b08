"""The trimap curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_kernels.models.evaluation import PAPER_WIDTHS

from .experiments import NETWORKS

_SHOWN = (
    ("v3", "plain"),
    ("v3plus_dense", "plain"),
    ("v3plus", "plain"),
    ("v3plus", "CRF"),
    ("large_fov", "plain"),
    ("large_fov", "CRF"),
    ("large_fov", "short-range CRF"),
)


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """Mean IoU within b pixels of a boundary, b = 1 to 40: mean and spread over the seeds. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for network, variant in _SHOWN:
        curves = [
            record["results"][variant]["trimap"]
            for record in content["records"]
            if record["network"] == network and variant in record["results"]
        ]
        if not curves:
            continue
        percent = 100 * np.array(curves)
        mean, spread = percent.mean(0), percent.std(0)
        label = NETWORKS[network].title + ("" if variant == "plain" else f", {variant}")
        (line,) = axes.plot(PAPER_WIDTHS, mean, label=label)
        axes.fill_between(PAPER_WIDTHS, mean - spread, mean + spread, alpha=0.15, color=line.get_color())
    axes.set_xlabel("b: distance to a boundary, pixels")
    axes.set_ylabel("mean IoU within b, percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True
