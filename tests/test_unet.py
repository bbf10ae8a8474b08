"""U-Net of 2015, and segmentation_models_pytorch's on ResNet-50."""

from __future__ import annotations

import pytest
import torch
from _models import copy_parameters, randomise, relative_error
from _peers import peer
from _systems import check_any_size, check_compile, check_output_stride, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.upsampling import MODES


def small(**options: object) -> nn.Module:
    return models.build("unet_small", 3, **options)


@pytest.mark.parametrize("up", MODES)
def test_any_size_with_every_upsampling(up: str) -> None:
    check_any_size(small(up=up), [(1, 1), (1, 7), (33, 18)])


def test_training_and_output_stride() -> None:
    check_training(small())
    check_compile(small(up="max_unpooling", widths=(8, 12, 16)), (17, 21))
    check_output_stride(small(), (16,))
    with pytest.raises(ValueError, match="output_stride must be 16, the only one of U-Net, got 8"):
        models.build("unet", output_stride=8, device="meta")
    with pytest.raises(ValueError, match="mode must be one of"):
        models.build("unet", up="zoom", device="meta")


def test_the_papers_network() -> None:
    model = models.build("unet", 2, device="meta")
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convs) == 23  # "In total the network has 23 convolutional layers"
    assert [m.weight.shape[1] for m in model.decoder.modules() if isinstance(m, nn.Conv2d)] == [
        1024, 512, 512, 256, 256, 128, 128, 64,
    ]  # fmt: skip
    assert all(up.conv.kernel_size == up.conv.stride == (2, 2) for up in model.up)
    assert model.output_stride == 16


def test_forward_is_the_plain_composition() -> None:
    model = randomise(small(norm=False, widths=(4, 6, 8))).double().eval()
    x = torch.randn(1, 3, 21, 14, dtype=torch.float64)
    with torch.no_grad():
        first = model.encoder[0](x)
        second = model.encoder[1](F.max_pool2d(F.pad(first, (0, 0, 0, 1), value=-1e9), 2))
        third = model.encoder[2](F.max_pool2d(F.pad(second, (0, 1, 0, 1), value=-1e9), 2))
        y = model.decoder[0](torch.cat([second, model.up[0].conv(third)[:, :, :11, :7]], 1))
        y = model.decoder[1](torch.cat([first, model.up[1].conv(y)[:, :, :21]], 1))
        assert relative_error(model(x), model.classifier(y)) < 1e-12


def test_equals_segmentation_models_pytorchs_on_resnet50() -> None:
    smp = peer("segmentation_models_pytorch")
    theirs = randomise(smp.Unet("resnet50", encoder_weights=None, classes=5)).eval()
    ours = models.build("unet_resnet50", 5).eval()
    ours.backbone.load_state_dict(theirs.encoder.state_dict())
    copy_parameters(theirs.decoder, ours.decoder)
    copy_parameters(theirs.segmentation_head, ours.classifier)
    x = torch.randn(1, 3, 64, 96)  # theirs takes multiples of 32 only
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-4


def test_on_a_backbone() -> None:
    from deeplab_kernels.models.backbones import resnet_small
    from deeplab_kernels.models.unet import BackboneUNet

    def build(**options: object) -> nn.Module:
        return BackboneUNet(resnet_small(output_stride=32), 3, widths=(32, 24, 16, 16, 8), **options)

    check_any_size(build())
    check_output_stride(build())
    check_training(build(up="bilinear"), 0.05)
    with pytest.raises(ValueError, match="up must be 'nearest' or 'bilinear', got 'transposed'"):
        build(up="transposed")
