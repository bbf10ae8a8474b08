"""The refine command: label maps and scores, odd sizes, odd and damaged files."""

from __future__ import annotations

import argparse
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from _commands import check_refusals
from _processes import run_python
from _refine import coarse_labels, save_palette, two_halves
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.commands import refine as refine_command
from deeplab_kernels.commands.refine import comparison, resize_labels
from deeplab_kernels.models import refinement
from deeplab_kernels.models.data import voc_palette


def test_resize_labels_takes_the_nearest_centre():
    labels = np.array([[1, 2], [3, 4]])
    assert resize_labels(labels, (4, 4)).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert resize_labels(np.arange(9).reshape(1, 9), (1, 3)).tolist() == [[1, 4, 7]]


def run(*arguments: object) -> int:
    return cli.main(["refine", *map(str, arguments)])


@pytest.fixture
def labels() -> np.ndarray:
    return coarse_labels()


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
        ([photo, coarse, "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got"),
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
    printed = run_python(code, ROOT / "examples" / "pydensecrf_import.py")
    before, after = (float(v) for v in re.findall(r"(?:annotation|refined) (\d\.\d+)", printed))
    assert before < 0.7
    assert after > 0.99
    energies = [float(v) for v in re.findall(r"divergence (\S+)", printed)]
    assert energies == sorted(energies, reverse=True)
