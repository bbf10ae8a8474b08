"""Losses: what is ignored, weighted, or left out as easy, and that parts add up."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deeplab_kernels.models.data import IGNORE
from deeplab_kernels.models.losses import CrossEntropy, segmentation_loss

K = 4


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, K, 5, 7, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def target() -> torch.Tensor:
    target = torch.randint(K, (3, 5, 7), dtype=torch.uint8)
    target[0, :3] = IGNORE
    target[2] = IGNORE
    return target


def test_ignored_pixels_do_not_count(logits, target):
    loss = segmentation_loss(logits, target)
    kept = target != IGNORE
    direct = -logits.log_softmax(1).gather(1, target.clamp(max=K - 1).long()[:, None])[:, 0][kept].mean()
    torch.testing.assert_close(loss, direct)
    loss.backward()
    assert (logits.grad.movedim(1, -1)[~kept] == 0).all()
    assert segmentation_loss(logits, torch.full_like(target, IGNORE)) == 0


def test_class_weights_are_those_of_torch(logits, target):
    weights = (0.5, 2.0, 0.0, 1.0)
    expected = F.cross_entropy(logits, target.long(), torch.tensor(weights).double(), ignore_index=IGNORE)
    torch.testing.assert_close(CrossEntropy(weights)(logits, target), expected)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.99])
def test_the_hardest_pixels_of_each_image(logits, target, fraction):
    loss = CrossEntropy(hard_fraction=fraction)
    every = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")
    kept = []
    for values, labels in zip(every, target, strict=True):
        counted = values[labels != IGNORE].sort(descending=True).values
        kept += counted[: -int(-len(counted) * fraction // 1)].tolist()
    assert float(loss.count(target)) == len(kept)
    assert loss(logits, target).item() == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy((1.0, 2.0, 3.0, 0.5)), CrossEntropy(hard_fraction=0.4)])
def test_parts_add_up_to_the_whole(logits, target, loss):
    whole = loss(logits, target)
    parts = [slice(0, 1), slice(1, 3)]
    count = sum(loss.count(target[part]) for part in parts)
    total = sum(loss.sum(logits[part], target[part]) for part in parts)
    assert (total / count).item() == pytest.approx(whole.item())


def test_half_precision_scores_are_summed_in_float32():
    logits = torch.randn(1, K, 64, 64, dtype=torch.bfloat16)
    target = torch.zeros(1, 64, 64, dtype=torch.long)
    assert CrossEntropy().sum(logits, target).dtype == torch.float32
    torch.testing.assert_close(CrossEntropy()(logits, target), F.cross_entropy(logits.float(), target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0, -1.0]}, "class_weights must be finite, not negative"),
        ({"class_weights": [0.0, 0.0]}, "not all 0"),
        ({"class_weights": [float("nan")]}, "finite"),
        ({"hard_fraction": 0.0}, "hard_fraction must be above 0 and at most 1, got 0.0"),
        ({"hard_fraction": 1.5}, "got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(**arguments)
    with pytest.raises(ValueError, match="one value for each of the 3 classes, got 2"):
        CrossEntropy([1.0, 2.0]).check_classes(3)
