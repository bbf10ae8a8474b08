"""VGG-16 as a backbone: against torchvision, and its output strides."""

from __future__ import annotations

import copy

import pytest
import torch
from _models import randomise, relative_error
from _peers import peer
from torch import nn
from torch.nn import functional as F

from deeplab_kernels.models.backbones import VGG, vgg16, vgg16_bn, vgg_small
from deeplab_kernels.models.backbones.vgg import classifier_convolutions


@pytest.mark.parametrize("norm", [False, True])
def test_equals_torchvisions_features(norm: bool) -> None:
    peer("torchvision")
    from torchvision.models import vgg

    theirs = randomise(vgg.vgg16_bn().features if norm else vgg.vgg16().features).eval()
    ours = (vgg16_bn if norm else vgg16)(aligned=False, output_stride=32).eval()
    ours.features.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        low_level, output = ours(x)
        assert relative_error(output, theirs(x)) < 1e-5
        maps, y = [], x
        for layer in theirs:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(y)
            y = layer(y)
        for stride, ours_, theirs_ in zip(ours.channels, ours.pyramid(x), [*maps, y], strict=True):
            assert relative_error(ours_, theirs_) < 1e-5
            assert ours_.shape == (1, ours.channels[stride], 64 // stride, 96 // stride)
        assert torch.equal(low_level, ours.pyramid(x, (4,))[0])
    assert list(ours.channels) == [1, 2, 4, 8, 16, 32]
    assert (low_level.shape[1], output.shape[1]) == (ours.low_level_channels, ours.out_channels) == (256, 512)


def test_strides_and_rates_of_deeplab() -> None:
    with torch.device("meta"):
        backbone = vgg16()
    pools = [layer for layer in backbone.features if isinstance(layer, nn.MaxPool2d)]
    convs = [layer for layer in backbone.features if isinstance(layer, nn.Conv2d)]
    for output_stride, strides, rate in ((8, [2, 2, 2, 1, 1], 2), (16, [2, 2, 2, 2, 1], 1), (32, [2] * 5, 1)):
        backbone.set_output_stride(output_stride)
        assert [pool.stride for pool in pools] == strides
        assert {pool.kernel_size for pool in pools} == {3}
        assert [conv.dilation[0] for conv in convs] == [1] * 10 + [rate] * 3
        for size in (1, 2, 33, 64, 321):
            maps = backbone.pools(torch.empty(1, 3, size, size, device="meta"))
            expected = [-(-size // min(2**i, output_stride)) for i in range(1, 6)]
            assert [m.shape[2] for m in maps] == [m.shape[3] for m in maps] == expected


def test_dense_features_contain_the_sparse_ones() -> None:
    # Up to conv5: pool4 with stride 1 and conv5 with rate 2 give at every second position what they give with stride 2
    # and rate 1, away from the padding.
    sparse = vgg_small(output_stride=16).double().eval()
    dense = copy.deepcopy(sparse)
    dense.set_output_stride(8)
    x = torch.randn(1, 3, 257, 257, dtype=torch.float64)
    with torch.no_grad():
        few, many = sparse.features[:-1](x), dense.features[:-1](x)
    assert many.shape[2] == 2 * few.shape[2] - 1 == 33
    inside = slice(4, -4)
    assert torch.allclose(many[:, :, ::2, ::2][:, :, inside, inside], few[:, :, inside, inside], atol=1e-12)


def test_fully_connected_layers_become_convolutions() -> None:
    state = {
        "classifier.0.weight": torch.randn(4096, 2 * 49),  # of a VGG-16 with 2 channels
        "classifier.0.bias": torch.randn(4096),
        "classifier.3.weight": torch.randn(4096, 4096),
        "classifier.3.bias": torch.randn(4096),
    }
    x = torch.randn(3, 2, 7, 7)
    expected = F.linear(F.linear(x.flatten(1), *list(state.values())[:2]).relu(), *list(state.values())[2:])
    weights = classifier_convolutions(state)
    hidden = F.conv2d(x, weights["fc6.weight"], weights["fc6.bias"]).relu()
    actual = F.conv2d(hidden, weights["fc7.weight"], weights["fc7.bias"])
    assert relative_error(actual.flatten(1), expected) < 1e-5

    decimated = classifier_convolutions(state, 1024, 3)
    assert torch.equal(decimated["fc6.weight"], weights["fc6.weight"][::4, :, ::3, ::3])
    assert torch.equal(decimated["fc7.weight"], weights["fc7.weight"][::4, ::4])
    assert torch.equal(decimated["fc7.bias"], weights["fc7.bias"][::4])
    centre = classifier_convolutions(state, 1, 1)["fc6.weight"]
    assert torch.equal(centre, weights["fc6.weight"][:1, :, 3:4, 3:4])
    with pytest.raises(ValueError, match=r"there is no classifier\.0\.bias"):
        classifier_convolutions({k: v for k, v in state.items() if k != "classifier.0.bias"})
    with pytest.raises(ValueError, match="got 8192 and 7"):
        classifier_convolutions(state, 8192)


def test_initial_weights_keep_the_size_of_activations() -> None:
    backbone = VGG((32, 64, 64, 64, 64)).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        for layer in backbone.features:
            x = layer(x)
            assert not isinstance(layer, nn.Conv2d) or 0.3 < x.square().mean().sqrt() < 6
    assert all(not layer.bias.any() for layer in backbone.features if isinstance(layer, nn.Conv2d))


def test_bad_arguments_are_named() -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match="output_stride must be 32 with 2x2 poolings, got 8"):
            VGG(aligned=False, output_stride=8)
        with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
            VGG(output_stride=4)
        with pytest.raises(ValueError, match=r"widths must be 5 positive ints, got \(64, 128\)"):
            VGG((64, 128))
