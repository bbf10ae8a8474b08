"""Hypercolumns on VGG-16."""

from __future__ import annotations

import pytest
import torch
from _models import randomise, relative_error
from _systems import check_any_size, check_compile, check_output_stride, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models


def small(**options: object) -> nn.Module:
    return models.build("hypercolumn_small", 3, **options)


def test_any_size_strides_training_and_compilation() -> None:
    check_any_size(small())
    check_training(small())
    check_compile(small(), (17, 21))
    check_output_stride(small())


def test_is_the_classification_of_stacked_features() -> None:
    # The definition: every feature map resized, stacked and classified; the model reduces before it resizes.
    model = randomise(small()).double().eval()
    x = torch.randn(1, 3, 65, 33, dtype=torch.float64)
    with torch.no_grad():
        conv3, conv5, pool5 = model.backbone.pyramid(x, (4, 16, 32))
        maps = [conv3, conv5, model.fc(pool5)]
        assert [m.shape[2:] for m in maps] == [(17, 9), (5, 3), (5, 3)]
        resized = [F.interpolate(m, (17, 9), mode="bilinear", align_corners=True) for m in maps]
        column = torch.cat([reduce(m) for reduce, m in zip(model.head.reduce, resized, strict=True)], 1)
        scores = model.head.classifier(model.head.norm(column).relu())
        expected = F.interpolate(scores, (65, 33), mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12


def test_on_vgg16() -> None:
    model = models.build("hypercolumn_vgg16", device="meta")
    assert model.output_stride == 32
    assert model.fc.fc6.dilation == (3, 3)
    assert [r.in_channels for r in model.head.reduce] == [256, 512, 1024]
    model.set_output_stride(8)
    assert model.fc.fc6.dilation == (12, 12)
    assert model.eval()(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 321, 321)


@pytest.mark.parametrize("strides", [(16, 4), (4, 4), (3,), (4, 32), ()])
def test_bad_strides_are_named(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="strides must be"):
        models.build("hypercolumn_small", strides=strides, device="meta")
