"""The confusion matrix against a direct count."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from deeplab_kernels.models.data import IGNORE, Scene, SceneDataset
from deeplab_kernels.models.evaluation import ConfusionMatrix, evaluate
from torch import nn


@pytest.mark.parametrize("classes", [1, 2, 7, 21])
@pytest.mark.parametrize("size", [1, 5, 33, 127])
def test_counts_against_a_direct_count(classes, size):
    rng = np.random.default_rng(classes * 1000 + size)
    matrix = ConfusionMatrix(classes)
    expected = np.zeros((classes, classes), int)
    for _ in range(2):
        target = rng.integers(classes, size=(size, size)).astype(np.uint8)
        target[rng.random(target.shape) < 0.2] = IGNORE
        prediction = rng.integers(classes, size=(size, size))
        matrix.update(prediction, target)
        for t, p in itertools.product(range(classes), repeat=2):
            expected[t, p] += ((target == t) & (prediction == p)).sum()
    assert np.array_equal(matrix.counts, expected)
    iou = matrix.iou()
    for k in range(classes):
        union = expected[k].sum() + expected[:, k].sum() - expected[k, k]
        assert iou[k] == expected[k, k] / union if union else math.isnan(iou[k])
    total = expected.sum()
    assert matrix.pixel_accuracy() == np.trace(expected) / total if total else math.isnan(matrix.pixel_accuracy())


def test_hand_example():
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, IGNORE]]))
    assert matrix.iou()[:2].tolist() == [0.5, 0.5]
    assert math.isnan(matrix.iou()[2])  # neither there nor predicted: does not count in the mean
    assert matrix.mean_iou() == 0.5
    assert matrix.pixel_accuracy() == pytest.approx(2 / 3)


def test_no_pixels_give_nan():
    matrix = ConfusionMatrix(2)
    matrix.update(np.zeros((0, 4), int), np.zeros((0, 4), int))
    matrix.update(np.zeros((2, 2), int), np.full((2, 2), IGNORE))
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())


def test_predictions_under_ignored_labels_may_be_anything():
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([99, 1]), np.array([IGNORE, 1]))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


def test_counts_do_not_overflow():
    matrix = ConfusionMatrix(256)
    labels = np.full(1000, 254, np.uint8)  # 254 * 256 + 254 does not fit into the labels' own type
    matrix.update(labels, labels)
    assert matrix.counts[254, 254] == 1000


def test_tensors_are_taken():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([1, 1], dtype=torch.uint8))
    assert matrix.counts.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (np.array([2]), np.array([0]), ValueError, "prediction has labels from 2 to 2; allowed are 0 to 1"),
        (np.array([0]), np.array([2]), ValueError, "target has labels"),
        (np.array([-1]), np.array([0]), ValueError, "prediction has labels"),
        (np.array([0, 0]), np.array([0]), ValueError, "same shape"),
        (np.array([0.0]), np.array([0]), TypeError, "prediction must hold integers"),
    ],
)
def test_bad_labels(prediction, target, error, message):
    with pytest.raises(error, match=message):
        ConfusionMatrix(2).update(prediction, target)


class _Oracle(nn.Module):
    """Calls a pixel 1 where its red is above the middle, else 0; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter, self.calls = nn.Parameter(torch.zeros(1)), 0

    def forward(self, x):
        assert not self.training
        self.calls += 1
        return torch.stack([-x[:, 0], x[:, 0]], 1)


def test_evaluate():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(5, 9, 9)).astype(np.uint8)
    scenes = [Scene(np.repeat(one[..., None] * np.uint8(255), 3, 2), one) for one in labels]
    model, done = _Oracle().train(), []
    matrix, predictions = evaluate(model, scenes, 2, batch_size=2, on_batch=done.append)
    assert matrix.mean_iou() == 1
    assert np.array_equal(np.stack(predictions), labels)
    assert done == [2, 2, 1]
    assert model.training  # as it was


def test_evaluate_takes_a_dataset():
    matrix, _ = evaluate(_Oracle(), SceneDataset(3, 17), 7)
    assert matrix.counts.sum() == 3 * 17 * 17
