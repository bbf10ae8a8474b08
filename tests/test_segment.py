"""Segmenter, weights files and the segment command, on odd images and damaged files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _commands import SMALL, check_not_imported, check_refusals, small_weights
from PIL import Image
from torch import nn

from deeplab_kernels import cli
from deeplab_kernels.commands import segment as segment_command
from deeplab_kernels.errors import UserError
from deeplab_kernels.models import build
from deeplab_kernels.models import segmenter as segmenter_module
from deeplab_kernels.models.data import CLASS_NAMES, SceneDataset
from deeplab_kernels.models.refinement import CRFParameters, energy_of_scores, refine
from deeplab_kernels.models.segmenter import Segmenter, colourise, overlay
from deeplab_kernels.models.weights import LoadReport
from deeplab_kernels.models.weights.adopt import Adopted, check_complete
from deeplab_kernels.models.weights.sources import Known


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return small_weights(tmp_path_factory.mktemp("weights"))


class PixelNet(nn.Module):
    """Class = brightest channel of the pixel itself, so that tiles must give what the whole image gives. Remembers the
    sizes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter, self.sizes = nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return x


def pixel_segmenter(**options) -> Segmenter:
    return Segmenter(PixelNet(), ["r", "g", "b"], [(255, 0, 0), (0, 255, 0), (0, 0, 255)], **options)


# Segmenter


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (33, 5), (127, 65), (200, 150), (151, 400)])
def test_tiles_cover_every_pixel_once(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    segmenter, seen = pixel_segmenter(tile=100, margin=16), []
    labels = segmenter(image, on_tile=lambda done, total: seen.append((done, total)))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, image.argmax(2))
    assert max(max(s) for s in segmenter.model.sizes) <= 100  # memory does not grow with the image
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_small_images_are_continued_by_their_border():
    segmenter = pixel_segmenter()
    assert segmenter(np.array([[[0, 9, 3]]], np.uint8)).tolist() == [[1]]
    assert min(segmenter.model.sizes[0]) >= 33


def test_max_side_shrinks_and_enlarges():
    image = np.zeros((40, 400, 3), np.uint8)
    image[:, :200, 2], image[:, 200:, 1] = 255, 255
    segmenter = pixel_segmenter()
    labels = segmenter(image, max_side=100)
    assert segmenter.model.sizes == [(33, 100)]  # the lower side continued to 33
    assert (labels[:, :200] == 2).all()
    assert (labels[:, 200:] == 1).all()
    assert np.array_equal(segmenter(image, max_side=1000), labels)  # not enlarged
    with pytest.raises(ValueError, match="max_side"):
        segmenter(image, max_side=0)


def test_from_file_gives_the_same_labels_as_the_model(weights):
    segmenter = Segmenter.from_file(weights)
    image = SceneDataset(1, 65, seed=2)[0].image
    from deeplab_kernels.models.data import to_input

    torch.manual_seed(5)
    with torch.no_grad():
        expected = segmenter.model(to_input(image)).argmax(1)[0].numpy()
    assert len(np.unique(expected)) > 1
    assert np.array_equal(segmenter(image), expected)
    assert np.array_equal(segmenter(Image.fromarray(image)), expected)
    assert segmenter.class_names == CLASS_NAMES
    shares = segmenter.shares(expected.astype(np.uint8))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["disc"] == (expected == 1).mean()


def test_read_only_arrays_are_taken_without_a_warning(weights):
    image = SceneDataset(1, 40)[0].image
    image.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Segmenter.from_file(weights)(image)


def test_colourise_and_overlay():
    labels = np.array([[0, 1], [2, 0]], np.uint8)
    palette = np.array([(1, 2, 3), (250, 0, 0), (0, 0, 250)], np.uint8)
    picture = colourise(labels, palette)
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), labels)
    assert np.array_equal(np.asarray(picture.convert("RGB")), palette[labels])
    rgb = np.full((2, 2, 3), 100, np.uint8)
    mixed = np.asarray(overlay(rgb, labels, palette))
    assert mixed[0, 0].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == [190, 40, 40]
    with pytest.raises(ValueError, match="same size"):
        overlay(rgb[:1], labels, palette)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="one length"):
        Segmenter(PixelNet(), ["a"], [])
    with pytest.raises(ValueError, match="twice its margin"):
        pixel_segmenter(tile=10, margin=5)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (127, 65)])
def test_scores_are_the_probabilities_of_every_tile(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    scores = pixel_segmenter(tile=100, margin=16).scores(image)
    assert scores.dtype == np.float32
    odds = np.exp(image.transpose(2, 0, 1) / 127.5 - 1)
    assert np.allclose(scores, odds / odds.sum(0), atol=1e-6)
    small = pixel_segmenter().scores(image, max_side=50)
    assert max(small.shape[1:]) == min(50, max(size))
    assert len(small) == 3


@pytest.mark.parametrize("max_side", [None, 20])
def test_crf_refines_the_scores_at_full_resolution(max_side):
    image = np.zeros((30, 40, 3), np.uint8)
    image[:, :20], image[:, 20:] = (120, 100, 0), (0, 100, 120)
    segmenter, steps = pixel_segmenter(), []
    crf = CRFParameters(iterations=3, color_sigma=20)
    noisy = image + np.random.default_rng(0).integers(0, 40, image.shape).astype(np.uint8)
    labels = segmenter(noisy, max_side=max_side, crf=crf, on_iteration=lambda *step: steps.append(step))
    energy = energy_of_scores(segmenter.scores(noisy, max_side=max_side), (30, 40), "probabilities")
    assert np.array_equal(labels, refine(noisy, energy, crf).argmax(0))
    assert labels.dtype == np.uint8
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (labels == np.repeat([[0] * 20 + [2] * 20], 30, 0)).all()
    assert (segmenter(noisy) != labels).any()


# The command


def segment(*arguments: object) -> int:
    return cli.main(["segment", *map(str, arguments)])


@pytest.fixture
def photo(tmp_path) -> str:
    path = tmp_path / "photo.jpg"
    Image.fromarray(SceneDataset(1, (50, 70), seed=1)[0].image).save(path)
    return str(path)


def test_command(photo, weights, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert segment(photo, "--weights", weights, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "70 x 50 pixels" in printed
    labels = Image.open(out / "photo-labels.png")
    assert (labels.mode, labels.size) == ("P", (70, 50))
    assert np.array_equal(np.asarray(labels), Segmenter.from_file(weights)(photo))
    assert Image.open(out / "photo-overlay.png").size == (70, 50)
    for index in np.unique(np.asarray(labels)):
        assert CLASS_NAMES[index] in printed


def test_command_json_and_names(photo, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert segment(photo, "--weights", weights, "--json", "--max-side", 40) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["width"], result["height"]) == (70, 50)
    assert result["labels"] == "photo-labels.png"
    assert sum(result["classes"].values()) == pytest.approx(1)
    assert set(result["classes"]) == set(CLASS_NAMES)
    assert segment(photo, "--weights", weights, "-o", "map.png") == 0
    assert (tmp_path / "map-overlay.png").exists()


def test_command_with_crf(photo, weights, tmp_path, capsys):
    options = ["--crf", "--crf-appearance-weight", 4, "--crf-filter", "local", "--crf-window", 2, "--json"]
    assert segment(photo, "--weights", weights, "-o", tmp_path / "x.png", *options) == 0
    crf = CRFParameters(appearance_weight=4, filter="local", window=2)
    assert json.loads(capsys.readouterr().out)["crf"] == dataclasses.asdict(crf)
    expected = Segmenter.from_file(weights)(photo, crf=crf)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected)
    assert segment(photo, "--weights", weights, "-o", tmp_path / "y.png", "--crf") == 0
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "y.png")), Segmenter.from_file(weights)(photo, crf=CRFParameters())
    )


@pytest.mark.parametrize("options", [[], ["--crf"]])
@pytest.mark.parametrize("size", [(1, 1), (1500, 3), (2, 900)])
def test_command_on_odd_sizes(size, options, weights, tmp_path):
    Image.new("L", size, 90).save(tmp_path / "odd.png")
    assert segment(tmp_path / "odd.png", "--weights", weights, "-o", tmp_path, *options) == 0
    assert Image.open(tmp_path / "odd-labels.png").size == size


def test_command_errors_are_one_line_with_exit_code_2(photo, weights, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "none.jpg", "--weights", weights], "none.jpg: No such file"),
        ([tmp_path / "text.png", "--weights", weights], "not an image"),
        ([tmp_path / "empty", "--weights", weights], "empty: has no images or videos; --recursive looks deeper"),
        ([tmp_path / "empty", "-r", "--weights", weights], "empty: has no images or videos"),
        ([tmp_path / "*.webp", "--weights", weights], "*.webp: no file has such a name"),
        ([photo, "--weights", "torchvision/fcn_resnet5"], "torchvision/fcn_resnet5"),
        (
            [photo, "--weights", weights, "--model", SMALL, "--classes", "none.txt"],
            "classes are voc, cityscapes, ade20k, or",
        ),
        ([photo, "--weights", weights, "--classes", "voc"], "weights.pt"),  # of 7 classes, not VOC's 21
        ([photo, "--weights", weights, "--window", "0"], "--window must be at least 1"),
        ([photo, "--weights", weights, "--output-stride", "7"], "output_stride"),
        ([photo, photo, tmp_path / "text.png", "--weights", weights, "-o", tmp_path / "x.png"], "must be a folder"),
        ([photo, "--weights", weights, "-o", tmp_path / "text.png" / "below"], "not a folder"),
        ([photo, "--weights", tmp_path / "none.pt"], "none.pt: No such file"),
        ([photo, "--weights", tmp_path / "text.png"], "not a weights file"),
        ([photo, "--weights", weights, "-o", tmp_path / "x.jpg"], "--output must be a .png"),
        ([photo, "--weights", weights, "-o", tmp_path / "no" / "x.png"], "there is no folder"),
        ([photo, "--weights", weights, "--max-side", "0"], "--max-side"),
        ([photo, "--weights", weights, "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        ([photo, "--weights", weights, "--crf-iterations", "5"], "--crf-iterations needs --crf"),
        ([photo, "--weights", weights, "--crf", "--crf-iterations", "0"], "--crf-iterations must be at least 1"),
        ([photo, "--weights", weights, "--crf", "--crf-color-sigma", "nan"], "--crf-color-sigma must be finite"),
    ]
    check_refusals(segment, cases, capsys)


def test_command_does_not_overwrite_the_photo(weights, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    assert segment(photo, "--weights", weights, "-o", photo) == 2
    assert "is the photo itself" in capsys.readouterr().err
    assert photo.read_bytes() == before


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs of two sizes, one of them deeper, a damaged one, and files that are none."""
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "b.png", "below/a.png")):
        size = (40, 50) if index < 3 else (36, 35)
        Image.fromarray(SceneDataset(4, size, seed=1)[index].image).save(root / name)
    (root / "c.png").write_bytes((root / "a.png").read_bytes()[:200])
    for name in ("notes.txt", ".hidden.png", "x-labels.png", "x-overlay.png"):
        (root / name).write_text("not to be read")
    return root


def _outputs(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder(folder, weights, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert segment(folder, "-r", "--weights", weights, "-o", out, "--batch", 2) == 1
    captured = capsys.readouterr()
    assert "4 done, 0 skipped, 1 with errors" in captured.out
    assert captured.err.count("\n") == 1
    assert f"{folder / 'c.png'}: the image is damaged" in captured.err
    stems = ("a", "b-jpg", "b-png", "below/a")
    assert _outputs(out) == sorted(f"{stem}-{kind}.png" for stem in stems for kind in ("labels", "overlay"))
    segmenter = Segmenter.from_file(weights)
    for name, stem in (("a.png", "a"), ("b.jpg", "b-jpg"), ("b.png", "b-png"), ("below/a.png", "below/a")):
        assert np.array_equal(np.asarray(Image.open(out / f"{stem}-labels.png")), segmenter(folder / name))


def test_folder_without_recursion_and_skipping(folder, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "c.png").unlink()
    assert segment(".", "--weights", weights, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert [result["photo"] for result in first["files"]] == ["a.png", "b.jpg", "b.png"]
    assert (first["errors"], first["skipped"]) == ([], 0)
    (folder / "a-overlay.png").unlink()
    assert segment(".", "--weights", weights, "--json", "--skip-existing") == 0  # what was written is not an input
    second = json.loads(capsys.readouterr().out)
    assert [result["photo"] for result in second["files"]] == ["a.png"]
    assert second["skipped"] == 2


def test_patterns_and_several_names(folder, weights, tmp_path, capsys):
    arguments = [folder / "b.*", folder / "a.png", folder / "b.png", folder / "none.png"]
    assert segment(*arguments, "--weights", weights, "-o", tmp_path, "--legend", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert [Path(item["photo"]).name for item in result["files"]] == ["b.jpg", "b.png", "a.png"]  # each once
    assert [item["file"] for item in result["errors"]] == [str(folder / "none.png")]
    assert "No such file" in result["errors"][0]["error"]
    assert Image.open(tmp_path / "legend.png").height > 7 * 14


def test_legend_of_folders_in_a_folder(folder, weights, tmp_path):
    for path in folder.glob("*.*"):
        path.unlink()
    assert segment(folder, "-r", "--weights", weights, "-o", tmp_path / "out", "--legend") == 0
    assert _outputs(tmp_path / "out") == ["below/a-labels.png", "below/a-overlay.png", "legend.png"]


def test_files_of_one_name_in_two_folders(folder, weights, tmp_path):
    assert segment(folder / "a.png", folder / "below" / "a.png", "--weights", weights, "-o", tmp_path / "out") == 0
    assert "a-png-2-labels.png" in _outputs(tmp_path / "out")
    sizes = {Image.open(path).size for path in (tmp_path / "out").glob("*labels.png")}
    assert sizes == {(50, 40), (35, 36)}


def test_prediction_options_reach_the_network(photo, weights, tmp_path):
    options = ["--scales", "0.75,1.25", "--flip", "--output-stride", 8, "--window", 64]
    assert segment(photo, "--weights", weights, "-o", tmp_path / "x.png", *options) == 0
    settings = {"scales": (0.75, 1.25), "flip": True, "output_stride": 8, "tile": 64, "margin": 8}
    expected = Segmenter.from_file(weights, **settings)(photo)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected)
    assert (expected != Segmenter.from_file(weights)(photo)).any()


def test_weights_without_classes(photo, weights, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(weights, weights_only=True)["state_dict"], plain)
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES))
    arguments = ["--weights", plain, "--model", SMALL, "--classes", tmp_path / "names.txt"]
    assert segment(photo, *arguments, "-o", tmp_path / "x.png") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), Segmenter.from_file(weights)(photo))
    segmenter = Segmenter.from_pretrained(plain, SMALL, classes=CLASS_NAMES)
    assert segmenter.class_names == CLASS_NAMES
    with pytest.raises(UserError, match="classifier"):
        Segmenter.from_pretrained(plain, SMALL, classes="cityscapes")


def test_names_of_known_weights(weights, tmp_path, monkeypatch):
    assert Segmenter.from_pretrained(weights).class_names == CLASS_NAMES
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(weights, weights_only=True)["state_dict"], plain)
    assert Segmenter.from_pretrained(plain, SMALL).class_names == tuple(f"class {i}" for i in range(7))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\ng")
    known = {str(plain): Known("", None, str(tmp_path / "names.txt"))}
    monkeypatch.setattr(segmenter_module, "known_weights", lambda: known)
    assert Segmenter.from_pretrained(plain, SMALL).class_names == tuple("abcdefg")


def test_weights_of_a_backbone_alone_are_refused():
    report = LoadReport("x.pth", "timm", "a backbone", missing=["decoder.a.weight", "classifier.weight"])
    with pytest.raises(UserError, match=r"x\.pth: has no weights of net's classifier, decoder: train it first"):
        check_complete(Adopted(nn.Identity(), "net", {}, report, None))


def test_classes_must_be_the_models():
    model = build(SMALL, num_classes=7)
    with pytest.raises(ValueError, match="must be the 7 classes of the model, got 2 names"):
        Segmenter(model, ["a", "b"], [(0, 0, 0), (1, 1, 1)])


def test_stream_is_what_single_calls_give():
    images = [np.random.default_rng(i).integers(0, 256, (9 + i // 3, 8, 3)).astype(np.uint8) for i in range(5)]
    segmenter = pixel_segmenter(batch_size=2)
    out = list(segmenter.stream(images))
    assert len(segmenter.model.sizes) == 3  # 2, 1 and 2 images
    for image, (rgb, labels) in zip(images, out, strict=True):
        assert np.array_equal(rgb, image)
        assert np.array_equal(labels, image.argmax(2))


def test_importing_the_package_imports_neither_pillow_nor_tqdm():
    code = "import deeplab_kernels, deeplab_kernels.cli; deeplab_kernels.cli.build_parser()"
    check_not_imported(code, ("PIL", "tqdm", "torch", "numpy", "skimage"))


# Documentation

DOCS = Path(__file__).parent.parent / "docs"


def test_documentation_runs(photo, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    shutil.copy(weights, "demo/weights.pt")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "segment.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert np.array_equal(np.asarray(Image.open("labels.png")), Segmenter.from_file(weights)(photo))


def test_documentation_names_every_option():
    text = (DOCS / "segment.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    segment_command.add_arguments(parser)
    options = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
    assert len(options) > 20
    assert [name for name in options if not name.startswith("--crf-") and name not in text] == []
