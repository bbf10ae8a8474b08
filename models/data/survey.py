"""What a dataset holds, and what is wrong in it: every item is read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.errors import UserError

from .opening import Dataset
from .scenes import IGNORE


@dataclass
class Survey:
    """Attributes:
    images: number of items. pixels: (256,) how many pixels have each label; 255 does not count.
    smallest, largest: (height, width) of the images with the least and the most pixels.
    errors: of the items that cannot be used, one line each.
    """

    images: int
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    occurring: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    errors: list[str] = field(default_factory=list)

    def summary(self, dataset: Dataset) -> dict[str, Any]:
        """Plain values: for each class its share of the counted pixels, and in how many images it occurs."""
        counted = max(1, int(self.pixels[:IGNORE].sum()))
        classes = {
            name: {"share": int(self.pixels[k]) / counted, "images": int(self.occurring[k])}
            for k, name in enumerate(dataset.class_names)
        }
        return {
            "images": self.images,
            "classes": classes,
            "ignored": int(self.pixels[IGNORE]) / max(1, int(self.pixels.sum())),
            "smallest": self.smallest,
            "largest": self.largest,
            "errors": self.errors,
        }


def survey(dataset: Dataset, on_image: Callable[[int], object] = lambda done: None) -> Survey:
    """Reads every item of ``dataset``; calls ``on_image`` with 1 after each."""
    result = Survey(len(dataset))
    for index in range(len(dataset)):
        try:
            labels = dataset[index].labels
        except (UserError, OSError) as error:
            result.errors.append(" ".join(str(error).split()))
        else:
            counts = np.bincount(labels.ravel(), minlength=256)
            result.pixels += counts
            result.occurring += counts > 0
            size = (labels.shape[0], labels.shape[1])
            if result.smallest is None or np.prod(size) < np.prod(result.smallest):
                result.smallest = size
            if result.largest is None or np.prod(size) > np.prod(result.largest):
                result.largest = size
        on_image(1)
    return result
