"""MobileNetV2 against torchvision, timm and segmentation_models_pytorch; output strides and TensorFlow's padding."""

from __future__ import annotations

import pytest
import torch
from _backbones import backward_of_equals, check_dense_features
from _models import assert_same_gradients, copy_parameters, randomise, relative_error
from _peers import peer
from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.models.backbones import MobileNetV2
from deeplab_kernels.models.backbones.mobilenetv2 import divisible
from deeplab_kernels.nn import AtrousSeparableConv2d

EPS = {"eps": 1e-5}  # of the ports; the official code has 1e-3


def without_classifier(model: nn.Module) -> nn.Module:
    model.classifier = nn.Identity()
    return randomise(model).eval()


@pytest.mark.parametrize("width", [1.0, 0.35, 1.4])
def test_features_equal_torchvisions(width: float) -> None:
    torchvision = peer("torchvision")
    theirs = without_classifier(torchvision.models.mobilenet_v2(width_mult=width)).double()
    ours = MobileNetV2(width_multiplier=width, last_convolution=True, output_stride=32, **EPS).double().eval()
    copy_parameters(theirs, ours)
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        low_level, output = ours(x)
        assert relative_error(output, theirs.features(x)) < 1e-11
        assert relative_error(low_level, theirs.features[:4](x)) < 1e-11
    assert (output.shape[1], low_level.shape[1]) == (ours.out_channels, ours.low_level_channels)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_equal_timms(output_stride: int) -> None:
    theirs = without_classifier(peer("timm").create_model("mobilenetv2_100", output_stride=output_stride)).double()
    ours = MobileNetV2(last_convolution=True, output_stride=output_stride, **EPS).double().eval()
    # The same parameters in another order: the last convolution stands behind the blocks in both.
    copy_parameters(theirs.conv_stem, ours.stem.conv)
    copy_parameters(theirs.bn1, ours.stem.norm)
    copy_parameters(theirs.blocks, ours.blocks)
    copy_parameters(theirs.conv_head, ours.last.conv)
    copy_parameters(theirs.bn2, ours.last.norm)
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        _, expected = theirs.forward_intermediates(x)
        pyramid = ours.pyramid(x)
        for feature, their_feature in zip(pyramid[:4], expected, strict=False):
            assert relative_error(feature, their_feature) < 1e-11
        assert relative_error(pyramid[4], theirs.forward_features(x)) < 1e-11


@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_equal_segmentation_models_pytorchs(output_stride: int) -> None:
    smp = peer("segmentation_models_pytorch")
    theirs = smp.encoders.get_encoder("mobilenet_v2", weights=None, output_stride=output_stride)
    theirs = randomise(theirs).double().eval()
    ours = (
        MobileNetV2(last_convolution=True, output_stride=output_stride, dilate_strided_unit=True, **EPS).double().eval()
    )
    copy_parameters(theirs, ours)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for feature, expected in zip(ours.pyramid(x), theirs(x)[1:], strict=True):
            assert relative_error(feature, expected) < 1e-11


def test_training_step_equals_torchvisions() -> None:
    torchvision = peer("torchvision")
    theirs = without_classifier(torchvision.models.mobilenet_v2(width_mult=0.35)).double().train()
    ours = (
        MobileNetV2(width_multiplier=0.35, last_convolution=True, output_stride=32, eps=1e-5, momentum=0.1)
        .double()
        .train()
    )
    copy_parameters(theirs, ours)
    x = torch.randn(3, 3, 97, 65, dtype=torch.float64)
    expected, output = theirs.features(x), ours(x).output
    backward_of_equals(output, expected)
    assert_same_gradients(ours, theirs, 1e-9)
    for ours_buffer, buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(ours_buffer, buffer, rtol=1e-11)


def test_atrous_convolution_computes_the_strided_network_densely() -> None:
    check_dense_features(MobileNetV2(width_multiplier=0.35))


def same_padding(size: int, stride: int, kernel: int = 3) -> tuple[int, int]:
    """(before, after) of TensorFlow's SAME."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("size", [(64, 50), (65, 49), (33, 36), (1, 2)])
def test_tensorflows_padding(size: tuple[int, int]) -> None:
    model = randomise(MobileNetV2(width_multiplier=0.35, tf_padding=True, output_stride=32)).double().eval()
    x = torch.randn(1, 3, *size, dtype=torch.float64)

    def convolve(y: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
        (top, bottom), (left, right) = (same_padding(n, stride) for n in y.shape[2:])
        return F.conv2d(F.pad(y, (left, right, top, bottom)), conv.weight, None, stride, groups=conv.groups)

    with torch.no_grad():
        y = F.relu6(model.stem.norm(convolve(x, model.stem.conv, 2)))
        for block in model.blocks:
            separable, shortcut = block.separable, y
            y = y if block.expand is None else block.expand(y)
            y = F.relu6(separable.depthwise_norm(convolve(y, separable.depthwise, block.natural_stride)))
            y = separable.pointwise_norm(separable.pointwise(y))
            y = y + shortcut if block.has_shortcut else y
        assert relative_error(model(x).output, y) < 1e-12


def test_tensorflows_padding_is_the_fixed_one_at_aligned_sizes() -> None:
    fixed, tensorflow = (MobileNetV2(width_multiplier=0.35, tf_padding=tf).eval() for tf in (False, True))
    copy_parameters(randomise(fixed), tensorflow)
    x = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        assert relative_error(tensorflow(x).output, fixed(x).output) < 1e-6
        assert not torch.allclose(tensorflow(x[:, :, 1:]).output, fixed(x[:, :, 1:]).output)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33)])
def test_any_size(size: tuple[int, int]) -> None:
    model = randomise(MobileNetV2(width_multiplier=0.35, output_stride=8)).eval()
    with torch.no_grad():
        pyramid = model.pyramid(torch.randn(2, 3, *size))
    expected = [(2, c, *(-(-n // min(s, 8)) for n in size)) for s, c in model.channels.items()]
    assert [tuple(f.shape) for f in pyramid] == expected


def test_structure_of_the_paper() -> None:
    with torch.device("meta"):
        model = MobileNetV2()
        wide = MobileNetV2(last_convolution=True)
    assert model.channels == {2: 16, 4: 24, 8: 32, 16: 96, 32: 320}
    assert wide.channels[32] == 1280
    blocks = list(model.blocks)
    assert len(blocks) == 17
    assert sum(block.has_shortcut for block in blocks) == 10
    assert blocks[0].expand is None
    assert blocks[1].separable.in_channels == 6 * 16
    for block in blocks:
        assert isinstance(block.separable, AtrousSeparableConv2d)
        assert block.separable.depthwise_activation == "relu6"
        assert block.separable.pointwise_activation is None
    model.set_output_stride(8)
    rates = [block.separable.dilation[0] for block in blocks]
    assert rates == [1] * 7 + [2] * 7 + [4] * 3
    assert {(n.eps, n.momentum) for n in model.modules() if isinstance(n, nn.BatchNorm2d)} == {(1e-3, 3e-3)}


@pytest.mark.parametrize(("channels", "expected"), [(5.6, 8), (11.2, 16), (33.6, 32), (44.8, 48), (1792.0, 1792)])
def test_channels_are_rounded_to_multiples_of_eight(channels: float, expected: int) -> None:
    assert divisible(channels) == expected


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="width_multiplier must be positive, got 0"):
        MobileNetV2(width_multiplier=0)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        MobileNetV2(output_stride=4)
