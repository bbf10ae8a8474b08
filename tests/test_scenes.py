"""Drawn scenes: reproducible, with labels that belong to the picture; and images in every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_kernels.errors import UserError
from deeplab_kernels.models.data import (
    CLASS_NAMES,
    PALETTE,
    SceneDataset,
    draw_scene,
    read_image,
    scenes,
    to_input,
    to_rgb,
)


def test_a_scene_depends_on_seed_and_index_alone():
    first, again = SceneDataset(5, 65, seed=3), SceneDataset(9, 65, seed=3)
    again[0]
    for i in (4, 1):
        assert np.array_equal(first[i].image, again[i].image)
        assert np.array_equal(first[i].labels, again[i].labels)
    assert not np.array_equal(first[1].image, first[2].image)
    assert not np.array_equal(first[1].image, SceneDataset(5, 65, seed=4)[1].image)


def test_clutter_means_more_boundaries():
    def boundaries(clutter):
        maps = [SceneDataset(12, 129, seed=2, clutter=clutter)[i].labels for i in range(12)]
        return sum(int((a[:, 1:] != a[:, :-1]).sum()) for a in maps), np.mean([(a > 0).mean() for a in maps])

    (few, share), (many, same) = boundaries(1.0), boundaries(4.0)
    assert 1.6 * few < many < 2.4 * few
    assert same == pytest.approx(share, abs=0.1)
    plain, default = SceneDataset(1, 65, seed=3, clutter=1.0)[0], SceneDataset(1, 65, seed=3)[0]
    assert np.array_equal(plain.image, default.image)
    with pytest.raises(ValueError, match="clutter must be positive"):
        SceneDataset(1, 65, clutter=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (33, 7), (127, 65)])
def test_any_size(size):
    scene = SceneDataset(1, size, seed=0)[0]
    assert scene.image.shape == (*size, 3)
    assert scene.labels.shape == size
    assert scene.image.dtype == scene.labels.dtype == np.uint8


def test_every_class_occurs_and_none_else():
    seen = np.zeros(256, np.int64)
    for scene in (SceneDataset(30, 97, seed=1)[i] for i in range(30)):
        seen += np.bincount(scene.labels.ravel(), minlength=256)
    share = seen / seen.sum()
    assert len(PALETTE) == len(CLASS_NAMES)
    assert (share[: len(CLASS_NAMES)] > 0.01).all()
    assert share[len(CLASS_NAMES) :].sum() == 0
    assert 0.4 < share[0] < 0.85


@pytest.mark.parametrize("kind", range(1, len(CLASS_NAMES)))
def test_labels_are_where_the_object_is_drawn(kind):
    """Without shadow and shading the picture changes exactly where the object's coverage is above 0, and the label map
    has the object where its coverage is above 1/2 (signed distance below 0)."""
    rng = np.random.default_rng(kind)
    y, x = (a.astype(np.float32) for a in np.mgrid[-60:61, -60:61])
    distance, colour = scenes._OBJECTS[kind](y, x, 40.0, rng)
    assert colour.shape == (121, 121, 3)
    assert np.isfinite(distance).all()
    assert np.isfinite(colour).all()
    labels = np.zeros((121, 121), np.uint8)
    image = np.full((121, 121, 3), -10, np.float32)  # no object has such a colour
    scenes._draw_object(image, labels, kind, (60.0, 60.0), 40.0, 0.3, _NoShadow(np.random.default_rng(kind)))
    touched = image[..., 0] > -9.9
    assert (labels == kind).sum() > 300
    assert touched[labels == kind].all()
    border = touched & (labels == 0)  # less than half covered: the outermost pixel of the smooth edge
    assert border.sum() < 0.35 * (labels == kind).sum()
    assert not labels[0].any()
    assert not labels[:, -1].any()


class _NoShadow:
    """A generator whose first random() is high, which leaves the shadow out."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._angle_drawn = rng, False

    def __getattr__(self, name):
        return getattr(self._rng, name)

    def random(self, *args):
        return self._rng.random(*args) if args else 0.99


def test_the_hole_of_a_ring_is_not_ring():
    y, x = (a.astype(np.float32) for a in np.mgrid[-50:51, -50:51])
    distance, _ = scenes._ring(y, x, 40.0, np.random.default_rng(0))
    assert distance[50, 50] > 0
    assert distance[50, 90 - 5] < 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size"):
        SceneDataset(1, 0)
    with pytest.raises(ValueError, match="length"):
        SceneDataset(-1)
    with pytest.raises(IndexError, match="index 2"):
        SceneDataset(2, 9)[2]


def test_a_scene_is_drawn_fast():
    """Vectorised over pixels: a loop in Python would take seconds."""
    import time

    start = time.process_time()
    draw_scene(193, 193, np.random.default_rng(0))
    assert time.process_time() - start < 0.5


# Images


def test_to_input_is_minus_one_to_one():
    images = np.array([[[0, 127, 255]]], np.uint8)
    x = to_input(images)
    assert x.shape == (1, 3, 1, 1)
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])
    assert to_input(np.zeros((2, 4, 5, 3), np.uint8)).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int64), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]]), [0, 128, 255]),
        (np.array([[-5.0, 0.0, 5.0]]), [0, 128, 255]),
        (np.array([[False, True, True]]), [0, 255, 255]),
        (np.array([[np.nan, 0.0, 1.0]]), [0, 0, 255]),
    ],
)
def test_grey_arrays(array, expected):
    rgb = to_rgb(array)
    assert rgb.shape == (1, 3, 3)
    assert rgb[0, :, 0].tolist() == expected
    assert (rgb == rgb[..., :1]).all()


def test_transparency_is_laid_over_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    for rgb in (to_rgb(rgba), to_rgb(Image.fromarray(rgba))):
        assert rgb[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 5), (1, 2, 3, 4), (0, 5, 3)])
def test_no_image(shape):
    with pytest.raises(UserError, match="an image is"):
        to_rgb(np.zeros(shape, np.uint8))


def _picture() -> Image.Image:
    return Image.fromarray(SceneDataset(1, (24, 40), seed=0)[0].image)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "F"])
def test_files_of_every_mode(mode, tmp_path):
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "F") else "x.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(_picture().convert("L")).astype(np.uint16) * 257).save(path)
    else:
        _picture().convert(mode).save(path)
    rgb = read_image(path)
    assert rgb.shape == (24, 40, 3)
    tolerance = {"P": 60, "1": 256, "CMYK": 3}.get(mode, 1)
    expected = np.asarray(_picture()) if mode in ("RGB", "RGBA", "P", "CMYK") else to_rgb(_picture().convert("L"))
    assert np.abs(rgb.astype(int) - expected).max() <= tolerance


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    _picture().save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), np.rot90(np.asarray(_picture()), -1))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "x.gif") == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["text", "empty", "truncated png", "truncated jpeg", "broken header"])
def test_damaged_files(kind, tmp_path):
    path = tmp_path / ("x.jpg" if "jpeg" in kind else "x.png")
    _picture().resize((400, 240)).save(path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "text": b"hello",
            "empty": b"",
            "broken header": data[:20] + b"\xff" * 8 + data[28:],
        }.get(kind, data[: len(data) // 2])
    )
    with pytest.raises(UserError, match=path.name) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_an_image_too_large_for_pillow(tmp_path, monkeypatch):
    _picture().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(UserError, match=r"x\.png.*exceeds limit"):
        read_image(tmp_path / "x.png")


def test_a_missing_file_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")
