"""timm's networks as backbones: outputs with random weights."""

from __future__ import annotations

import pytest
import torch
from _models import relative_error
from _peers import peer
from _weights import random_twin

from deeplab_kernels.models import build, load_weights
from deeplab_kernels.models.system import SYMMETRIC


# timm drops the shortcut's convolution of Xception-71's fifth block when output stride 8 takes its stride away.
@pytest.mark.parametrize(
    ("name", "output_stride"), [("xception41", 16), ("xception65", 8), ("xception65", 16), ("xception71", 16)]
)
def test_xception(name: str, output_stride: int) -> None:
    timm = peer("timm")
    theirs, ours = random_twin(
        lambda: timm.create_model(name, output_stride=output_stride),
        lambda: build(f"deeplabv3plus_{name}", 5, output_stride, multi_grid=(1, 1, 1)),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.origin, report.normalization, report.surplus) == ("timm", SYMMETRIC, [])
    assert report.ignored == ["head.fc.weight", "head.fc.bias"]
    assert all(name.startswith(("aspp.", "decoder.", "classifier.")) for name in report.missing)
    assert report.renamed["backbone.blocks.1.convs.2.depthwise_norm.bias"] == "blocks.1.stack.conv3.bn_dw.bias"
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert relative_error(ours.backbone(x).output, theirs.forward_features(x)) < 1e-4


def test_resnet() -> None:
    timm = peer("timm")
    theirs, ours = random_twin(
        lambda: timm.create_model("resnet101", output_stride=16), lambda: build("fcn_resnet101", 3, 16)
    )
    report = load_weights(ours, theirs.state_dict(), origin="torchvision")
    assert (report.ignored, report.surplus) == (["fc.weight", "fc.bias"], [])
    x = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        assert relative_error(ours.backbone(x).output, theirs.forward_features(x)) < 1e-4


@pytest.mark.parametrize("output_stride", [8, 16])
def test_mobilenetv2(output_stride: int) -> None:
    timm = peer("timm")
    theirs, ours = random_twin(
        lambda: timm.create_model("mobilenetv2_100", output_stride=output_stride, features_only=False),
        lambda: build("deeplabv3plus_mobilenetv2", 3, output_stride, last_convolution=True),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.origin, report.surplus) == ("timm", [])
    assert report.ignored == ["classifier.weight", "classifier.bias"]
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert relative_error(ours.backbone(x).output, theirs.forward_features(x)) < 1e-4
