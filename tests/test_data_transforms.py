"""Augmentation: image and labels stay together, 255 stays 255, and the generator decides everything."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deeplab_kernels.models.data import IGNORE, Augmentation, Scene, SceneDataset, transforms

kornia = pytest.importorskip("kornia", reason="extra: train")


def scene(height: int = 60, width: int = 47) -> Scene:
    drawn = SceneDataset(1, (height, width), seed=0)[0]
    drawn.labels[10:20, 5:15] = IGNORE
    return drawn


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_crops_keep_image_and_labels_together():
    size = 40
    index = np.arange(size * size).reshape(size, size)
    image = np.stack([index % 256, index // 256, index * 0], 2).astype(np.uint8)
    source = Scene(image, (index % 7).astype(np.uint8))
    crops = [Augmentation(17)(source, rng(n)) for n in range(32)]
    at = np.stack([c.image[..., 0].astype(int) + 256 * c.image[..., 1].astype(int) for c in crops])
    assert np.array_equal(np.stack([c.labels for c in crops]), at % 7)
    assert {int(s) for s in np.unique(np.diff(at, axis=2))} == {1, -1}  # both mirrored and not
    assert len(np.unique(at[:, 0, 8])) > 16  # from many places


def test_what_is_smaller_than_the_crop_is_continued_by_ignore():
    source = SceneDataset(1, (5, 9), seed=0)[0]
    crop = Augmentation(12, flip=0)(source, rng())
    assert (crop.labels[5:] == IGNORE).all()
    assert (crop.labels[:, 9:] == IGNORE).all()
    assert (crop.image[5:] == 127).all()
    assert np.array_equal(crop.labels[:5, :9], source.labels)
    mirrored = Augmentation(12, flip=1)(source, rng())
    assert np.array_equal(mirrored.labels, crop.labels[:, ::-1])


@pytest.mark.parametrize("size", [(60, 47), (30, 24), (119, 93), (61, 46), (1, 1), (200, 3)])
def test_a_resized_window_is_a_window_of_the_resized_scene(size):
    """Bilinear and nearest with aligned corners, as torch resizes and as the indices say."""
    source = scene()
    whole = transforms.window(source, size, 0, 0, 1000)
    image = torch.from_numpy(source.image).permute(2, 0, 1)[None].double()
    expected = F.interpolate(image, size=size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(whole.image - expected).max() < 0.51
    rows, columns = (np.linspace(0, old - 1, new) for old, new in zip((60, 47), size, strict=True))
    nearest = source.labels[np.round(rows).astype(int)[:, None], np.round(columns).astype(int)]
    clear = np.logical_and.outer(*(np.abs(at % 1 - 0.5) > 1e-3 for at in (rows, columns)))  # halves may go either way
    assert clear.mean() > 0.2
    assert np.array_equal(whole.labels[clear], nearest[clear])
    assert set(np.unique(whole.labels)) <= set(np.unique(source.labels))
    top, left = size[0] // 3, size[1] // 4
    part = transforms.window(source, size, top, left, 20)
    there = slice(top, top + 20), slice(left, left + 20)
    assert np.array_equal(part.labels[clear[there]], whole.labels[there][clear[there]])
    assert np.abs(part.image.astype(int) - whole.image[there]).max() <= 1


def test_resampling_by_one_is_the_slice():
    source = scene()
    part = transforms._resampled(source, (1.0, 1.0), (7, 3), (31, 40))
    assert np.array_equal(part.image, source.image[7:38, 3:43])
    assert np.array_equal(part.labels, source.labels[7:38, 3:43])


def test_scales_are_drawn_from_the_whole_range():
    source = Scene(np.zeros((50, 50, 3), np.uint8), np.zeros((50, 50), np.uint8))
    augmentation = Augmentation(100, 0.5, 2.0)
    sides = [int((augmentation(source, rng(n)).labels == 0).any(0).sum()) for n in range(200)]
    assert 25 <= min(sides) < 30
    assert 95 < max(sides) <= 100
    assert np.mean(sides) == pytest.approx(62.5, abs=4)


@pytest.mark.parametrize("augmentation", [Augmentation(33), Augmentation(33, 0.5, 2.0, color_jitter=0.3)])
def test_the_generator_decides_everything(augmentation):
    source = scene()
    first = augmentation(source, rng(5))
    torch.manual_seed(1)
    again, other = augmentation(source, rng(5)), augmentation(source, rng(6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (33, 33, 3)
    assert first.image.dtype == first.labels.dtype == np.uint8


def test_colours_change_alone():
    source = scene()
    plain, jittered = (Augmentation(47, color_jitter=j)(source, rng(3)) for j in (0.0, 0.4))
    assert np.array_equal(plain.labels, jittered.labels) or plain.labels.shape == jittered.labels.shape
    factors = np.array([1.0, 1.0, 1.0])
    assert np.array_equal(transforms._jittered(source.image, factors), source.image)
    brighter = transforms._jittered(source.image, np.array([1.3, 1.0, 1.0])).astype(int)
    expected = np.minimum(np.round(source.image * 1.3), 255)
    assert np.abs(brighter - expected).max() <= 1
    grey = transforms._jittered(source.image, np.array([1.0, 1.0, 0.0])).astype(int)
    assert np.ptp(grey, axis=2).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"crop": 9, "min_scale": 0.0}, "must be positive and in this order, got 0.0, 1.0"),
        ({"crop": 9, "min_scale": 2.0}, "in this order, got 2.0, 1.0"),
        ({"crop": 9, "flip": 2.0}, "flip must be 0 to 1, got 2.0"),
        ({"crop": 9, "color_jitter": 1.0}, "color_jitter must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_without_kornia_it_says_what_to_install(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(transforms.importlib, "import_module", missing)
    Augmentation(9).check_installed()
    Augmentation(9)(scene(), rng())
    for needs_it in (Augmentation(9, 0.5, 2.0), Augmentation(9, color_jitter=0.1)):
        with pytest.raises(ImportError, match="pip install kornia"):
            needs_it.check_installed()
    monkeypatch.undo()
    assert importlib.import_module("kornia")
