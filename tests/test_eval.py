"""The eval command: the table, the files, the options, and what it refuses."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from _commands import check_not_imported, check_refusals, small_weights
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.commands import eval as eval_command
from deeplab_kernels.models.data import (
    CLASS_NAMES,
    IGNORE,
    PALETTE,
    Scene,
    open_dataset,
    write_generated_dataset,
)
from deeplab_kernels.models.evaluation import evaluate, plots
from deeplab_kernels.models.evaluation.pictures import WorstImages, boundary_picture
from deeplab_kernels.models.inference import PAPER_SCALES, Inference
from deeplab_kernels.models.refinement import CRFParameters
from deeplab_kernels.models.weights import build_from_file

DATA = "generated:length=3,size=49"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return small_weights(tmp_path_factory.mktemp("weights"))


def run_eval(*arguments: object) -> int:
    return cli.main(["eval", *map(str, arguments)])


def test_table_and_json_are_what_evaluate_gives(weights, capsys):
    arguments = ["--weights", weights, "--data", DATA, "--trimap", 3]
    assert run_eval(*arguments) == 0
    table = capsys.readouterr().out
    assert run_eval(*arguments, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    model, _ = build_from_file(weights)
    expected = evaluate(model, open_dataset(DATA, "val"), 7, Inference(), trimap_widths=(1, 2, 3))
    network = results["stages"]["network"]
    assert network["confusion"] == expected.matrix.counts.tolist()
    assert network["mean_iou"] == expected.matrix.mean_iou()
    assert network["trimap"] == {"widths": [1, 2, 3], "mean_iou": expected.trimap.mean_iou()}
    assert list(network["iou"]) == list(CLASS_NAMES)
    assert f"{100 * expected.matrix.mean_iou():.2f}" in table
    assert f"{100 * expected.trimap.mean_iou()[2]:.2f}" in table
    for name in CLASS_NAMES:
        assert name in table
    assert "3 images of generated" in table


def test_options_reach_the_prediction(weights, capsys):
    options = ["--scales", "0.75,1", "--flip", "--output-stride", 8, "--window", 40, "--batch", 2, "--limit", 2]
    crf = ["--crf", "--crf-iterations", 2, "--crf-appearance-weight", 4]
    assert run_eval("--weights", weights, "--data", DATA, "--json", *options, *crf) == 0
    results = json.loads(capsys.readouterr().out)
    settings = CRFParameters(iterations=2, appearance_weight=4)
    inference = Inference((0.75, 1), True, 40, output_stride=8, crf=settings, batch_size=2)
    model, _ = build_from_file(weights)
    dataset = open_dataset(DATA, "val")
    expected = evaluate(model, [dataset[0], dataset[1]], 7, inference)
    assert results["images"] == 2
    assert list(results["stages"]) == ["network", "crf"]
    for name, stage in expected.stages().items():
        assert results["stages"][name]["confusion"] == stage.matrix.counts.tolist()
    assert results["inference"]["crf"]["iterations"] == 2


def test_multi_scale_is_the_papers(weights, capsys):
    assert run_eval("--weights", weights, "--data", "generated:length=1,size=33", "--scales", "ms", "--json") == 0
    assert json.loads(capsys.readouterr().out)["inference"]["scales"] == list(PAPER_SCALES)


def test_output_folder(weights, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["--weights", weights, "--data", DATA, "-o", out, "--worst", 2, "--save-predictions", "--crf"]
    assert run_eval(*arguments) == 0
    table = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert (out / "results.txt").read_text() == table
    assert [item["mean_iou"] for item in results["worst"]] == sorted(item["mean_iou"] for item in results["worst"])
    assert len(results["worst"]) == 2
    for item in results["worst"]:
        assert Image.open(out / item["picture"]).height == 49
    if importlib.util.find_spec("matplotlib"):
        for name in ("iou.png", "confusion.png", "trimap.png"):
            assert min(Image.open(out / name).size) > 200
    confusion = np.zeros((7, 7), int)
    for index in range(3):
        saved = Image.open(out / "predictions" / f"{index}.png")
        assert saved.mode == "P"
        assert np.array_equal(np.asarray(saved.convert("RGB")), np.array(PALETTE, np.uint8)[np.asarray(saved)])
        np.add.at(confusion, (open_dataset(DATA, "val")[index].labels, np.asarray(saved)), 1)
    assert results["stages"]["crf"]["confusion"] == confusion.tolist()


def test_predictions_on_voc_have_the_form_of_a_submission(weights, tmp_path, capsys):
    write_generated_dataset(tmp_path / "VOC2012", train=1, val=2, size=49)
    assert run_eval("--weights", weights, "--data", tmp_path, "-o", tmp_path / "out", "--save-predictions") == 0
    names = open_dataset(tmp_path, "val").names
    folder = tmp_path / "out" / "results" / "VOC2012" / "Segmentation" / "comp6_val_cls"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in names)
    assert all(np.asarray(Image.open(path)).max() < 7 for path in folder.iterdir())


def test_without_matplotlib_the_figures_are_kept(weights, tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["--weights", weights, "--data", "generated:length=1,size=33", "-o", tmp_path]
    assert run_eval(*arguments) == 0
    assert "pip install 'deeplab_kernels[eval]'" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists()
    assert not (tmp_path / "iou.png").exists()
    with pytest.raises(ImportError, match="plots need matplotlib"):
        plots.plot_iou(tmp_path / "iou.png", {}, ["a"])


def test_errors_are_one_line_with_exit_code_2(weights, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    write_generated_dataset(tmp_path / "voc", train=1, val=2, size=49)
    (tmp_path / "voc" / "classes.txt").write_text("a\nb\n")
    good = ["--weights", weights, "--data", "generated:length=1,size=33"]
    cases = [
        (["--weights", weights, "--data", "nowhere"], "nowhere"),
        (["--weights", tmp_path / "none.pt", "--data", DATA], "none.pt: No such file"),
        (["--weights", tmp_path / "file", "--data", DATA], "not a weights file"),
        (["--weights", "torchvision/deeplabv3_resnet5", "--data", DATA], "torchvision/deeplabv3_resnet5"),
        (["--weights", weights, "--model", "deeplabv3plus_xception9", "--data", DATA], "must be the name of a model"),
        (["--weights", weights, "--data", tmp_path / "voc"], "has 7 classes, but"),
        ([*good, "--split", "test"], "split"),
        ([*good, "--scales", "0,1"], "--scales must be 'ms' or numbers"),
        ([*good, "--scales", "big"], "--scales must be 'ms' or numbers"),
        ([*good, "--window", "0"], "--window must be at least 1"),
        ([*good, "--batch", "0"], "--batch must be at least 1"),
        ([*good, "--limit", "0"], "--limit must be at least 1"),
        ([*good, "--trimap", "-1"], "--trimap must be at least 0"),
        ([*good, "--output-stride", "5"], "output_stride"),
        ([*good, "--crf-iterations", "5"], "--crf-iterations needs --crf"),
        ([*good, "--save-predictions"], "--save-predictions needs --output"),
        ([*good, "-o", tmp_path / "file"], "not a folder"),
        ([*good, "-o", tmp_path / "file" / "below"], "not a folder"),
        ([*good, "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got"),
    ]
    check_refusals(run_eval, cases, capsys)


def test_a_damaged_image_of_the_dataset_is_named(weights, tmp_path, capsys):
    write_generated_dataset(tmp_path / "voc", train=1, val=2, size=49)
    path = next((tmp_path / "voc").rglob(f"JPEGImages/{open_dataset(tmp_path / 'voc', 'val').names[1]}.jpg"))
    path.write_bytes(path.read_bytes()[:300])
    assert run_eval("--weights", weights, "--data", tmp_path / "voc") == 2
    assert str(path) in capsys.readouterr().err


def test_other_class_names_are_noted(weights, tmp_path, capsys):
    write_generated_dataset(tmp_path, train=1, val=1, size=49)
    (path,) = tmp_path.rglob("classes.txt")
    path.write_text(path.read_text().replace("ring", "tyre"))
    assert run_eval("--weights", weights, "--data", tmp_path) == 0
    assert "the weights call a class 'ring' that the dataset calls 'tyre'" in capsys.readouterr().err


def test_worst_images():
    worst = WorstImages(2, 2)
    image, labels = np.zeros((2, 2, 3), np.uint8), np.array([[0, 0], [1, 1]], np.uint8)
    for index, prediction in enumerate(([[0, 0], [1, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 1]], [[1, 1], [1, 1]])):
        worst.add(index, Scene(image, labels), np.array(prediction, np.uint8))
    worst.add(4, Scene(image, np.full_like(labels, IGNORE)), labels)  # nothing to be counted
    assert [(item.position, item.mean_iou) for item in worst.worst_first()] == [(1, 0.0), (3, 0.25)]
    nobody = WorstImages(0, 2)
    nobody.add(0, Scene(image, labels), labels)
    assert nobody.worst_first() == []


def test_boundary_picture_marks_errors_by_their_place():
    import io

    labels = np.zeros((20, 40), np.uint8)
    labels[:, 20:], labels[0] = 1, IGNORE
    prediction = labels.copy()
    prediction[0], prediction[10, 18], prediction[15, 2] = 0, 1, 1
    palette = [(1, 2, 3), (200, 100, 50)]
    scene = Scene(np.full((20, 40, 3), 90, np.uint8), labels)
    picture = np.asarray(Image.open(io.BytesIO(boundary_picture(scene, prediction, palette, width=5))).convert("RGB"))
    panels = [picture[:, left : left + 40] for left in range(0, picture.shape[1], 46)]
    assert len(panels) == 4
    assert np.array_equal(panels[0], scene.image)
    assert panels[1][1, 0].tolist() == [1, 2, 3]
    assert panels[1][0, 0].tolist() == [224, 224, 192]
    assert panels[2][10, 18].tolist() == [200, 100, 50]
    assert panels[3][10, 18].tolist() == [220, 30, 30]
    assert panels[3][15, 2].tolist() == [255, 170, 0]
    assert panels[3][10, 17].tolist() < panels[3][10, 2].tolist()  # the band of the boundary is darker


def test_importing_the_evaluation_does_not_import_matplotlib():
    code = "import deeplab_kernels.models.evaluation.plots, deeplab_kernels.models.segmenter"
    check_not_imported(code, ("matplotlib", "av", "kornia", "torchmetrics"))


# Documentation

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"


def test_documentation_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})
    assert "40: " in capsys.readouterr().out


def test_documentation_names_every_option():
    text = PAGE.read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    eval_command.add_arguments(parser)
    options = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
    assert len(options) > 20
    assert [name for name in options if not name.startswith("--crf-") and name not in text] == []
