"""The demo from end to end (--quick), and the pieces of its report."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from _html_page import Page, check_self_contained
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.demo import crf, main_job, photographs, report, speed
from deeplab_kernels.demo.pictures import mistakes, probability, side_by_side
from deeplab_kernels.errors import UserError
from deeplab_kernels.models import Segmenter
from deeplab_kernels.models.data import Scene


def test_quick_demo(tmp_path, capsys):
    photo = tmp_path / "mine <1>.png"
    Image.new("LA", (30, 9), (200, 128)).save(photo)
    out = tmp_path / "demo"
    threads = torch.get_num_threads()
    # The time limit is not what this test is about: a busy machine must not shorten its training.
    limits = ["--steps", 3, "--time-limit", 600]
    arguments = ["demo", "--quick", "--output", out, "--seed", 3, *limits, "--photo", photo]
    assert cli.main([str(a) for a in arguments]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert re.search(r"mean IoU \d+\.\d % on \d+ unseen scenes \(3 steps", printed)
    assert "report.html" in printed

    text = (out / "report.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert page.references
    assert "script" not in page.tags
    for heading in (
        "Unseen scenes",
        "Photographs",
        "Refined by a CRF",
        "Training",
        "Multiply-Adds",
        "Speed against PyTorch",
    ):
        assert heading in page.headings
    words = " ".join(page.text)
    assert "54.17" in words  # the paper's Multiply-Adds
    assert "54.06" in words  # ours
    assert "--seed 3" in words
    assert torch.__version__ in words
    assert "mine <1>.png" in words
    assert "--quick" in words

    results = json.loads((out / "results.json").read_text())
    assert results["training"]["steps"] == 3
    assert 0 <= results["evaluation"]["mean_iou"] <= 1
    assert {row["task"] for row in results["speed"]} == {"inference", "training"}
    assert all(row["ours_ms"] > 0 and row["torch_ms"] > 0 for row in results["speed"])
    assert len(results["madds"]) == 6

    rows = results["crf"]["rows"]
    assert [row["name"] for row in rows] == ["network alone", *crf.QUICK]
    assert all(len(row["trimap_mean_iou"]) == len(crf.WIDTHS) for row in rows)
    assert rows[3]["parameters"]["filter"] == "permutohedral"
    assert (out / "annotation-astronaut.png").exists() == bool(photographs.bundled())
    assert Image.open(out / "scene-1-crf-labels.png").size[0] == 5 * main_job.QUICK.scene_size + 4 * 6

    assert Image.open(out / "scene-1.png").size[1] == main_job.QUICK.scene_size
    labels = Segmenter.from_file(out / "weights.pt")(photo)
    assert labels.shape == (9, 30)


def test_the_demo_repeats(tmp_path, monkeypatch):
    """The same seed on the same number of threads gives the same weights and the same figures."""
    monkeypatch.setattr(main_job, "paper_table", lambda multi_scale: [])  # slow, and random in nothing
    tiny = dataclasses.replace(
        main_job.QUICK, train_scenes=3, test_scenes=2, scene_size=49, steps=2, batch_size=2, crop=33, layers=()
    )

    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        main_job.run(tmp_path / name, seed=seed, settings=tiny, photographs=[], command="x", quick=True)
        return torch.load(tmp_path / name / "weights.pt", weights_only=True)["state_dict"]

    first, second, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert (tmp_path / "a" / "scene-1.png").read_bytes() == (tmp_path / "b" / "scene-1.png").read_bytes()
    assert "is not installed" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be positive"),
        (["--threads", "-1"], "--threads must be positive"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--photo", "none.jpg"], "--photo: there is no file none.jpg"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_photograph_that_is_none_is_refused_before_the_training(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_text("no image")
    assert cli.main(["demo", "--photo", str(tmp_path / "photo.jpg"), "--output", str(tmp_path / "demo")]) == 2
    assert "photo.jpg: not an image" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main_job.run(tmp_path / "demo", seed=0, settings=main_job.QUICK, photographs=[], command="", quick=True)


# Photographs


def test_bundled_photographs_need_no_network(monkeypatch):
    pytest.importorskip("skimage", reason="extra: demo")
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    found = photographs.bundled()
    assert [p.path.stem for p in found] == ["coins", "coffee", "chelsea"]
    assert all(Image.open(p.path).size[0] > 100 for p in found)


def test_without_scikit_image_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    assert photographs.bundled() == []


# CRF


class _Scores:
    """In place of a network: the true labels, but wrong in a band at boundaries, as a coarse score map is."""

    class_names, palette = ("background", "object"), np.array([(0, 0, 0), (255, 0, 0)], np.uint8)

    def scores(self, image):
        true = (image[..., 0] > 128).astype(np.float32)
        moved = np.roll(true, 4, axis=1) * np.float32(0.76) + np.float32(0.12)
        return np.stack([1 - moved, moved])


def _scene(shift: int) -> Scene:
    labels = np.zeros((40, 50), np.uint8)
    labels[10:30, 10 + shift : 30 + shift] = 1
    image = np.where(labels[..., None] == 1, np.uint8(200), np.uint8(40)).repeat(3, 2)
    return Scene(image, labels)


def test_parameters_are_chosen_on_the_validation_scenes_alone():
    from deeplab_kernels.models.refinement import CRFParameters

    good = CRFParameters(10, 20, 13, 1, 1)
    useless = CRFParameters(0.0, smoothness_weight=0.0)
    candidates = {"one": (useless, good), "other": (good, useless)}
    seen: list[int] = []
    scenes, validation = [_scene(0), _scene(5)], [_scene(9)]
    result = crf.compare(_Scores(), scenes, validation, candidates, seen.append)
    assert [row.parameters for row in result.rows] == [None, good, good]
    assert [row.tried for row in result.rows] == [0, 2, 2]
    assert result.rows[1].mean_iou == 1
    assert result.rows[1].trimap == [1.0] * len(crf.WIDTHS)
    assert result.rows[0].mean_iou < 0.8
    assert result.rows[0].validation < 0.8
    assert result.chosen == good
    assert sum(seen) == crf.refinements(candidates, 2, 1) == 4 * 1 + 2 * 2


def test_scene_pictures():
    from deeplab_kernels.models.refinement import CRFParameters

    for png in crf.scene_pictures(_Scores(), _scene(3), CRFParameters(filter="local"), CRFParameters(10, 20, 13, 1, 1)):
        image = np.asarray(Image.open(io.BytesIO(png)))
        assert image.shape == (40, 5 * 50 + 4 * 6, 4)
        last, true = image[:, 4 * 56 : 5 * 56, 0], image[:, 56:106, 0]
        assert ((last > 128) == (true > 128)).all()


@pytest.mark.parametrize("name", crf.COARSE)
def test_coarse_annotations_are_refined(name):
    pytest.importorskip("skimage", reason="extra: demo")
    (photograph,) = photographs.bundled((name,))
    png, changed = crf.refine_annotation(photograph)
    width, height = Image.open(photograph.path).size
    assert Image.open(io.BytesIO(png)).size == (4 * width + 18, height)
    assert 0.005 < changed < 0.25


def test_probability_is_grey():
    assert probability(np.array([[0, 0.5, 2]]))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


# Report and pictures


def results(**changes) -> report.Results:
    layer = speed.Layer("ASPP", 8, 9, 2)
    rows = [
        speed.SpeedRow(layer, "NCHW", "inference", 1.0, 10.0, 1e-7),
        speed.SpeedRow(layer, "NCHW", "training", 4.0, 2.0, 1e-6),
    ]
    values = {
        "command": "demo <&>",
        "seed": 0,
        "quick": False,
        "model": "m",
        "parameters": 1_500_000,
        "class_names": ["background", "<b>"],
        "palette": [(0, 0, 0), (255, 0, 0)],
        "train_scenes": 3,
        "crop": 17,
        "batch_size": 2,
        "planned_steps": 4,
        "scene_size": 33,
        "losses": [2.0, 1.0, 0.5, 0.25],
        "test_scenes": 2,
        "iou": [0.5, math.nan],
        "mean_iou": 0.5,
        "pixel_accuracy": 0.75,
        "background_only": 0.1,
        "scenes": [report.Figure(side_by_side([np.zeros((4, 4, 3), np.uint8)]), "a < b", 'quote "')],
        "speed": rows,
        "seconds": {"training": 12.0},
        "machine": {"processor": "a & b"},
    }
    return report.Results(**{**values, **changes})


def test_report_escapes_and_nests():
    page = check_self_contained(report.render(results()))
    words = " ".join(page.text)
    for text in (
        "demo <&>",
        "<b>",
        "a < b",
        "a & b",
        "50.0\N{NO-BREAK SPACE}%",
        "10.0\N{MULTIPLICATION SIGN}",
        "0.5\N{MULTIPLICATION SIGN}",
    ):
        assert text in words
    assert "cut from" not in words
    assert "figures mean little" not in words


def test_report_tells_of_a_run_cut_short_and_of_what_is_missing():
    words = " ".join(Page(report.render(results(planned_steps=100, quick=True, speed=[], losses=[1.0]))).text)
    assert "cut from 100 steps" in words
    assert "figures mean little" in words
    assert "is not installed" in words


def test_report_tells_gains_and_losses_of_the_crfs_alike():
    rows = [
        crf.Row("network alone", None, 0.7, [0.4] * 7, 0, 0.6),
        crf.Row("short <range>", crf.CRFParameters(filter="local"), 0.65, [0.3] * 6 + [math.nan], 3, 0.61),
        crf.Row("connected", crf.CRFParameters(), 0.75, [0.55] * 7, 2, 0.7),
    ]
    text = report.render(results(crf=crf.Comparison(12, rows)))
    words = " ".join(check_self_contained(text).text)
    assert "short <range>:  harms , -5.0 points of mean IoU, -10.0 points within 1 pixel of a boundary" in words
    assert "connected:  helps , +5.0 points of mean IoU, +15.0 points" in words
    assert "best of 3" in words
    assert "12 other scenes" in words
    assert text.count("<polyline") == 2 + 3
    summary = results(crf=crf.Comparison(12, rows)).summary()
    assert json.loads(json.dumps(summary, allow_nan=False))["crf"]["rows"][1]["trimap_mean_iou"][-1] is None


def test_summary_is_json():
    summary = json.loads(json.dumps(results().summary(), allow_nan=False))
    assert summary["evaluation"]["iou"] == {"background": 0.5, "<b>": None}
    assert [row["ratio"] for row in summary["speed"]] == [10.0, 0.5]


def test_side_by_side():
    red, blue = np.full((5, 3, 3), (255, 0, 0), np.uint8), np.full((5, 2, 3), (0, 0, 255), np.uint8)
    image = np.asarray(Image.open(io.BytesIO(side_by_side([red, blue], scale=2))))
    assert image.shape[0] == 10
    assert (image[:, :6] == (255, 0, 0, 255)).all()
    assert (image[:, -4:] == (0, 0, 255, 255)).all()
    assert (image[:, 6:-4, 3] == 0).all()
    with pytest.raises(ValueError, match="one height"):
        side_by_side([red, blue[:3]])


def test_mistakes_are_red():
    out = mistakes(np.zeros((1, 2, 3), np.uint8), np.array([[1, 1]]), np.array([[1, 0]]))
    assert out[0, 1].tolist() == [220, 30, 30]
    assert len(set(out[0, 0].tolist())) == 1


# Speed


def test_measured_results_are_checked(monkeypatch):
    layers = (speed.Layer("tiny", 3, 9, 2),)
    rows = speed.measure(layers, rounds=1)
    assert [(r.layout, r.task) for r in rows] == [
        ("NCHW", "inference"), ("NCHW", "training"), ("NHWC", "inference"), ("NHWC", "training"),
    ]  # fmt: skip
    assert all(r.error < 1e-4 and r.ours_ms > 0 for r in rows)
    right = speed.ops.atrous_depthwise_bn_act
    monkeypatch.setattr(speed.ops, "atrous_depthwise_bn_act", lambda *a, **k: right(*a, **k) * 1.1)
    with pytest.raises(AssertionError, match="it is not timed"):
        speed.measure(layers, rounds=1)
