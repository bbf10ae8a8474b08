"""Images as the wild has them, and files that are none: what segment and eval make of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from _commands import small_weights
from PIL import Image
from torch import nn

from deeplab_kernels import cli
from deeplab_kernels.models.data import CLASS_NAMES, SceneDataset
from deeplab_kernels.models.segmenter import Segmenter

RGB = SceneDataset(1, (40, 56), seed=3)[0].image


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return small_weights(tmp_path_factory.mktemp("weights"))


def segment(*arguments: object) -> int:
    return cli.main(["segment", *map(str, arguments)])


def _write(kind: str, path: Path) -> np.ndarray:
    """An image file of some kind, and the RGB that is to be seen in it."""
    image, grey = Image.fromarray(RGB), Image.fromarray(RGB).convert("L")
    options = {}
    seen = RGB
    if kind == "grey":
        image = grey
        seen = np.asarray(grey.convert("RGB"))
    elif kind == "RGBA":
        image.putalpha(Image.fromarray((np.arange(56) > 27).astype(np.uint8)[None].repeat(40, 0) * 255))
        seen = np.where((np.arange(56) > 27)[None, :, None], RGB, np.uint8(255))
    elif kind == "16-bit":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        seen = np.asarray(grey.convert("RGB"))
    elif kind == "CMYK":
        image = image.convert("CMYK")
        seen = np.asarray(image.convert("RGB"))
    elif kind == "EXIF-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned clockwise
        options["exif"] = exif
        seen = np.rot90(RGB, -1)
    elif kind == "palette":
        image = image.quantize(16)
        seen = np.asarray(image.convert("RGB"))
    elif kind == "1x1":
        image = image.crop((0, 0, 1, 1))
        seen = RGB[:1, :1]
    image.save(path, **options)
    return seen


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("grey", "png"),
        ("RGBA", "png"),
        ("16-bit", "png"),
        ("CMYK", "tif"),
        ("EXIF-rotated", "png"),
        ("palette", "gif"),
        ("1x1", "bmp"),
    ],
)
def test_unusual_images_are_segmented_as_they_are_seen(kind, suffix, weights, tmp_path):
    path = tmp_path / f"image.{suffix}"
    seen = _write(kind, path)
    assert segment(path, "--weights", weights, "-o", tmp_path / "labels.png") == 0
    labels = np.asarray(Image.open(tmp_path / "labels.png"))
    assert labels.shape == seen.shape[:2]
    assert np.array_equal(labels, Segmenter.from_file(weights)(seen))


BAD = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "header.png": b"\x89PNG\r\n\x1a\n",
    "noise.png": np.random.default_rng(0).bytes(500),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_truncated_files_give_one_line(kind, share, weights, tmp_path, capsys):
    path = tmp_path / f"image.{kind.lower()}"
    Image.fromarray(RGB).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert segment(path, "--weights", weights, "-o", tmp_path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_of_good_and_bad(weights, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    for kind in ("grey", "RGBA", "1x1"):
        _write(kind, folder / f"{kind}.png")
    assert segment(folder, "--weights", weights, "-o", tmp_path / "out", "--json", "--batch", 3) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert {Path(item["photo"]).stem for item in result["files"]} == {"grey", "RGBA", "1x1"}
    assert {Path(item["file"]).name for item in result["errors"]} == set(BAD)
    assert captured.err.count("\n") == len(BAD)
    assert len(list((tmp_path / "out").iterdir())) == 6


class _Red(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameter, self.largest = nn.Parameter(torch.zeros(1)), 0

    def forward(self, x):
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        return torch.stack([-x[:, 0], x[:, 0]], 1)


def test_a_very_long_image_in_bounded_memory():
    image = np.random.default_rng(0).integers(0, 256, (200, 20000, 3)).astype(np.uint8)
    segmenter = Segmenter(_Red(), ["a", "b"], [(0, 0, 0), (9, 9, 9)])
    tracemalloc.start()
    labels = segmenter(image)
    _, peak = tracemalloc.get_traced_memory()  # of numpy; what the network takes is bounded by its input
    tracemalloc.stop()
    assert np.array_equal(labels, image[..., 0] > 127)
    assert segmenter.model.largest <= 200 * 769
    assert peak < 2 * image.nbytes


def test_a_very_long_image_by_the_command(weights, tmp_path):
    Image.new("RGB", (20000, 12), (90, 120, 30)).save(tmp_path / "long.png")
    assert segment(tmp_path / "long.png", "--weights", weights, "-o", tmp_path) == 0
    assert Image.open(tmp_path / "long-labels.png").size == (20000, 12)


def test_outputs_that_cannot_be_written(weights, tmp_path, capsys, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    Image.fromarray(RGB).save(tmp_path / "b.png")
    (tmp_path / "out" / "a-labels.png").mkdir(parents=True)
    assert segment(tmp_path / "a.png", "--weights", weights, "-o", tmp_path / "out") == 2
    assert "a-labels.png: Is a directory" in capsys.readouterr().err
    assert segment(tmp_path / "a.png", tmp_path / "b.png", "--weights", weights, "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 0 skipped, 1 with errors" in captured.out
    assert (tmp_path / "out" / "b-labels.png").exists()

    def full(picture: Image.Image, path: Path, *_: object) -> None:
        path.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert segment(tmp_path / "a.png", "--weights", weights, "-o", tmp_path) == 2
    assert f"{tmp_path / 'a-labels.png'}: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "out"]


def test_labels_out_of_range_and_sizes_that_differ(weights, tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(CLASS_NAMES))
    Image.fromarray(RGB).save(tmp_path / "images" / "a.png")
    arguments = ["eval", "--weights", weights, "--data", f"folder:{tmp_path}", "--split", "all"]
    for labels, message in (
        (np.full((40, 56), 7, np.uint8), "a.png: has label 7; the dataset has 7 classes"),
        (np.zeros((40, 55), np.uint8), "55 x 40 pixels, but its image"),
    ):
        Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_an_image_whose_every_pixel_is_ignored(weights, tmp_path, capsys):
    for name, pixels in (("images", RGB), ("labels", np.full(RGB.shape[:2], 255, np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASS_NAMES))
    arguments = ["eval", "--weights", weights, "--data", str(tmp_path), "--split", "all"]
    assert cli.main([*arguments, "-o", str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["stages"]["network"]["mean_iou"] is None
    assert results["worst"] == []
    assert cli.main(arguments) == 0
    assert "mean IoU" in capsys.readouterr().out
