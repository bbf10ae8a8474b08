"""FCN-32s, -16s and -8s on VGG-16, and torchvision's on ResNet."""

from __future__ import annotations

import pytest
import torch
from _models import randomise, relative_error
from _peers import peer
from _systems import check_any_size, check_compile, check_output_stride, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.upsampling import resize_centred


def small(**options: object) -> nn.Module:
    return models.build("fcn8s_small", 3, **options)


def test_any_size_strides_training_and_compilation() -> None:
    check_any_size(small())
    check_training(small())
    check_compile(small(), (17, 21))
    check_output_stride(small(), (32,))
    with pytest.raises(ValueError, match="aligned must be False, got True"):
        models.build("fcn8s_vgg16", aligned=True, device="meta")
    with pytest.raises(ValueError, match="output_stride must be 32 with 2x2 poolings, got 8"):
        models.build("fcn8s_vgg16", output_stride=8, device="meta")


@pytest.mark.parametrize(("name", "skips"), [("fcn32s", []), ("fcn16s", [512]), ("fcn8s", [512, 256])])
def test_the_papers_networks(name: str, skips: list[int]) -> None:
    model = models.build(f"{name}_vgg16", device="meta")
    assert model.head.fc6.weight.shape == (4096, 512, 7, 7)
    assert model.head.fc7.weight.shape == (4096, 4096, 1, 1)
    assert [tuple(skip.weight.shape) for skip in model.skips] == [(21, n, 1, 1) for n in skips]
    assert [d.weight.shape[2:] for d in model.deconvolutions] == [(4, 4)] * len(skips)
    # "134M" in the paper's table 1
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 134
    assert model.eval()(torch.empty(1, 3, 500, 375, device="meta")).shape == (1, 21, 500, 375)


def test_forward_is_the_plain_composition() -> None:
    model = randomise(small()).double().eval()
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    for deconvolution in model.deconvolutions:
        nn.init.normal_(deconvolution.weight)
    with torch.no_grad():
        pools, y = [], x
        for layer in model.backbone.features:
            y = layer(y)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(y)
        y = model.head(pools[4])
        for pool, skip, up in zip(pools[3:1:-1], model.skips, model.deconvolutions, strict=True):
            padded = F.pad(y, (1, 1, 1, 1), mode="replicate")
            y = F.conv_transpose2d(padded, up.weight, stride=2, groups=3)[:, :, 3:-3, 3:-3] + skip(pool)
        expected = F.interpolate(y, scale_factor=8.0, mode="bilinear", align_corners=False)
        assert relative_error(model(x), expected) < 1e-12


def test_starts_as_the_coarser_network() -> None:
    # Skips start at 0 and deconvolutions bilinear: FCN-8s at first gives FCN-32s's scores, upsampled in three steps.
    model = small().eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        scores = model.head(model.backbone.pools(x)[-1])
        for factor in (2, 2, 8):
            scores = resize_centred(scores, [factor * n for n in scores.shape[2:]])
        assert relative_error(model(x), scores) < 1e-5


def test_scores_keep_their_place() -> None:
    # A feature of stride 8 covers the pixels from 8 i to 8 i + 7: scores of one bright feature of pool3 centre there,
    # at whatever size of the image.
    model = small().double().eval()
    x = torch.zeros(1, 3, 93, 71, dtype=torch.float64)
    pool3 = torch.zeros(1, 48, 12, 9, dtype=torch.float64)
    pool3[:, :, 7, 3] = 1
    maps = [pool3.new_zeros(1, n, *size) for n, size in zip((64, 64), ((6, 5), (3, 3)), strict=True)]
    model.backbone.pools = lambda _: [None, None, pool3, *maps]
    nn.init.ones_(model.skips[1].weight)
    for layer in (model.head.fc6, model.head.fc7):
        nn.init.zeros_(layer.weight)
    with torch.no_grad():
        logits = model(x)[0, 0]
    assert logits.shape == (93, 71)
    weight = (logits - logits.min()).clamp(min=0)
    rows, columns = weight.sum(1), weight.sum(0)
    assert (rows @ torch.arange(93.0).double() / rows.sum()).item() == pytest.approx(7 * 8 + 3.5)
    assert (columns @ torch.arange(71.0).double() / columns.sum()).item() == pytest.approx(3 * 8 + 3.5)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_equals_torchvisions_on_resnet50(auxiliary: bool) -> None:
    torchvision = peer("torchvision")
    theirs = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=auxiliary
    )
    theirs = randomise(theirs).eval()
    ours = models.build("fcn_resnet50", 5, auxiliary=auxiliary).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 65, 50)
    with torch.no_grad():
        expected = theirs(x)
        actual = ours(x)
        assert relative_error(actual, expected["out"]) < 1e-4
        if auxiliary:
            ours.training = True  # of the model alone: dropout and normalisation stay as they are
            logits, other = ours(x)
            assert torch.equal(logits, actual)
            assert relative_error(other, expected["aux"]) < 1e-4


def test_fcn_on_resnet_switches_its_output_stride() -> None:
    model = models.build("fcn_resnet50", device="meta")
    assert model.output_stride == 8
    model.set_output_stride(32)
    assert model.output_stride == 32
    assert model.eval()(torch.empty(1, 3, 33, 1, device="meta")).shape == (1, 21, 33, 1)
    assert "aux_classifier.0.weight" in models.build("fcn_resnet101", auxiliary=True, device="meta").state_dict()
