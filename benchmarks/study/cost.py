"""Multiply-Adds and latency with and without separable convolutions."""

from __future__ import annotations

from typing import Any

import torch

from deeplab_kernels import models
from deeplab_kernels.timing import interleaved

from .experiments import NETWORKS
from .worker import build

_COMPARED = ("v3", "v3plus_dense", "v3plus")
# The papers' networks of the same structure: options of Xception-65, and the paper's count at 513 x 513 in billions.
_FULL_SIZE = {
    "v3": ({"decoder": False, "separable": False}, 68.00),
    "v3plus_dense": ({"separable": False}, 89.76),
    "v3plus": ({}, 54.17),
}


def compare(size: int, rounds: int) -> list[dict[str, Any]]:
    """One record for each network: its Multiply-Adds on ``size`` x ``size`` pixels, the latency of one image in
    milliseconds with all threads, and the counts of the full-size network. To be called when nothing else runs."""
    built = {name: build(name).eval() for name in _COMPARED}
    image = torch.rand(1, 3, size, size) * 2 - 1
    with torch.inference_mode():
        timings = interleaved({name: lambda net=net: net(image) for name, net in built.items()}, rounds=rounds)
    records = []
    for name, model in built.items():
        options, paper = _FULL_SIZE[name]
        full = models.build("deeplabv3plus_xception65", device="meta", **options)
        records.append(
            {
                "network": name,
                "title": NETWORKS[name].title,
                "madds": models.madds(model, size, "true"),
                "latency": timings[name].summary(),
                "threads": torch.get_num_threads(),
                "full_size_madds": models.madds(full, 513, "paper"),
                "paper_madds": paper * 1e9,
            }
        )
    return records
