"""What training minimises: cross entropy over the pixels that count, weighted by class or over the hardest pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.scenes import IGNORE


class CrossEntropy:
    """Mean cross entropy of ``logits`` (N, K, H, W) over the pixels of ``target`` (N, H, W) that are not 255.

    The mean is over all pixels of a step, however they are divided: the sum and the number it is divided by are given
    apart, so that parts in several processes and accumulated batches add up to exactly the loss of one large batch.

    Args:
        class_weights: K factors; the sum is divided by the sum of the pixels' factors, as ``F.cross_entropy`` does.
        hard_fraction: only this share of the counted pixels of each image, those of the largest loss, enters (online
            hard example mining); the sum is divided by their number. 1 for all.
    """

    def __init__(self, class_weights: Sequence[float] | None = None, hard_fraction: float = 1.0) -> None:
        if class_weights is not None and (
            not all(math.isfinite(w) and w >= 0 for w in class_weights) or not any(class_weights)
        ):
            raise ValueError(f"class_weights must be finite, not negative and not all 0, got {list(class_weights)}")
        if not 0 < hard_fraction <= 1:
            raise ValueError(f"hard_fraction must be above 0 and at most 1, got {hard_fraction}")
        self.class_weights = None if class_weights is None else tuple(float(w) for w in class_weights)
        self.hard_fraction = hard_fraction

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError if there are class weights for another number of classes."""
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights must have one value for each of the {num_classes} classes, got "
                f"{len(self.class_weights)}"
            )

    def count(self, target: Tensor) -> Tensor:
        """What the sum over ``target`` is to be divided by: float64, without dimensions."""
        if self.hard_fraction < 1:
            return self._kept(target).sum().double()
        if self.class_weights is None:
            return (target != IGNORE).sum().double()
        return self._weights(target).double()[target[target != IGNORE].long()].sum()

    def sum(self, logits: Tensor, target: Tensor) -> Tensor:
        """The sum, float32 (float64 for float64 logits), without dimensions."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        weights = None if self.class_weights is None else self._weights(logits).to(logits.dtype)
        reduction = "sum" if self.hard_fraction == 1 else "none"
        losses = F.cross_entropy(logits, target.long(), weights, ignore_index=IGNORE, reduction=reduction)
        return losses if self.hard_fraction == 1 else self._hardest(losses, target)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean; 0 if every pixel is ignored."""
        count = self.count(target)
        return self.sum(logits, target) / torch.where(count > 0, count, 1).to(logits.device, torch.float32)

    def _weights(self, like: Tensor) -> Tensor:
        assert self.class_weights is not None
        return torch.tensor(self.class_weights, device=like.device)

    def _kept(self, target: Tensor) -> Tensor:
        """(N,): how many pixels of each image enter."""
        return ((target != IGNORE).flatten(1).sum(1) * self.hard_fraction).ceil().long()

    def _hardest(self, losses: Tensor, target: Tensor) -> Tensor:
        kept = self._kept(target)
        # Ignored pixels have loss 0; at most as many pixels are kept as are counted, so none of them displaces another.
        largest = losses.flatten(1).topk(max(int(kept.max()), 1), dim=1).values
        return largest[torch.arange(largest.shape[1], device=kept.device) < kept[:, None]].sum()


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of ``logits`` (N, K, H, W) over the pixels of ``target`` (N, H, W) that are not 255."""
    return CrossEntropy()(logits, target)
