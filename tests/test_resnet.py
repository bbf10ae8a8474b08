"""ResNet against torchvision, timm and segmentation_models_pytorch, and the official arrangement's geometry."""

from __future__ import annotations

import pytest
import torch
from _backbones import backward_of_equals, check_dense_features
from _models import copy_parameters, randomise, relative_error
from _peers import peer
from torch import nn

from deeplab_kernels.models.backbones import ResNet, resnet18, resnet50, resnet101, resnet_small
from deeplab_kernels.models.backbones.resnet import BasicBlock, Bottleneck

TINY = {"units": (2, 2, 3, 3), "width": 4}
DILATION = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}


def adopt(theirs: nn.Module, ours: ResNet) -> tuple[nn.Module, ResNet]:
    """Random weights in both, in evaluation mode; the names are the same, a classifier is left out."""
    randomise(theirs)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_features_equal_torchvisions(output_stride: int) -> None:
    torchvision = peer("torchvision")
    from torchvision.models._utils import IntermediateLayerGetter

    full = torchvision.models.resnet50(replace_stride_with_dilation=DILATION[output_stride])
    theirs, ours = adopt(full, resnet50(output_stride=output_stride))
    names = ("relu", "layer1", "layer2", "layer3", "layer4")
    getter = IntermediateLayerGetter(theirs, {name: name for name in names})
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, pyramid = getter(x), ours.pyramid(x)
        low_level, output = ours(x)
    for feature, name, channels in zip(pyramid, names, ours.channels.values(), strict=True):
        assert feature.shape[1] == channels
        assert relative_error(feature, expected[name]) < 1e-5
    assert torch.equal(low_level, pyramid[1])
    assert torch.equal(output, pyramid[4])


@pytest.mark.parametrize(
    ("name", "builder", "options"),
    [
        ("resnet18", resnet18, {}),
        ("resnet50", resnet50, {}),
        ("resnet50s", resnet50, {"stem": "3x3"}),  # timm's name of the root of three 3x3 convolutions
    ],
)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_equal_timms(name: str, builder: type[ResNet], options: dict, output_stride: int) -> None:
    theirs = peer("timm").create_model(name, output_stride=output_stride)
    theirs, ours = adopt(theirs, builder(output_stride=output_stride, **options))
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = theirs.forward_intermediates(x)
        pyramid = ours.pyramid(x)
    for feature, their_feature in zip(pyramid, features, strict=True):
        assert relative_error(feature, their_feature) < 1e-5
    assert relative_error(ours(x).output, expected) < 1e-5


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("name", "builder"), [("resnet18", resnet18), ("resnet101", resnet101)])
def test_features_equal_segmentation_models_pytorchs(name: str, builder: type[ResNet], output_stride: int) -> None:
    smp = peer("segmentation_models_pytorch")
    theirs = smp.encoders.get_encoder(name, weights=None, output_stride=output_stride)
    theirs, ours = adopt(theirs, builder(output_stride=output_stride, dilate_strided_unit=True))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for feature, expected in zip(ours.pyramid(x), theirs(x)[1:], strict=True):
            assert relative_error(feature, expected) < 1e-5


def test_training_step_equals_torchvisions() -> None:
    peer("torchvision")
    from torchvision.models.resnet import Bottleneck as TheirBottleneck
    from torchvision.models.resnet import ResNet as TheirResNet

    theirs = TheirResNet(TheirBottleneck, [1, 2, 1, 2], replace_stride_with_dilation=DILATION[16]).double()
    ours = ResNet((1, 2, 1, 2), output_stride=16).double()
    theirs, ours = (model.train() for model in adopt(theirs, ours))
    theirs.avgpool = theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    expected, output = theirs(x), ours(x).output.flatten(1)
    backward_of_equals(output, expected)
    for name in ("conv1", "layer2.1.conv2", "layer4.0.downsample.0"):
        assert relative_error(ours.get_submodule(name).weight.grad, theirs.get_submodule(name).weight.grad) < 1e-10
    for name in ("bn1", "layer2.1.bn3", "layer4.0.downsample.1"):
        assert relative_error(ours.get_submodule(name).running_var, theirs.get_submodule(name).running_var) < 1e-12


@pytest.mark.parametrize("strided_unit", ["first", "last"])
@pytest.mark.parametrize("strided_conv", [1, 2])
@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_atrous_convolution_computes_the_strided_network_densely(
    strided_unit: str, strided_conv: int, stem: str
) -> None:
    check_dense_features(ResNet(**TINY, strided_unit=strided_unit, strided_conv=strided_conv, stem=stem))


def geometry(model: ResNet) -> list[list[tuple[int, int]]]:
    """Per stage, (stride, rate) of every unit's 3x3 convolution."""
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    return [[(u.conv2.stride[0], u.conv2.dilation[0]) for u in stage] for stage in stages]


ONE, TWO = (1, 1), (1, 2)
# The official code's stack_blocks_dense; block4's units multiply their unit_rate by the rate reached.
OFFICIAL_GEOMETRY = {
    32: [[ONE, ONE, (2, 1)], [ONE] * 3 + [(2, 1)], [ONE] * 5 + [(2, 1)], [ONE, (1, 2), (1, 4)]],
    16: [[ONE, ONE, (2, 1)], [ONE] * 3 + [(2, 1)], [ONE] * 6, [TWO, (1, 4), (1, 8)]],
    8: [[ONE, ONE, (2, 1)], [ONE] * 4, [TWO] * 6, [(1, 4), (1, 8), (1, 16)]],
}


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_strides_and_rates_of_the_official_code(output_stride: int) -> None:
    with torch.device("meta"):
        model = resnet50(stem="3x3", strided_unit="last", multi_grid=(1, 2, 4))
        model.set_output_stride(output_stride)
        assert geometry(model) == OFFICIAL_GEOMETRY[output_stride]
        conv3s = []
        model.layer1[1].bn3.register_forward_hook(lambda _m, _i, out: conv3s.append(out))
        low_level, output = model(torch.empty(1, 3, 129, 65))
    assert low_level is conv3s[0]
    assert low_level.shape == (1, 256, 33, 17)
    assert output.shape == (1, 2048, -(-129 // output_stride), -(-65 // output_stride))
    assert [c.out_channels for c in model.conv1 if isinstance(c, nn.Conv2d)] == [64, 64, 128]


def test_rates_of_the_v3_paper() -> None:
    with torch.device("meta"):
        model = resnet101(multi_grid=(1, 2, 4), dilate_strided_unit=True, output_stride=16)
    assert geometry(model)[3] == [(1, 2), (1, 4), (1, 8)]
    assert geometry(model)[2][0] == (2, 1)
    model.set_output_stride(8)
    assert geometry(model)[2] == [TWO] * 23
    assert geometry(model)[3] == [(1, 4), (1, 8), (1, 16)]
    model.set_output_stride(32)
    assert geometry(model)[3] == [(2, 1), (1, 2), (1, 4)]


def test_strided_convolution_of_the_original_network() -> None:
    with torch.device("meta"):
        model = resnet50(strided_conv=1, output_stride=32)
    assert [model.layer2[0].get_submodule(f"conv{i}").stride for i in (1, 2, 3)] == [(2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33)])
@pytest.mark.parametrize("options", [{"unit": BasicBlock}, {"unit": Bottleneck, "strided_unit": "last"}])
def test_any_size(size: tuple[int, int], options: dict) -> None:
    model = randomise(ResNet(**TINY, output_stride=8, **options)).eval()
    with torch.no_grad():
        pyramid = model.pyramid(torch.randn(2, 3, *size))
    expected = [(2, c, *(-(-n // min(s, 8)) for n in size)) for s, c in model.channels.items()]
    assert [tuple(f.shape) for f in pyramid] == expected
    assert all(f.isfinite().all() for f in pyramid)


def test_state_dict_does_not_depend_on_the_output_stride() -> None:
    models = [resnet_small(output_stride=s) for s in (8, 16, 32)]
    copy_parameters(models[0], models[1])
    models[1].set_output_stride(8)
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(models[0].eval()(x).output, models[1].eval()(x).output)
    assert list(models[0].state_dict()) == list(models[2].state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"multi_grid": (1, 2)}, r"multi_grid must be 3 positive ints, got \(1, 2\)"),
        ({"stem": "5x5"}, "stem must be '7x7' or '3x3', got '5x5'"),
        ({"strided_unit": "middle"}, "strided_unit must be 'first' or 'last', got 'middle'"),
        ({"strided_conv": 3}, "strided_conv must be 1 or 2, got 3"),
        ({"units": (1, 2, 2, 2), "multi_grid": None, "strided_unit": "last"}, "needs at least two units per stage"),
        ({"units": (1, 2, 2)}, r"units must be 4 positive ints, got \(1, 2, 2\)"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**{**TINY, **options})
