"""segmentation_models_pytorch's networks: outputs with random weights."""

from __future__ import annotations

import pytest
from _peers import peer
from _weights import assert_same_function, random_twin

from deeplab_kernels.models import build, load_weights
from deeplab_kernels.models.pspnet import SMP_OPTIONS
from deeplab_kernels.models.system import IMAGENET

ENCODERS = {"resnet50": "resnet50", "resnet101": "resnet101", "mobilenetv2": "mobilenet_v2"}


@pytest.mark.parametrize(
    ("system", "encoder", "output_stride"),
    [
        ("DeepLabV3", "resnet50", 8),
        ("DeepLabV3", "resnet101", 16),
        ("DeepLabV3", "mobilenetv2", 16),
        ("DeepLabV3Plus", "resnet50", 16),
        ("DeepLabV3Plus", "resnet101", 8),
        ("DeepLabV3Plus", "mobilenetv2", 8),
        ("DeepLabV3Plus", "mobilenetv2", 16),
    ],
)
def test_deeplab(system: str, encoder: str, output_stride: int) -> None:
    smp = peer("segmentation_models_pytorch")
    name = {"DeepLabV3": "deeplabv3", "DeepLabV3Plus": "deeplabv3plus"}[system]
    # Theirs has the same rates at every output stride, ours doubles those of 16 at 8.
    rates = (6, 12, 18)
    theirs, ours = random_twin(
        lambda: getattr(smp, system)(
            ENCODERS[encoder],
            encoder_weights=None,
            encoder_output_stride=output_stride,
            decoder_atrous_rates=[r * 16 // output_stride for r in rates],
            classes=5,
        ),
        lambda: build(f"{name}_{encoder}", 5, output_stride, variant="smp", atrous_rates=rates),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.origin, report.network, report.missing, report.surplus) == ("smp", system, [], [])
    assert report.differences == []
    assert ours.normalization == IMAGENET
    assert_same_function(ours, theirs, (64, 96))  # theirs takes multiples of the stride alone


@pytest.mark.parametrize("depth", [3, 5])
def test_pspnet(depth: int) -> None:
    smp = peer("segmentation_models_pytorch")
    stride = {"feature_stride": 2**depth, "output_stride": 2**depth}
    theirs, ours = random_twin(
        lambda: smp.PSPNet("resnet50", encoder_weights=None, encoder_depth=depth, upsampling=2**depth, classes=5),
        lambda: build("pspnet_resnet50", 5, **{**SMP_OPTIONS, **stride}),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.network, report.missing, report.surplus) == ("PSPNet", [], [])
    assert_same_function(ours, theirs, (64, 96))


def test_torchvision_s_variant_is_told_from_theirs() -> None:
    smp = peer("segmentation_models_pytorch")
    theirs, ours = random_twin(
        lambda: smp.DeepLabV3("resnet50", encoder_weights=None, classes=5),
        lambda: build("deeplabv3_resnet50", 5, 8, variant="torchvision"),
    )
    with pytest.warns(UserWarning, match="does not compute what smp's does"):
        report = load_weights(ours, theirs.state_dict())
    # The first unit of a stage that lost its stride has the stage's rate there.
    assert set(report.differences) >= {
        "align_corners: False, True",
        "dilation of backbone.layer4.0.conv2: (2, 2), (4, 4)",
    }


def test_unet() -> None:
    smp = peer("segmentation_models_pytorch")
    theirs, ours = random_twin(
        lambda: smp.Unet("resnet50", encoder_weights=None, classes=5), lambda: build("unet_resnet50", 5)
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.network, report.missing, report.surplus, report.ignored) == ("Unet", [], [], [])
    assert_same_function(ours, theirs, (64, 96))
