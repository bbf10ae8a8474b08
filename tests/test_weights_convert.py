"""The convert command, and the models that it finds for weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _peers import peer
from torch import nn

from deeplab_kernels import cli
from deeplab_kernels.models import build, list_models
from deeplab_kernels.models.segmenter import Segmenter
from deeplab_kernels.models.system import IMAGENET, SYMMETRIC
from deeplab_kernels.models.weights import build_from_file, read_weights_file
from deeplab_kernels.models.weights.adopt import _suggestion
from deeplab_kernels.models.weights.load import LAYOUTS
from deeplab_kernels.models.weights.sources import Loaded

NAME = "deeplabv3plus_small"


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def own(tmp_path) -> str:
    torch.save(build(NAME, 3).state_dict(), tmp_path / "own.pth")
    return str(tmp_path / "own.pth")


def test_a_library_s_network_becomes_a_segmenter(tmp_path, capsys) -> None:
    transformers = peer("transformers")
    theirs = transformers.MobileNetV2ForSemanticSegmentation(transformers.MobileNetV2Config(num_labels=21)).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    output = tmp_path / "w.pt"
    assert convert(tmp_path / "pytorch_model.bin", "-o", output, "--class-names", "voc", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["options"]) == ("deeplabv3_mobilenetv2", {"variant": "official"})
    assert (result["origin"], result["num_classes"], result["missing"]) == ("huggingface", 21, [])
    model, content = build_from_file(output)
    assert content["class_names"][15] == "person"
    assert content["notes"]["source"] == str(tmp_path / "pytorch_model.bin")
    assert (model.normalization, model.aspp.project.norm.eps) == (SYMMETRIC, 1e-5)
    assert torch.equal(model.classifier.bias, theirs.segmentation_head.classifier.convolution.bias)
    segmenter = Segmenter.from_file(output)
    image = np.random.default_rng(0).integers(0, 256, (65, 65, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = model.eval()(SYMMETRIC.apply(torch.from_numpy(image).permute(2, 0, 1)[None].float())).argmax(1)[0]
    assert np.array_equal(segmenter(image), expected.numpy())


def test_epsilons_and_normalization_survive(tmp_path, capsys) -> None:
    torchvision = peer("torchvision")
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "m.pth")
    assert convert(tmp_path / "m.pth", "-o", tmp_path / "w.pt", "--num-classes", 4) == 0
    printed = capsys.readouterr().out
    assert "deeplabv3plus_mobilenetv2, 4 classes" in printed
    assert "at random, to be trained: aspp, classifier, decoder" in printed
    model, content = build_from_file(tmp_path / "w.pt")
    assert content["class_names"] == ["class 0", "class 1", "class 2", "class 3"]
    assert model.normalization == IMAGENET
    assert {m.eps for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_own_weights(own, tmp_path, capsys) -> None:
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\nrest\n")
    output = tmp_path / "w.pt"
    options = ("--model", NAME, "--option", "output_stride=8", "--option", "atrous_rates=[3, 6, 9]")
    assert convert(own, "-o", output, *options, "--class-names", names) == 0
    content = read_weights_file(output)
    assert content["class_names"] == ["sky", "road", "rest"]
    assert content["options"] == {"output_stride": 8, "atrous_rates": (3, 6, 9)}
    # A weights file says itself what it is; its classes stay unless there are others.
    assert convert(output, "-o", tmp_path / "again.pt") == 0
    again = read_weights_file(tmp_path / "again.pt")
    for key in ("model", "options", "class_names", "palette", "norm_eps", "normalization"):
        assert again[key] == content[key]
    assert convert(output, "-o", tmp_path / "more.pt", "--class-names", "cityscapes", "--skip-classifier") == 0
    more = read_weights_file(tmp_path / "more.pt")
    assert more["class_names"][0] == "road"
    assert more["state_dict"]["classifier.bias"].shape == (19,)
    assert torch.equal(
        more["state_dict"]["decoder.reduce.norm.bias"], content["state_dict"]["decoder.reduce.norm.bias"]
    )
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "its names do not tell the model; give it (--model)"),
        (("--model", "deeplabv9"), "--model must be the name of a model"),
        (("--model", NAME, "--num-classes", 5), "the weights are for 3 classes, the model has 5"),
        (("--model", NAME, "--class-names", "voc"), "the weights are for 3 classes, the model has 21"),
        (("--model", NAME, "--class-names", "voc", "--num-classes", 5), "has 21 names, --num-classes is 5"),
        (("--model", NAME, "--class-names", "none.txt"), "classes are voc, cityscapes"),
        (("--model", NAME, "--num-classes", 0), "--num-classes must be at least 1"),
        (("--model", NAME, "--option", "wings"), "--option must be NAME=VALUE"),
        (("--model", NAME, "--option", "wings=2"), "has no option 'wings'"),
        (("--model", NAME, "-o", "no/such/folder/w.pt"), "--output must be a file in an existing folder"),
        (("--model", NAME, "--origin", "timm"), "no names of timm"),
        (("--model", NAME, "--sha256", "12345678"), "expected 12345678"),
    ],
)
def test_mistakes(arguments, message, own, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(own, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "weights.pt").exists()


def test_list(capsys) -> None:
    assert convert("--list") == 0
    assert "tf/xception65_cityscapes_trainfine" in capsys.readouterr().out
    assert convert("--list", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["torchvision/deeplabv3_resnet101"]["classes"] == "voc"
    assert convert() == 2
    assert "give a source" in capsys.readouterr().err


def test_every_suggested_model_can_be_built() -> None:
    # Names that a layout needs to recognise a network and tell its depth, whatever else it has.
    names = {
        "torchvision": ["layer3.5.conv1.weight", "backbone.layer3.22.conv1.weight"],
        "smp": ["encoder.layer3.5.conv1.weight", "encoder.layer1.0.conv1.weight"],
        "timm": ["layer3.22.conv1.weight", "blocks.20.stack.conv1.conv_dw.weight"],
    }
    for layout in LAYOUTS:
        state = {name: torch.zeros(64, 1024, 1, 1) for name in names.get(layout.origin, [])}
        state["decoder.conv.0.weight"] = torch.zeros(512, 1024, 1, 1)
        assert layout.model is not None
        name, options = layout.model(state)
        assert name in list_models(), layout
        build(name, 3, device="meta", **options)


def test_number_of_classes_is_that_of_the_weights() -> None:
    state = {
        "backbone.layer1.0.conv1.weight": torch.zeros(1),
        "classifier.0.weight": torch.zeros(1),
        "classifier.4.weight": torch.zeros(7, 512, 1, 1),
        "classifier.4.bias": torch.zeros(7),
        "backbone.layer3.5.conv1.weight": torch.zeros(1),
    }
    assert _suggestion(Loaded("w", state), None) == ("fcn_resnet50", {"output_stride": 8}, 7)
