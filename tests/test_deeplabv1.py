"""DeepLab v1, LargeFOV."""

from __future__ import annotations

import copy

import pytest
import torch
from _models import randomise, relative_error
from _systems import check_any_size, check_output_stride, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models


def small(name: str = "deeplabv1_small", **options: object) -> nn.Module:
    return randomise(models.build(name, 5, **options))


def test_the_papers_network() -> None:
    model = models.build("deeplabv1_vgg16", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 20_505_429  # 20.5 M in the paper's table 2
    fc6, fc7, fc8 = (model.head.branches[0].get_submodule(name) for name in ("fc6", "fc7", "fc8"))
    assert fc6.weight.shape == (1024, 512, 3, 3)
    assert fc6.dilation == fc6.padding == (12, 12)
    assert fc7.weight.shape == (1024, 1024, 1, 1)
    assert fc8.weight.shape == (21, 1024, 1, 1)
    assert model.output_stride == 8
    x = torch.empty(1, 3, 321, 321, device="meta")
    assert model.scores(x).shape == (1, 21, 41, 41)
    assert model.eval()(x).shape == (1, 21, 321, 321)


def test_forward_is_the_plain_composition() -> None:
    model = small().double().eval()
    x = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    branch = model.head.branches[0]
    with torch.no_grad():
        y = model.backbone.features(x)
        y = F.conv2d(y, branch.fc6.weight, branch.fc6.bias, padding=5, dilation=5)
        y = branch.fc7(branch.norm6(y).relu())
        y = branch.fc8(branch.norm7(y).relu())
        expected = F.interpolate(y, (65, 49), mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12


def test_average_pooling_of_the_released_network() -> None:
    for name in models.list_models():
        if name.startswith(("deeplabv1", "deeplabv2")):
            poolings = [m for m in models.build(name, device="meta").modules() if isinstance(m, nn.AvgPool2d)]
            assert len(poolings) == name.startswith("deeplabv1_vgg16"), name
    plain, pooled = small().eval(), small(average_pooling=True).eval()
    pooled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 65, 49)
    for output_stride in (8, 16, 32):
        for model in (plain, pooled):
            model.set_output_stride(output_stride)
        with torch.no_grad():
            *maps, before = plain.backbone.pyramid(x)
            *others, after = pooled.backbone.pyramid(x)
        # The mean of nine values, zeros beyond the border.
        expected = F.conv2d(before, torch.full((before.shape[1], 1, 3, 3), 1 / 9), padding=1, groups=before.shape[1])
        assert relative_error(after, expected) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain.backbone.pools(x), pooled.backbone.pools(x), strict=True))


def test_score_map_is_the_dense_sliding_evaluation() -> None:
    # fc6 with rate r is a 3x3 classifier that looks at every r-th feature, evaluated at every position: on each of the
    # r x r phases of the feature map it is an ordinary convolution.
    head = small().head.double().eval()
    (rate,) = head.rates
    features = torch.randn(1, 64, 3 * rate, 4 * rate, dtype=torch.float64)
    plain = copy.deepcopy(head)
    plain.set_rates([1])
    with torch.no_grad():
        scores = head(features)
        for i in range(rate):
            for j in range(rate):
                expected = plain(features[:, :, i::rate, j::rate])
                assert relative_error(scores[:, :, i::rate, j::rate], expected) < 1e-12


@pytest.mark.parametrize(("output_stride", "rate"), [(8, 12), (16, 6), (32, 3)])
def test_output_stride(output_stride: int, rate: int) -> None:
    model = models.build("deeplabv1_vgg16", output_stride=output_stride, device="meta")
    assert model.output_stride == model.backbone.output_stride == output_stride
    assert model.head.rates == (rate,)
    assert model.scores(torch.empty(1, 3, 321, 321, device="meta")).shape[2] == 320 // output_stride + 1


def test_any_size_strides_and_training() -> None:
    check_any_size(small())
    check_training(models.build("deeplabv1_small", 3))
    check_output_stride(small())


def test_on_resnet101() -> None:
    model = models.build("deeplabv1_resnet101", device="meta")
    (branch,) = model.head.branches
    assert branch.weight.shape == (21, 2048, 3, 3)  # no fc6 and fc7 on residual networks
    assert branch.dilation == branch.padding == (12, 12)
    unit = model.backbone.layer4[0]
    assert (unit.conv1.stride, unit.conv2.dilation) == ((1, 1), (4, 4))
    model.set_output_stride(32)
    assert branch.dilation == (3, 3)
    assert (unit.conv1.stride, unit.conv2.stride) == ((2, 2), (1, 1))  # the Caffe models' place
    assert models.build("deeplabv1_resnet101", output_stride=32, variant="torchvision", device="meta").backbone.layer4[
        0
    ].conv2.stride == (2, 2)
    assert model.eval()(torch.empty(1, 3, 65, 33, device="meta")).shape == (1, 21, 65, 33)
