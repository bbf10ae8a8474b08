"""Xception-41/65/71 against timm, output strides, and the geometry that the papers fix."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from _backbones import backward_of_equals
from _models import randomise, relative_error
from _peers import peer
from torch import Tensor, nn

from deeplab_kernels.models.backbones import Xception, xception41, xception65, xception71, xception_small
from deeplab_kernels.models.backbones.xception import BlockConfig
from deeplab_kernels.nn import AtrousSeparableConv2d

BUILDERS = {"xception41": xception41, "xception65": xception65, "xception71": xception71}


def adopt(ours: Xception, timm_state: dict[str, Tensor]) -> None:
    """Loads a state_dict of timm's."""
    state = {}
    for key, value in timm_state.items():
        key = re.sub(r"stack\.conv(\d)", lambda m: f"convs.{int(m[1]) - 1}", key)
        # The names inside a separable block are timm's: AtrousSeparableConv2d loads those.
        state[re.sub(r"^(stem\.\d|.*shortcut)\.bn", r"\1.norm", key)] = value
    ours.load_state_dict(state, assign=True)


def timm_twin(name: str, output_stride: int) -> tuple[nn.Module, Xception]:
    """timm's model with random weights and statistics, and ours with the same, both in evaluation mode."""
    with torch.device("meta"):  # no time for weights that are not used
        theirs = peer("timm").create_model(name, num_classes=0, output_stride=output_stride)
        ours = BUILDERS[name](multi_grid=(1, 1, 1), output_stride=output_stride)
    theirs = randomise(theirs.to_empty(device="cpu"))
    adopt(ours, theirs.state_dict())
    return theirs.eval(), ours.eval()


def small_timm_twin() -> tuple[nn.Module, Xception]:
    """A narrow Xception of timm's at output stride 16 with multi-grid (1, 2, 4), and ours, in float64."""
    peer("timm")
    from timm.models.xception_aligned import XceptionAligned

    blocks = [
        {"in_chs": 64, "out_chs": 24, "stride": 2},
        {"in_chs": 24, "out_chs": 32, "stride": 2},
        {"in_chs": 32, "out_chs": 40, "stride": 2},
        {"in_chs": 40, "out_chs": 40, "stride": 1},
        {"in_chs": 40, "out_chs": (40, 48, 48), "stride": 2},
        {"in_chs": 48, "out_chs": (56, 56, 64), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=3e-4)
    theirs = randomise(XceptionAligned(blocks, num_classes=0, output_stride=16, norm_layer=norm))
    for i, grid in enumerate((1, 2, 4), start=1):
        depthwise = getattr(theirs.blocks[-1].stack, f"conv{i}").conv_dw
        depthwise.dilation = depthwise.padding = (2 * grid, 2 * grid)
    ours = Xception(
        [
            BlockConfig((24, 24, 24), stride=2),
            BlockConfig((32, 32, 32), stride=2),
            BlockConfig((40, 40, 40), stride=2),
            BlockConfig((40, 40, 40), shortcut="identity"),
            BlockConfig((40, 48, 48), stride=2),
            BlockConfig((56, 56, 64), shortcut="none", inner_activation=True),
        ],
        output_stride=16,
        multi_grid=(1, 2, 4),
    )
    adopt(ours, theirs.state_dict())
    return theirs.double(), copy.deepcopy(ours).double()


# timm drops the shortcut's convolution of Xception-71's fifth block when output stride 8 takes its stride away.
@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("xception41", 32),
        ("xception65", 32),
        ("xception65", 16),
        ("xception65", 8),
        ("xception71", 32),
        ("xception71", 16),
    ],
)
def test_features_equal_timms(name: str, output_stride: int) -> None:
    theirs, ours = timm_twin(name, output_stride)
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = theirs.forward_intermediates(x)
        low_level, output = ours(x)
    stride_4 = [f for f, info in zip(features, theirs.feature_info, strict=True) if info["reduction"] == 4]
    assert output.shape == (1, 2048, -(-65 // output_stride), -(-97 // output_stride))
    assert relative_error(output, expected) < 1e-5
    # timm's is taken after the ReLU in front of the next convolution, the official code's before.
    assert (low_level < 0).any()
    assert relative_error(low_level.relu(), stride_4[0]) < 1e-5


def test_features_equal_timms_in_float64() -> None:
    theirs, ours = (model.eval() for model in small_timm_twin())
    x = torch.randn(2, 3, 97, 65, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(x).output, theirs.forward_features(x)) < 1e-12


def test_training_step_equals_timms() -> None:
    # Batch statistics, their running estimates and the gradients.
    theirs, ours = (model.train() for model in small_timm_twin())
    x = torch.randn(2, 3, 97, 65, dtype=torch.float64)
    expected, output = theirs.forward_features(x), ours(x).output
    backward_of_equals(output, expected)
    for theirs_conv, ours_conv in (
        (theirs.stem[0].conv, ours.stem[0].conv),
        (theirs.blocks[3].stack.conv2.conv_dw, ours.blocks[3].convs[1].depthwise),
        (theirs.blocks[-1].stack.conv3.conv_pw, ours.blocks[-1].convs[2].pointwise),
        (theirs.blocks[-1].stack.conv3.bn_dw, ours.blocks[-1].convs[2].depthwise_norm),
    ):
        assert relative_error(ours_conv.weight.grad, theirs_conv.weight.grad) < 1e-10
    for theirs_norm, ours_norm in (
        (theirs.blocks[-1].stack.conv3.bn_dw, ours.blocks[-1].convs[2].depthwise_norm),
        (theirs.blocks[1].shortcut.bn, ours.blocks[1].shortcut.norm),
    ):
        assert relative_error(ours_norm.running_var, theirs_norm.running_var) < 1e-12
        assert relative_error(ours_norm.running_mean, theirs_norm.running_mean) < 1e-12
        assert ours_norm.num_batches_tracked == 1


def geometry(model: Xception) -> list[tuple[int, list[int]]]:
    """(stride, rates) of every block."""
    return [(b.convs[2].stride[0], [c.dilation[0] for c in b.convs]) for b in model.blocks]


# The official code's units: one reached at the target stride keeps it and hands its own stride on as rate.
PLAIN, RATE_2 = (1, [1, 1, 1]), (1, [2, 2, 2])
EXPECTED_GEOMETRY = {
    ("xception65", 32): [(2, [1, 1, 1])] * 3 + [PLAIN] * 16 + [(2, [1, 1, 1]), (1, [1, 2, 4])],
    ("xception65", 16): [(2, [1, 1, 1])] * 3 + [PLAIN] * 16 + [PLAIN, (1, [2, 4, 8])],
    ("xception65", 8): [(2, [1, 1, 1])] * 2 + [PLAIN] + [RATE_2] * 16 + [RATE_2, (1, [4, 8, 16])],
    ("xception71", 8): [(2, [1, 1, 1]), PLAIN, (2, [1, 1, 1]), PLAIN, PLAIN]
    + [RATE_2] * 16
    + [RATE_2, (1, [4, 8, 16])],
}


@pytest.mark.parametrize(("name", "output_stride"), EXPECTED_GEOMETRY)
def test_strides_and_rates(name: str, output_stride: int) -> None:
    with torch.device("meta"):
        model = BUILDERS[name](output_stride=32)
    model.set_output_stride(output_stride)
    assert geometry(model) == EXPECTED_GEOMETRY[name, output_stride]
    for block in model.blocks:
        assert block.convs[0].stride == block.convs[1].stride == (1, 1)
        if hasattr(block.shortcut, "conv"):
            assert block.shortcut.conv.stride == block.convs[2].stride


@pytest.mark.parametrize(
    ("name", "leaving"),
    [("xception41", (0, 1, 2, 11)), ("xception65", (0, 1, 2, 19)), ("xception71", (0, 2, 4, 21))],
)
def test_features_come_from_the_blocks_that_leave_their_stride(name: str, leaving: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = BUILDERS[name]()
        seconds: list[Tensor] = []
        for index in leaving:
            model.blocks[index].convs[1].register_forward_hook(lambda _m, _i, out: seconds.append(out))
        x = torch.empty(1, 3, 129, 65)
        *pyramid, output = model.pyramid(x)
        assert [id(f) for f in pyramid] == [id(f) for f in seconds]
        low_level, same = model(x)
    assert output.shape == same.shape == (1, 2048, 9, 5)
    assert low_level.shape == (1, 256, 33, 17)
    assert model.channels == {2: 128, 4: 256, 8: 728, 16: 1024, 32: 2048}
    assert [tuple(f.shape) for f in pyramid] == [(1, 128, 65, 33), (1, 256, 33, 17), (1, 728, 17, 9), (1, 1024, 9, 5)]
    assert (model.low_level_channels, model.out_channels) == (256, 2048)
    assert [tuple(f.shape) for f in model.pyramid(x.to("meta"), (8,))] == [(1, 728, 17, 9)]
    with pytest.raises(ValueError, match=r"strides must be among 2, 4, 8, 16, 32, got \(3,\)"):
        model.pyramid(x, (3,))


@pytest.mark.parametrize(("name", "layers"), [("xception41", 41), ("xception65", 65), ("xception71", 71)])
def test_layers_and_norms(name: str, layers: int) -> None:
    with torch.device("meta"):
        model = BUILDERS[name]()
    separable = [m for m in model.modules() if isinstance(m, AtrousSeparableConv2d)]
    # The name counts the separable convolutions and the two of the stem, not the shortcuts.
    assert len(separable) + 2 == layers
    shortcuts = sum(hasattr(block.shortcut, "conv") for block in model.blocks)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 * len(separable) + 2 + shortcuts
    assert {(n.eps, n.momentum) for n in norms} == {(1e-3, 3e-4)}
    last = model.blocks[-1]
    assert last.shortcut is None
    for block in model.blocks:
        for conv in block.convs:
            inner = "relu" if block is last else None
            assert (conv.depthwise_activation, conv.pointwise_activation) == (inner, inner)
            assert conv.pre_activation == (None if block is last else "relu")


def test_initial_weights_follow_the_official_truncated_normal() -> None:
    model = xception41()
    for module in (model.stem[1].conv, model.blocks[5].convs[0].pointwise, model.blocks[0].shortcut.conv):
        weight = module.weight.detach()
        assert weight.abs().max() <= 0.18
        # A normal distribution cut at two deviations keeps 0.8796 of its standard deviation.
        assert weight.std().item() == pytest.approx(0.09 * 0.8796, rel=0.03)
        assert weight.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33), (64, 50)])
@pytest.mark.parametrize("output_stride", [8, 32])
def test_any_size(size: tuple[int, int], output_stride: int) -> None:
    model = randomise(xception_small(output_stride=output_stride)).eval()
    with torch.no_grad():
        low_level, output = model(torch.randn(2, 3, *size))
    assert low_level.shape == (2, 64, *(-(-n // 4) for n in size))
    assert output.shape == (2, 256, *(-(-n // output_stride) for n in size))
    assert output.isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 64"):
        xception_small(output_stride=64)
    with pytest.raises(ValueError, match=r"multi_grid must be 3 positive ints, got \(1, 0, 2\)"):
        xception_small(multi_grid=(1, 0, 2))
    model = xception_small()
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got True"):
        model.set_output_stride(True)
    assert model.output_stride == 16
