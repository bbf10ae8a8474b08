"""torchvision's networks: outputs with random weights."""

from __future__ import annotations

import pytest
import torch
from _models import relative_error
from _peers import peer
from _weights import assert_same_function, random_twin

from deeplab_kernels.models import build, load_weights
from deeplab_kernels.models.system import IMAGENET


@pytest.mark.parametrize("output_stride", [8, 16])
def test_resnet_backbone(output_stride: int) -> None:
    torchvision = peer("torchvision")
    atrous = [False, output_stride == 8, True]
    theirs, ours = random_twin(
        lambda: torchvision.models.resnet50(replace_stride_with_dilation=atrous),
        lambda: build("fcn_resnet50", 3, output_stride),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.origin, report.ignored, report.surplus) == ("torchvision", ["fc.weight", "fc.bias"], [])
    assert all(name.startswith("classifier.") for name in report.missing)
    assert ours.normalization == IMAGENET
    x = torch.randn(1, 3, 65, 97)
    features = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        assert relative_error(ours.backbone(x).output, features(x)) < 1e-4


@pytest.mark.parametrize(("name", "auxiliary"), [("deeplabv3_resnet50", True), ("deeplabv3_resnet101", False)])
def test_deeplabv3(name: str, auxiliary: bool) -> None:
    torchvision = peer("torchvision")
    theirs, ours = random_twin(
        lambda: getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        ),
        lambda: build(name, 5, variant="torchvision", auxiliary=auxiliary),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.network, report.missing, report.surplus) == ("DeepLab v3 with a ResNet", [], [])
    assert bool(report.ignored) != auxiliary
    assert all(name.startswith("aux_classifier.") for name in report.ignored)
    assert report.differences == []
    assert ours.output_stride == 8  # the only one of torchvision's
    assert_same_function(ours, theirs, (65, 97))


def test_mobilenetv2_backbone() -> None:
    torchvision = peer("torchvision")
    theirs, ours = random_twin(torchvision.models.mobilenet_v2, lambda: build("deeplabv3plus_mobilenetv2", 3, 32))
    report = load_weights(ours, theirs.state_dict())
    assert report.surplus == []
    assert all(name.startswith(("features.18.", "classifier.")) for name in report.ignored)
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert relative_error(ours.backbone(x).output, theirs.features[:18](x)) < 1e-4


@pytest.mark.parametrize("auxiliary", [False, True])
def test_fcn(auxiliary: bool) -> None:
    torchvision = peer("torchvision")
    theirs, ours = random_twin(
        lambda: torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        ),
        lambda: build("fcn_resnet50", 5, 8, auxiliary=auxiliary),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.missing, report.surplus) == ([], [])
    assert bool(report.ignored) != auxiliary
    assert all(name.startswith("aux_classifier.") for name in report.ignored)
    assert report.differences == []
    assert_same_function(ours, theirs, (65, 97))


def test_vgg_and_its_classifier() -> None:
    torchvision = peer("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.vgg16()
    theirs.classifier[6] = torch.nn.Identity()
    theirs = theirs.to_empty(device="cpu").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 0.1)
    ours = build("fcn32s_vgg16", 3, 32, device="meta").to_empty(device="cpu").eval()
    report = load_weights(ours, theirs.state_dict())
    assert report.renamed["head.fc6.weight"] == "classifier.0.weight"
    assert report.ignored == []
    assert set(report.missing) == {"head.fc8.weight", "head.fc8.bias"}
    x = torch.randn(1, 3, 224, 224)  # 7 x 7 features: the only size whose middle pixel sees all of fc6
    with torch.no_grad():
        expected = theirs(x)
        branch = ours.head
        features = ours.backbone.features(x)
        actual = branch.fc7(branch.fc6(features).relu()).relu()[:, :, 3, 3]
    assert relative_error(actual, expected) < 1e-4
