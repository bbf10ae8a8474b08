"""transformers' MobileNetV2ForSemanticSegmentation: outputs with random weights."""

from __future__ import annotations

import pytest
import torch
from _models import relative_error
from _peers import peer
from _weights import random_twin

from deeplab_kernels.models import build, load_weights
from deeplab_kernels.models.layers import resize_bilinear
from deeplab_kernels.models.system import SYMMETRIC


@pytest.mark.parametrize(("output_stride", "size"), [(8, (65, 97)), (16, (65, 97)), (16, (80, 66))])
def test_deeplabv3(output_stride: int, size: tuple[int, int]) -> None:
    transformers = peer("transformers")
    # Of google/deeplabv3_mobilenet_v2_1.0_513 but for the number of classes.
    config = transformers.MobileNetV2Config(output_stride=output_stride, num_labels=5, finegrained_output=True)
    theirs, ours = random_twin(
        lambda: transformers.MobileNetV2ForSemanticSegmentation(config),
        lambda: build("deeplabv3_mobilenetv2", 5, output_stride, variant="official"),
    )
    report = load_weights(ours, theirs.state_dict())
    assert (report.origin, report.normalization, report.missing, report.surplus) == ("huggingface", SYMMETRIC, [], [])
    assert all(name.startswith("mobilenet_v2.conv_1x1.") for name in report.ignored)
    assert report.differences == []
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        # Theirs ends at the output stride.
        expected = resize_bilinear(theirs(x).logits, size)
        assert relative_error(ours(x), expected) < 1e-4


def test_another_padding_is_told() -> None:
    transformers = peer("transformers")
    state = transformers.MobileNetV2ForSemanticSegmentation(transformers.MobileNetV2Config(num_labels=5)).state_dict()
    model = build("deeplabv3_mobilenetv2", 5, variant="paper")
    with pytest.warns(UserWarning, match=r"does not compute what huggingface's does: .*'variant': 'official'"):
        report = load_weights(model, state)
    assert "tf_padding of backbone: False, True" in report.differences
