"""Refinement by the CRF and the refine command: results against the definition, odd sizes, odd and damaged files."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _commands import check_refusals
from deeplab_kernels.models import refinement
from deeplab_kernels.models.data import LabelMap, read_annotation, voc_palette
from deeplab_kernels.models.refinement import CRFParameters, energy_of_labels, energy_of_scores, refine
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.commands import refine as refine_command
from deeplab_kernels.commands.refine import comparison, resize_labels
from deeplab_kernels.errors import UserError


def two_halves(height: int = 24, width: int = 30) -> np.ndarray:
    """A photograph, dark on the left and light on the right, with noise."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[:, width // 2 :] = 190
    return image + np.random.default_rng(0).integers(0, 12, image.shape).astype(np.uint8)


def mean_field(image: np.ndarray, energy: np.ndarray, p: CRFParameters) -> np.ndarray:
    """The definition with N x N matrices, in float64."""
    labels, height, width = energy.shape
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(float)
    colour = image.reshape(-1, 3).astype(float)
    square = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    different = ((colour[:, None] - colour) ** 2).sum(2)
    kernels = [
        p.appearance_weight * _normalised(
            np.exp(-square / (2 * p.appearance_sigma**2) - different / (2 * p.color_sigma**2)), x, y, p
        ),
        p.smoothness_weight * _normalised(np.exp(-square / (2 * p.smoothness_sigma**2)), x, y, p),
    ]  # fmt: skip
    u = energy.reshape(labels, -1).astype(float)
    q = _softmax(-u)
    for _ in range(p.iterations):
        q = _softmax(-u + q @ sum(kernels).T)
    return q.reshape(energy.shape)


def _normalised(kernel: np.ndarray, x: np.ndarray, y: np.ndarray, p: CRFParameters) -> np.ndarray:
    if p.filter == "local":
        far = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y)) > p.window
        kernel = np.where(far, 0, kernel)
    n = kernel.sum(1)
    return kernel / np.sqrt(n[:, None] * n)


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


# refine()


@pytest.mark.parametrize("filter", refinement.FILTERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (17, 5), (12, 13)])
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_probabilities_against_the_definition(filter, size, labels):
    rng = np.random.default_rng(labels)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    energy = rng.normal(size=(labels, *size)).astype(np.float32)
    p = CRFParameters(2.0, 10.0, 60.0, 1.5, 2.0, iterations=4, filter=filter, window=3)
    steps: list[tuple[int, int]] = []
    q = refine(image, energy, p, on_iteration=lambda done, total: steps.append((done, total)))
    assert q.shape == energy.shape
    assert q.dtype == np.float32
    assert steps == [(i, 4) for i in range(1, 5)]
    error = np.abs(q - mean_field(image, energy, p)).max()
    assert error < (0.3 if filter == "permutohedral" else 1e-5), error  # the lattice approximates


@pytest.mark.parametrize("filter", refinement.FILTERS)
@pytest.mark.parametrize("weights", [(0.0, 0.0), (3.0, 0.0), (0.0, 3.0)])
def test_a_weight_of_0_leaves_a_kernel_out(filter, weights):
    image, energy = two_halves(9, 11), np.random.default_rng(1).normal(size=(3, 9, 11)).astype(np.float32)
    p = CRFParameters(appearance_weight=weights[0], smoothness_weight=weights[1], iterations=2, filter=filter)
    expected = mean_field(image, energy, p)
    assert np.abs(refine(image, energy, p) - expected).max() < (0.15 if filter == "permutohedral" else 1e-5)


def test_the_layer_gives_the_same():
    """What a GPU would compute with: nn.DenseCRF, here on the CPU."""
    image, energy = two_halves(), np.random.default_rng(1).normal(size=(3, 24, 30)).astype(np.float32)
    for filter in refinement.FILTERS:
        p = CRFParameters(iterations=3, filter=filter)
        done: list[tuple[int, int]] = []
        layer = refinement._on_device(image, energy, p, "cpu", lambda *step, done=done: done.append(step))
        assert np.abs(layer - refine(image, energy, p)).max() < 2e-3
        assert done == [(3, 3)]


def test_inputs_are_left_alone_and_may_be_read_only_or_strided():
    image, energy = two_halves(10, 12)[::-1], np.random.default_rng(1).normal(size=(10, 12, 2)).astype(np.float32)
    energy = energy.transpose(2, 0, 1)
    image.setflags(write=False)
    for filter in refinement.FILTERS:
        before = energy.copy()
        refine(image, energy, CRFParameters(iterations=2, filter=filter))
        assert np.array_equal(energy, before)


def test_refine_with_wrong_arguments(monkeypatch):
    image, energy = two_halves(4, 5), np.zeros((2, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"one size, got \(4, 5, 3\), \(2, 5, 5\)"):
        refine(image, np.zeros((2, 5, 5), np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="energy must be finite"):
            refine(image, np.full_like(energy, bad))
    monkeypatch.setattr(refinement, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"2 labels on 5 x 4 pixels take about .* GB .*--max-side"):
        refine(image, energy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appearance_weight", -1.0), ("smoothness_weight", math.inf), ("appearance_sigma", 0.0), ("color_sigma", -3.0),
        ("smoothness_sigma", math.nan), ("iterations", 0), ("window", 0), ("filter", "box"),
    ],
)  # fmt: skip
def test_wrong_parameters(name, value, capsys):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        CRFParameters(**{name: value})
    option = f"--{name.replace('_', '-')}"
    if name != "filter":  # argparse checks the choices
        assert cli.main(["refine", "a.png", "b.png", option, str(value)]) == 2
        assert f"{option} must be" in capsys.readouterr().err


def test_memory_that_is_available():
    there = refinement.available_memory()
    assert there is None or there > 2**20
    assert refinement.required_memory(21, 4096, 4096) < 16 * 2**30


# Energies


def test_energy_of_labels():
    labels = np.array([[0, 7, 255, 7]])
    energy = energy_of_labels(labels, [0, 3, 7], 255, 0.6)
    expected = np.array([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [1 / 3] * 3, [0.2, 0.2, 0.6]])
    assert np.allclose(np.exp(-energy[:, 0]).T, expected)
    assert energy_of_labels(labels, [0, 7, 255], None, 0.6)[2, 0, 2] == pytest.approx(-math.log(0.6))
    for confidence in (1 / 3, 0.1, 1.0):
        with pytest.raises(UserError, match="confidence must be between 1/3"):
            energy_of_labels(labels, [0, 3, 7], 255, confidence)


def test_energy_of_scores():
    logits = np.random.default_rng(0).normal(0, 3, (4, 5, 6))
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    for scores in (logits, probabilities, probabilities.astype(np.float16), np.asfortranarray(logits.astype(">f4"))):
        assert _softmax(-energy_of_scores(scores)) == pytest.approx(probabilities, abs=1e-3)
    assert energy_of_scores(np.array([[[0.0]], [[1.0]]])).ravel() == pytest.approx([-math.log(1e-5), 0])
    huge = energy_of_scores(np.array([[[1e30]], [[-1e30]]]))
    assert np.isfinite(huge).all()
    as_logits = energy_of_scores(probabilities, kind="logits")
    assert _softmax(-as_logits) == pytest.approx(_softmax(probabilities), abs=1e-6)


@pytest.mark.parametrize("size", [(10, 12), (13, 15), (3, 4), (1, 1)])
def test_scores_of_another_size_are_resized(size):
    scores = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    energy = energy_of_scores(scores, size)
    shrinks = size[0] < 5
    expected = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], size, mode="bilinear", antialias=shrinks)
    assert energy.shape == (2, *size)
    assert energy[1] - energy[0] == pytest.approx((expected[0, 0] - expected[0, 1]).numpy(), abs=1e-5)
    flat = energy_of_scores(np.full((2, 5, 6), 0.5), size)
    assert flat == pytest.approx(np.full((2, *size), math.log(2)))


@pytest.mark.parametrize(
    ("scores", "kind", "message"),
    [
        (np.zeros((3, 8)), "auto", r"shape \(L, H, W\), got \(3, 8\)"),
        (np.zeros((1, 8, 9)), "auto", "at least 2 labels"),
        (np.zeros((8, 9, 3)), "auto", "do not fit a photograph of 9 x 8 pixels; are the labels the last axis"),
        (np.zeros((2, 9, 8)), "auto", "do not fit a photograph of 9 x 8"),
        (np.full((2, 8, 9), np.nan), "auto", "finite"),
        (np.full((2, 8, 9), np.inf), "logits", "finite"),
        (np.full((2, 8, 9), -1.0), "probabilities", "negative"),
    ],
)
def test_scores_that_are_refused(scores, kind, message):
    with pytest.raises(UserError, match=message):
        energy_of_scores(scores, (8, 9), kind)


def test_most_probable_of_a_resized_map():
    q = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    assert np.array_equal(refinement.most_probable(q), q.argmax(0))
    large = torch.nn.functional.interpolate(torch.from_numpy(q)[None], (9, 11), mode="bilinear")[0].numpy()
    assert np.array_equal(refinement.most_probable(q, (9, 11)), large.argmax(0))


def test_resize_labels_takes_the_nearest_centre():
    labels = np.array([[1, 2], [3, 4]])
    assert resize_labels(labels, (4, 4)).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert resize_labels(np.arange(9).reshape(1, 9), (1, 3)).tolist() == [[1, 4, 7]]


# Reading annotations


@pytest.fixture
def labels() -> np.ndarray:
    out = np.zeros((24, 30), np.uint8)
    out[4:, 12:] = 2
    out[:3] = 255
    return out


def save_palette(path, labels, palette=((0, 0, 0), (9, 9, 9), (1, 200, 77))) -> None:
    image = Image.fromarray(labels)
    # All 256 colours: with fewer Pillow stores fewer bits per pixel than label 255 needs.
    image.putpalette(np.array([*palette, *[(0, 0, 0)] * (256 - len(palette))], np.uint8).tobytes())
    image.save(path)


def test_palette_grey_bit_and_numpy_label_maps(tmp_path, labels):
    save_palette(tmp_path / "p.png", labels)
    read = read_annotation(tmp_path / "p.png")
    assert np.array_equal(read.labels, labels)
    assert read.palette[:3].tolist() == [[0, 0, 0], [9, 9, 9], [1, 200, 77]]
    Image.fromarray(labels).save(tmp_path / "l.png")
    assert np.array_equal(read_annotation(tmp_path / "l.png").labels, labels)
    assert read_annotation(tmp_path / "l.png").palette is None
    Image.fromarray(labels == 2).save(tmp_path / "bit.png")
    assert np.array_equal(read_annotation(tmp_path / "bit.png").labels, labels == 2)
    wide = labels.astype(np.uint16) * 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(read_annotation(tmp_path / "wide.png").labels, wide)
    np.save(tmp_path / "n.npy", labels.astype(np.int64))
    assert np.array_equal(read_annotation(tmp_path / "n.npy").labels, labels)
    np.save(tmp_path / "bool.npy", labels == 2)
    assert np.array_equal(read_annotation(tmp_path / "bool.npy").labels, labels == 2)


def test_annotations_are_turned_as_their_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(labels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_annotation(tmp_path / "x.png").labels, np.rot90(labels, -1))


def test_label_maps_as_images():
    labels = np.array([[0, 1, 255]], np.uint8)
    assert LabelMap(labels).to_image().mode == "L"
    assert LabelMap(labels, voc_palette()).to_image().mode == "P"
    short = LabelMap(labels, np.array([[7, 8, 9]], np.uint8))
    file = io.BytesIO()
    short.to_image().save(file, "PNG")
    assert np.asarray(Image.open(file)).tolist() == labels.tolist()  # a short palette cuts no label off
    wide = LabelMap(np.array([[0, 300]])).to_image()
    assert np.asarray(wide).tolist() == [[0, 300]]
    colours = LabelMap(labels, np.array([[7, 8, 9]], np.uint8)).colours()
    assert colours[0].tolist() == [7, 8, 9]
    assert colours[1].tolist() == voc_palette()[1].tolist()


def test_voc_palette():
    palette = voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 20: (0, 64, 128)}
    assert {k: tuple(palette[k].tolist()) for k in known} == known
    assert palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256


# The command


def run(*arguments: object) -> int:
    return cli.main(["refine", *map(str, arguments)])


@pytest.fixture
def photo(tmp_path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(two_halves()).save(path)
    return str(path)


TRUTH = np.repeat([[0] * 15 + [2] * 15], 24, 0)


def test_command_on_a_label_map(photo, labels, tmp_path, capsys):
    save_palette(tmp_path / "coarse.png", labels)
    out = tmp_path / "out"
    out.mkdir()
    assert run(photo, tmp_path / "coarse.png", "-o", out, "--classes", 3, "--confidence", 0.8) == 0
    printed = capsys.readouterr().out
    refined = Image.open(out / "photo-refined.png")
    assert refined.mode == "P"
    assert refined.getpalette()[:9] == [0, 0, 0, 9, 9, 9, 1, 200, 77]
    assert np.array_equal(np.asarray(refined), TRUTH)  # the photograph's edge, and no unknown pixel left
    assert "filled 12.50 % of all" in printed
    assert "label 2      50.00 %" in printed
    overlay = np.asarray(Image.open(out / "photo-refined-overlay.png"))
    assert overlay.shape == (24, 30, 3)
    assert np.array_equal(overlay[:, :15], two_halves()[:, :15])
    shown = np.asarray(Image.open(out / "photo-refined-comparison.png"))
    assert shown.shape == (24, 4 * 30 + 3 * 6, 3)
    assert np.array_equal(shown[:, :30], two_halves())
    assert (shown[0, 36:66] == 128).all()  # unknown
    assert (shown[10, 36 + 20] == (1, 200, 77)).all()
    assert (shown[0, 2 * 36 + 20] == (1, 200, 77)).all()
    assert np.array_equal(shown[:, 3 * 36 :], overlay)


@pytest.mark.parametrize(
    "options", [[], ["--filter", "exact"], ["--filter", "local", "--window", 9, "--iterations", 20]]
)
def test_command_with_each_filter(options, photo, labels, tmp_path, capsys):
    Image.fromarray(labels).save(tmp_path / "coarse.png")
    assert run(photo, tmp_path / "coarse.png", "-o", tmp_path / "x.png", "--json", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), TRUTH)
    assert Image.open(tmp_path / "x.png").mode == "L"  # as it came: without a palette
    assert result["filled"] == 0.125
    assert result["changed"] == pytest.approx((labels != TRUTH)[3:].mean())
    assert result["shares"] == {"0": 0.5, "2": 0.5}
    assert result["parameters"]["filter"] == (options[1] if options else "permutohedral")


def test_keep_void_and_void_none(photo, labels, tmp_path):
    Image.fromarray(labels).save(tmp_path / "c.png")
    assert run(photo, tmp_path / "c.png", "-o", tmp_path / "x.png", "--keep-void") == 0
    kept = np.asarray(Image.open(tmp_path / "x.png"))
    assert (kept[:3] == 255).all()
    assert np.array_equal(kept[3:], TRUTH[3:])
    Image.fromarray(np.where(labels == 2, np.uint8(255), np.uint8(0))).save(tmp_path / "white.png")
    assert run(photo, tmp_path / "white.png", "-o", tmp_path / "y.png", "--void", "none") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), TRUTH // 2 * 255)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
@pytest.mark.parametrize("size", [(24, 30), (8, 10)])
def test_command_on_scores(kind, size, photo, tmp_path, capsys):
    columns = np.linspace(-2, 2, size[1])
    scores = np.broadcast_to(np.stack([-columns, columns])[:, None], (2, *size))
    if kind == "probabilities":
        scores = np.exp(scores) / np.exp(scores).sum(0)
    np.save(tmp_path / "s.npy", scores)
    save_palette(tmp_path / "colours.png", np.zeros((1, 1), np.uint8))
    arguments = ["--palette", tmp_path / "colours.png", "--probabilities", tmp_path / "q.dat", "--json"]
    assert run(photo, tmp_path / "s.npy", "-o", tmp_path / "x.png", "--classes", 2, *arguments) == 0
    refined = Image.open(tmp_path / "x.png")
    assert np.array_equal(np.asarray(refined), TRUTH // 2)
    assert refined.getpalette()[6:9] == [1, 200, 77]
    q = np.load(tmp_path / "q.dat")
    assert q.shape == (2, 24, 30)
    assert q.sum(0) == pytest.approx(np.ones((24, 30)), abs=1e-5)
    assert np.array_equal(q.argmax(0), np.asarray(refined))
    assert json.loads(capsys.readouterr().out)["labels"] == 2


def test_max_side_refines_a_smaller_photograph(photo, labels, tmp_path):
    Image.fromarray(labels).save(tmp_path / "c.png")
    assert run(photo, tmp_path / "c.png", "-o", tmp_path / "x.png", "--max-side", 10, "--probabilities",
               tmp_path / "q.npy") == 0  # fmt: skip
    assert np.load(tmp_path / "q.npy").shape == (2, 8, 10)
    refined = np.asarray(Image.open(tmp_path / "x.png"))
    assert refined.shape == (24, 30)
    assert (refined != TRUTH).mean() < 0.11  # a pixel of the small picture is three wide


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_photographs_of_every_mode(mode, labels, tmp_path):
    grey = two_halves()[..., 0]
    image = (
        Image.fromarray(grey.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(grey).convert(mode, dither=Image.Dither.NONE)
    )
    image.save(tmp_path / "p.png")
    Image.fromarray(labels).save(tmp_path / "c.png")
    assert run(tmp_path / "p.png", tmp_path / "c.png", "-o", tmp_path) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p-refined.png")), TRUTH)


def test_a_photograph_that_is_turned(labels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    Image.fromarray(np.rot90(two_halves())).save(tmp_path / "p.png", exif=exif)
    Image.fromarray(labels).save(tmp_path / "c.png")
    assert run(tmp_path / "p.png", tmp_path / "c.png", "-o", tmp_path) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p-refined.png")), TRUTH)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3000, 2), (1, 2500)])
def test_odd_sizes(size, tmp_path):
    Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "p.png")
    scores = np.zeros((3, *size[::-1]), np.float32)
    scores[1] = 1
    np.save(tmp_path / "s.npy", scores)
    assert run(tmp_path / "p.png", tmp_path / "s.npy", "-o", tmp_path) == 0
    refined = Image.open(tmp_path / "p-refined.png")
    assert refined.size == size
    assert (np.asarray(refined) == 1).all()
    shown = Image.open(tmp_path / "p-refined-comparison.png").size
    assert max(shown) <= 4 * 900 + 18


def test_one_label_stays(photo, tmp_path, capsys):
    Image.new("L", (30, 24), 7).save(tmp_path / "c.png")
    assert run(photo, tmp_path / "c.png", "-o", tmp_path / "x.png", "--json") == 0
    assert (np.asarray(Image.open(tmp_path / "x.png")) == 7).all()
    assert json.loads(capsys.readouterr().out)["changed"] == 0


def test_labels_beyond_8_bits(photo, labels, tmp_path):
    wide = np.where(labels == 2, np.uint16(3000), np.uint16(17))
    Image.fromarray(wide).save(tmp_path / "c.png")
    assert run(photo, tmp_path / "c.png", "-o", tmp_path / "x.png", "--confidence", 0.6) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.where(TRUTH == 2, 3000, 17))


class _Trap:
    def __reduce__(self):
        return (print, ("code in an annotation was run",))


def _bad_annotation(kind: str, path) -> None:
    good = np.tile(np.arange(2, dtype=np.uint8).repeat(15), (24, 1))
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated image":
        Image.fromarray(np.random.default_rng(0).integers(0, 3, (240, 300)).astype(np.uint8)).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "jpeg":
        Image.fromarray(good).save(path, "JPEG")
    elif kind == "colours":
        Image.fromarray(np.repeat(good[..., None], 3, 2)).save(path, "PNG")
    elif kind == "all unknown":
        Image.new("L", (30, 24), 255).save(path, "PNG")
    elif kind == "white mask":
        Image.fromarray((good * 255).astype(np.uint8)).save(path, "PNG")
    elif kind == "photograph":
        Image.fromarray(np.arange(720, dtype=np.uint16).reshape(24, 30).astype(np.uint8)).save(path, "PNG")
    elif kind == "another aspect":
        Image.new("L", (24, 30), 1).save(path, "PNG")
    elif kind == "out of range":
        Image.fromarray(good * np.uint8(40)).save(path, "PNG")
    else:
        arrays = {
            "NaN": np.full((2, 24, 30), np.nan),
            "objects": np.array([_Trap()], object),
            "four labels": np.zeros((4, 24, 30)),
            "text array": np.array(["a", "b"]),
            "flat": np.zeros(720),
            "float labels": np.zeros((24, 30)),
            "integer scores": np.zeros((2, 24, 30), int),
            "negative labels": np.full((24, 30), -1),
            "labels last": np.zeros((24, 30, 2)),
            "no pixels": np.zeros((2, 0, 30)),
            "truncated array": np.zeros((2, 24, 30)),
            "archive": good,
        }
        with path.open("wb") as file:
            (np.savez if kind == "archive" else np.save)(file, arrays[kind])
        if kind == "truncated array":
            path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not an image"),
        ("empty", "not an image"),
        ("truncated image", "damaged"),
        ("jpeg", "JPEG"),
        ("colours", "one number per pixel"),
        ("all unknown", "every pixel is unknown"),
        ("white mask", "--void none"),
        ("photograph", "looks like a picture"),
        ("another aspect", "24 x 30 pixels do not fit a photograph of 30 x 24"),
        ("out of range", "has label 40, but --classes 21 allows 0 to 20 and 255 for unknown"),
        ("NaN", "finite"),
        ("objects", "never loaded"),
        ("four labels", "scores of 4 labels, but --classes is 21"),
        ("text array", "allowed are"),
        ("flat", r"shape (720,)"),
        ("float labels", "neither"),
        ("integer scores", "neither"),
        ("negative labels", "labels must be 0 to 65535, got -1"),
        ("labels last", "the last axis"),
        ("no pixels", "(2, 0, 30)"),
        ("truncated array", "damaged"),
        ("archive", "not an image"),
    ],
)
def test_bad_annotations_are_one_line_with_exit_code_2(kind, message, photo, tmp_path, capsys):
    path = tmp_path / "annotation.bin"
    _bad_annotation(kind, path)
    options = ["--classes", 21] if "classes" in message else []
    assert run(photo, path, "-o", tmp_path / "x.png", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "annotation.bin" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "x.png").exists()


def test_other_errors_are_one_line_with_exit_code_2(photo, labels, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(labels).save(tmp_path / "c.png")
    np.save(tmp_path / "s.npy", np.zeros((2, 24, 30)))
    coarse, scores = tmp_path / "c.png", tmp_path / "s.npy"
    cases = [
        ([tmp_path / "none.jpg", coarse], "none.jpg: No such file"),
        ([tmp_path / "text.png", coarse], "not an image"),
        ([photo, tmp_path / "none.png"], "none.png: No such file"),
        ([photo, tmp_path], "Is a directory"),
        ([photo, coarse, "-o", tmp_path / "x.jpg"], "--output must be a .png"),
        ([photo, coarse, "-o", tmp_path / "no" / "x.png"], "there is no folder"),
        ([photo, coarse, "-o", coarse], "is the annotation itself"),
        ([photo, coarse, "-o", photo], "is the photo itself"),
        ([photo, scores, "--probabilities", scores], "--probabilities:"),
        ([photo, scores, "-o", tmp_path / "x.png", "--probabilities", tmp_path / "x.png"], "is a picture"),
        ([photo, coarse, "--void", "-1"], "--void must be"),
        ([photo, coarse, "--classes", "1"], "--classes must be at least 2"),
        ([photo, coarse, "--max-side", "0"], "--max-side must be at least 1"),
        ([photo, coarse, "--confidence", "1"], "--confidence must be between 0 and 1"),
        ([photo, coarse, "--confidence", "0.4"], "confidence must be between 1/2"),
        ([photo, coarse, "--scores", "logits"], "--scores is for score maps"),
        ([photo, scores, "--confidence", "0.9"], "--confidence is for label maps"),
        ([photo, scores, "--keep-void"], "--keep-void is for label maps"),
        ([photo, coarse, "--palette", coarse], "has no palette"),
        ([photo, coarse, "--device", "abacus"], "--device abacus"),
    ]
    monkeypatch.chdir(tmp_path)
    check_refusals(run, cases, capsys)
    assert not (tmp_path / "photo-refined.png").exists()
    monkeypatch.setattr(refinement, "available_memory", lambda: 1000)
    assert run(photo, coarse) == 2
    assert "--max-side" in capsys.readouterr().err


def test_comparison_of_a_wide_photograph_goes_downwards():
    image = np.zeros((100, 2000, 3), np.uint8)
    labels = np.zeros((100, 2000), np.uint8)
    assert comparison(image, labels, labels, voc_palette()).size == (900, 4 * 45 + 18)
    assert comparison(image[:, :100], labels[:, :100], labels[:, :100], voc_palette(), longest=50).size == (218, 50)


# Documentation and examples

ROOT = Path(__file__).parent.parent


def test_documentation_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "refine.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_documentation_names_every_option():
    text = (ROOT / "docs" / "refine.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    refine_command.add_arguments(parser)
    options = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
    assert len(options) > 15
    assert [name for name in options if name != "--output" and f"{name}" not in text] == []


def test_example_of_the_layer(capsys):
    runpy.run_path(str(ROOT / "examples" / "dense_crf.py"), run_name="__main__")
    printed = capsys.readouterr().out
    network, refined, trained = (float(v) for v in re.findall(r"(?:network|CRF|right) (\d\.\d+)", printed))
    assert network < refined < trained
    first, last = (float(v) for v in re.search(r"loss (\S+) -> ([\d.]+)", printed).groups())
    assert last < first / 5


def test_example_written_for_pydensecrf_imports_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "pydensecrf_import.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    before, after = (float(v) for v in re.findall(r"(?:annotation|refined) (\d\.\d+)", result.stdout))
    assert before < 0.7
    assert after > 0.99
    energies = [float(v) for v in re.findall(r"divergence (\S+)", result.stdout)]
    assert energies == sorted(energies, reverse=True)
