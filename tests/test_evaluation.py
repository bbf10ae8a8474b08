"""The confusion matrix and the trimap against direct counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from _peers import peer
from torch import nn

from deeplab_kernels.models.data import IGNORE, Scene, SceneDataset
from deeplab_kernels.models.evaluation import ConfusionMatrix, TrimapCurve, boundary_distance, evaluate, trimap_miou
from deeplab_kernels.models.inference import Inference
from deeplab_kernels.models.refinement import CRFParameters


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


def _two_class_scenes(*sizes: tuple[int, int]) -> list[Scene]:
    rng = np.random.default_rng(0)
    labels = [rng.integers(2, size=size).astype(np.uint8) for size in sizes]
    return [Scene(np.repeat(one[..., None] * np.uint8(255), 3, 2), one) for one in labels]


def test_evaluate():
    scenes = _two_class_scenes(*[(9, 9)] * 5)
    model, done, predictions = _Oracle().train(), [], []
    result = evaluate(
        model,
        scenes,
        2,
        Inference(batch_size=2),
        on_batch=done.append,
        on_image=lambda index, scene, labels: predictions.append((index, labels.final)),
    )
    assert result.matrix.mean_iou() == 1
    assert result.images == 5
    assert [index for index, _ in predictions] == [0, 1, 2, 3, 4]
    assert all(np.array_equal(labels, scenes[index].labels) for index, labels in predictions)
    assert done == [2, 2, 1]
    assert model.training  # as it was
    assert model.calls == 3


def test_evaluate_takes_a_dataset():
    assert evaluate(_Oracle(), SceneDataset(3, 17), 7).matrix.counts.sum() == 3 * 17 * 17


def test_batches_are_of_one_size():
    scenes = _two_class_scenes((9, 9), (9, 9), (9, 9), (8, 9), (9, 9))
    model, done = _Oracle(), []
    result = evaluate(model, scenes, 2, Inference(batch_size=2), trimap_widths=(1, 3), on_batch=done.append)
    assert done == [2, 1, 1, 1]
    assert result.matrix.mean_iou() == 1
    assert result.matrix.counts.sum() == 4 * 81 + 72
    assert result.trimap.mean_iou() == [1, 1]


class _CountedScene(Scene):
    alive = most = 0

    def __init__(self, image, labels) -> None:
        super().__init__(image, labels)
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)

    def __del__(self) -> None:
        type(self).alive -= 1


class _CountedScenes:
    """Scenes of their own, made when asked for."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Scene:
        labels = np.zeros((9, 9 + index % 2 * (index > 11)), np.uint8)
        return _CountedScene(np.zeros((*labels.shape, 3), np.uint8), labels)


def test_memory_does_not_grow_with_the_dataset():
    evaluate(_Oracle(), _CountedScenes(), 2, Inference(batch_size=3, crf=CRFParameters(iterations=1)))
    assert _CountedScene.alive == 0
    assert 3 <= _CountedScene.most <= 4


def test_before_and_after_a_crf():
    scenes = _two_class_scenes((20, 20))
    scenes[0].labels[:], scenes[0].image[:] = 0, 100
    scenes[0].image[5, 5] = 130, 100, 100  # a speck that the network calls 1
    result = evaluate(_Oracle(), scenes, 2, Inference(crf=CRFParameters(iterations=3)))
    assert list(result.stages()) == ["network", "crf"]
    assert result.stages()["network"].matrix.counts.tolist() == [[399, 1], [0, 0]]
    assert result.matrix.counts.tolist() == [[400, 0], [0, 0]]
    assert list(evaluate(_Oracle(), scenes, 2).stages()) == ["network"]


def test_a_label_out_of_range_names_its_image():
    scenes = _two_class_scenes((4, 4), (4, 4))
    scenes[1].labels[0, 0] = 7
    with pytest.raises(ValueError, match="image 1: target has labels from 0 to 7; allowed are 0 to 1"):
        evaluate(_Oracle(), scenes, 2)
    with pytest.raises(ValueError, match="scenes must not be empty"):
        evaluate(_Oracle(), [], 2)


@pytest.mark.parametrize("classes", [2, 7, 21])
def test_measures_against_torchmetrics(classes):
    torchmetrics = peer("torchmetrics.classification")
    rng = np.random.default_rng(classes)
    options = {"num_classes": classes, "ignore_index": IGNORE}
    reference = {
        "confusion": torchmetrics.MulticlassConfusionMatrix(**options),
        "iou": torchmetrics.MulticlassJaccardIndex(average=None, **options),
        "mean": torchmetrics.MulticlassJaccardIndex(average="macro", **options),
        "weighted": torchmetrics.MulticlassJaccardIndex(average="weighted", **options),
        "accuracy": torchmetrics.MulticlassAccuracy(average="micro", **options),
    }
    ours = ConfusionMatrix(classes)
    for _ in range(3):
        target = rng.integers(classes, size=(2, 33, 40)).astype(np.uint8)
        prediction = np.where(rng.random(target.shape) < 0.6, target, rng.integers(classes, size=target.shape))
        target[rng.random(target.shape) < 0.1] = IGNORE
        ours.update(prediction, target)
        for metric in reference.values():
            metric.update(torch.from_numpy(prediction), torch.from_numpy(target).long())
    assert np.array_equal(ours.counts, reference["confusion"].compute().numpy())
    assert np.allclose(ours.iou(), reference["iou"].compute().numpy(), atol=1e-7)
    assert ours.mean_iou() == pytest.approx(reference["mean"].compute().item(), abs=1e-6)
    assert ours.frequency_weighted_iou() == pytest.approx(reference["weighted"].compute().item(), abs=1e-6)
    assert ours.pixel_accuracy() == pytest.approx(reference["accuracy"].compute().item(), abs=1e-6)


def test_frequency_weighted_iou_by_hand():
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1]))
    # class 0: 2 of 3, class 1: 1 of 3 (one missed, one too many), class 2 is predicted but never true
    assert matrix.frequency_weighted_iou() == pytest.approx((3 * 2 / 3 + 2 * 1 / 3) / 5)
    assert math.isnan(ConfusionMatrix(3).frequency_weighted_iou())


# Trimap


def plain_boundary_distance(labels: np.ndarray, limit: int) -> np.ndarray:
    """The definition, pixel by pixel."""
    out = np.full(labels.shape, limit + 1)
    height, width = labels.shape
    for i, j in itertools.product(range(height), range(width)):
        for b in range(limit, 0, -1):
            square = labels[max(0, i - b) : i + b + 1, max(0, j - b) : j + b + 1]
            if (square != labels[i, j]).any():
                out[i, j] = b
    return out


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1), (5, 7), (33, 40)])
@pytest.mark.parametrize("void", [0, IGNORE])
def test_trimap_against_the_definition(shape, void):
    rng = np.random.default_rng(shape[0] * 100 + shape[1])
    blocks = rng.integers(3, size=(-(-shape[0] // 6), -(-shape[1] // 6))).astype(np.uint8)
    target = np.kron(blocks, np.ones((6, 6), np.uint8))[: shape[0], : shape[1]]
    if void:
        target[rng.random(shape) < 0.02] = void
    prediction = np.where(rng.random(shape) < 0.3, rng.integers(3, size=shape), np.minimum(target, 2)).astype(np.uint8)
    widths = [1, 2, 3, 7]
    distance = plain_boundary_distance(target, 7)
    assert np.array_equal(boundary_distance(target, 7), distance)
    for width, value in zip(widths, trimap_miou([prediction], [target], widths, 3), strict=True):
        matrix = ConfusionMatrix(3)
        matrix.update(np.where(distance <= width, prediction, 0), np.where(distance <= width, target, np.uint8(IGNORE)))
        assert value == matrix.mean_iou() or (math.isnan(value) and math.isnan(matrix.mean_iou()))


def test_trimap_by_hand():
    target = np.array([[0, 0, 0, 0, 1, 1, 1, 1]])
    assert boundary_distance(target, 2).tolist() == [[3, 3, 2, 1, 1, 2, 3, 3]]
    prediction = np.array([[1, 0, 0, 1, 1, 1, 1, 1]])
    one, two, all_of_it = trimap_miou([prediction], [torch.from_numpy(target)], [1, 2, 40], 2)
    assert one == (0 / 1 + 1 / 2) / 2
    assert two == (1 / 2 + 2 / 3) / 2
    matrix = ConfusionMatrix(2)
    matrix.update(prediction, target)
    assert all_of_it == matrix.mean_iou()


def test_trimap_sums_over_images_and_lacks_pixels_without_a_boundary():
    flat, split = np.zeros((4, 4), int), np.repeat([[0, 1]], 4, 0)
    assert math.isnan(trimap_miou([flat], [flat], [3], 2)[0])
    assert trimap_miou([flat, split], [flat, split], [3], 2) == [1.0]
    assert trimap_miou([flat + 1, split], [flat, split], [3], 2) == [1.0]  # the wrong image has no boundary
    assert trimap_miou([], [], [1], 2) == pytest.approx([math.nan], nan_ok=True)
    assert trimap_miou([split], [split], [], 2) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.zeros((2, 2), int)], [], [1], 2), "as many, got 1 and 0"),
        (([np.zeros((2, 2), int)], [np.zeros((2, 3), int)], [1], 2), "same shape"),
        (([np.zeros((2, 2), int)], [np.zeros((2, 2), int)], [1, 0], 2), "widths must be at least 1"),
        (([np.zeros(2, int)], [np.zeros(2, int)], [1], 2), r"shape \(H, W\), got \(2,\)"),
    ],
)
def test_trimap_with_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trimap_miou(*arguments)


def test_trimap_streams():
    rng = np.random.default_rng(3)
    targets = [np.kron(rng.integers(4, size=(3, 4)), np.ones((5, 5), int)) for _ in range(3)]
    predictions = [np.where(rng.random(t.shape) < 0.3, 0, t) for t in targets]
    widths = [4, 1, 2, 2]  # in any order
    curve = TrimapCurve(4, widths)
    for prediction, target in zip(predictions, targets, strict=True):
        curve.update(prediction, target)
    assert curve.mean_iou() == trimap_miou(predictions, targets, widths, 4)
    for width, matrix in zip(widths, curve.matrices(), strict=True):
        near = sum((plain_boundary_distance(target, 5) <= width).sum() for target in targets)
        assert matrix.counts.sum() == near
