"""PSPNet: against segmentation_models_pytorch, and its pyramid pooling by hand."""

from __future__ import annotations

import pytest
import torch
from _models import copy_parameters, randomise, relative_error
from _peers import peer
from _systems import check_any_size, check_compile, check_output_stride, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.heads import PyramidPooling


def small(**options: object) -> nn.Module:
    return models.build("pspnet_small", 3, **options)


def test_any_size_strides_training_and_compilation() -> None:
    check_any_size(small())
    check_training(small(), 0.05)
    check_compile(small(), (17, 21))
    check_output_stride(small())


def test_the_papers_network() -> None:
    model = models.build("pspnet_resnet50", device="meta")
    assert model.output_stride == 8
    assert model.pyramid_pooling.bins == (1, 2, 3, 6)
    assert [b.conv.weight.shape[:2] for b in model.pyramid_pooling.branches] == [(512, 2048)] * 4
    assert model.project.conv.weight.shape == (512, 4096, 3, 3)
    assert model.classifier.weight.shape == (21, 512, 1, 1)
    assert model.eval()(torch.empty(1, 3, 473, 473, device="meta")).shape == (1, 21, 473, 473)


@pytest.mark.parametrize("global_norm", [True, False])
def test_pyramid_pooling_by_hand(global_norm: bool) -> None:
    module = randomise(PyramidPooling(12, (1, 3), normalize_global=global_norm)).double().eval()
    x = torch.randn(2, 12, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        whole = module.branches[0](x.mean((2, 3), keepdim=True)).expand(-1, -1, 9, 6)
        cells = x.view(2, 12, 3, 3, 3, 2).mean((3, 5))
        cells = F.interpolate(module.branches[1](cells), (9, 6), mode="bilinear", align_corners=True)
        expected = torch.cat([whole, cells, x], 1)
        assert relative_error(module(x), expected) < 1e-12
    assert module.out_channels == 24


@pytest.mark.parametrize("depth", [3, 5])
def test_equals_segmentation_models_pytorchs(depth: int) -> None:
    smp = peer("segmentation_models_pytorch")
    stride = 2**depth
    theirs = smp.PSPNet("resnet50", encoder_weights=None, encoder_depth=depth, classes=5, upsampling=stride)
    theirs = randomise(theirs).eval()
    ours = models.build("pspnet_resnet50", 5, variant="smp", feature_stride=stride).eval()
    ours.backbone.load_state_dict(theirs.encoder.state_dict(), strict=depth == 5)
    copy_parameters(theirs.decoder.psp, ours.pyramid_pooling)
    copy_parameters(theirs.decoder.conv, ours.project)
    copy_parameters(theirs.segmentation_head, ours.classifier)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-4
    assert ours.output_stride == stride


@pytest.mark.parametrize("feature_stride", [8, 16, 32])
def test_auxiliary_head(feature_stride: int) -> None:
    model = randomise(small(auxiliary=True, feature_stride=feature_stride)).eval()
    x = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        expected = model(x)
        model.training = True  # of the model alone: normalisations stay as they are
        logits, auxiliary = model(x)
        assert torch.equal(logits, expected)
        middle = model.backbone.pyramid(x, (16,))[0]
        scores = F.interpolate(model.aux_classifier(middle), (33, 49), mode="bilinear", align_corners=True)
        assert torch.equal(auxiliary, scores)


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"feature_stride": 64}, "feature_stride must be one of 2, 4, 8, 16, 32, got 64"),
        ({"kernel_size": 2}, "kernel_size must be 1 or 3, got 2"),
        ({"classifier_kernel_size": 5}, "classifier_kernel_size must be 1 or 3, got 5"),
        ({"bins": ()}, r"bins must be positive ints, got \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            models.build("pspnet_small", device="meta", **options)
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1: the pooling to one value"):
        small()(torch.randn(1, 3, 33, 33))
    small(normalize_global=False)(torch.randn(1, 3, 33, 33))
