"""DeepLab v3 against torchvision, segmentation_models_pytorch and transformers; its parts, variants and training."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from _models import copy_aspp, copy_backbone, copy_parameters, randomise, relative_error
from _peers import peer
from _systems import check_training
from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.layers import ConvNormAct, resize_bilinear
from deeplab_kernels.nn import AtrousSeparableConv2d


def small(num_classes: int = 5, **options: object) -> nn.Module:
    return randomise(models.build("deeplabv3_small", num_classes, **options))


def on_meta_then_random(theirs: nn.Module) -> nn.Module:
    """No time for weights that are not used."""
    return randomise(theirs.to_empty(device="cpu")).eval()


@pytest.mark.parametrize(("name", "output_stride"), [("resnet50", 8), ("resnet101", 8), ("resnet50", 16)])
def test_equals_torchvisions(name: str, output_stride: int) -> None:
    torchvision = peer("torchvision")
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    with torch.device("meta"):
        if output_stride == 8:
            build = torchvision.models.segmentation.__dict__[f"deeplabv3_{name}"]
            theirs = build(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
        else:
            backbone = getattr(torchvision.models, name)(replace_stride_with_dilation=(False, False, True))
            head = DeepLabHead(2048, 5, (6, 12, 18))
            theirs = DeepLabV3(IntermediateLayerGetter(backbone, {"layer4": "out"}), head)
        auxiliary = theirs.aux_classifier is not None
        options = {} if auxiliary else {"output_stride": output_stride}
        ours = models.build(f"deeplabv3_{name}", 5, variant="torchvision", auxiliary=auxiliary, **options)
    theirs, ours = on_meta_then_random(theirs), ours.to_empty(device="cpu").eval()
    assert ours.output_stride == output_stride
    ours.backbone.load_state_dict(theirs.backbone.state_dict())
    aspp, conv, norm, _, classifier = theirs.classifier
    copy_aspp(aspp, ours.aspp)
    copy_parameters(nn.Sequential(conv, norm), ours.refine)
    copy_parameters(classifier, ours.classifier)
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = theirs(x)
        assert relative_error(ours(x), expected["out"]) < 1e-5
        if not auxiliary:
            return
        copy_parameters(theirs.aux_classifier, ours.aux_classifier)
        ours.training = True  # of the model alone: the batch normalisations stay in evaluation mode
        logits, auxiliary_logits = ours(x)
        assert relative_error(logits, expected["out"]) < 1e-5
        assert relative_error(auxiliary_logits, expected["aux"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "encoder", "output_stride", "separable"),
    [
        ("resnet50", "resnet50", 8, False),
        ("resnet50", "resnet50", 16, True),
        ("mobilenetv2", "mobilenet_v2", 8, True),
        ("mobilenetv2", "mobilenet_v2", 16, False),
    ],
)
def test_equals_segmentation_models_pytorchs(name: str, encoder: str, output_stride: int, separable: bool) -> None:
    smp = peer("segmentation_models_pytorch")
    with torch.device("meta"):
        theirs = smp.DeepLabV3(
            encoder,
            encoder_weights=None,
            encoder_output_stride=output_stride,
            decoder_aspp_separable=separable,
            decoder_atrous_rates=(12, 24, 36),
            classes=5,
        )
        ours = models.build(
            f"deeplabv3_{name}",
            5,
            output_stride,
            variant="smp",
            separable=separable,
            atrous_rates=(6, 12, 18) if output_stride == 8 else (12, 24, 36),
        )
    theirs, ours = on_meta_then_random(theirs).double(), ours.to_empty(device="cpu").double().eval()
    copy_backbone(theirs.encoder, ours.backbone)
    copy_aspp(theirs.decoder.aspp, ours.aspp)
    # Their 3x3 convolution after the ASPP is a plain one even where the ASPP is separable.
    copy_parameters(nn.Sequential(theirs.decoder.conv, theirs.decoder.bn), ours.refine)
    copy_parameters(theirs.segmentation_head[0], ours.classifier)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_mobilenetv2_equals_transformers(output_stride: int) -> None:
    transformers = peer("transformers")
    config = transformers.MobileNetV2Config(
        num_labels=5, depth_multiplier=0.35, output_stride=output_stride, finegrained_output=False
    )
    theirs = randomise(transformers.MobileNetV2ForSemanticSegmentation(config)).double().eval()
    ours = models.build("deeplabv3_mobilenetv2", 5, output_stride, variant="official", width_multiplier=0.35)
    ours = ours.double().eval()
    encoder, head = theirs.mobilenet_v2, theirs.segmentation_head
    encoder.conv_1x1 = nn.Identity()  # the classification network's; the head takes what comes before
    theirs.config.output_hidden_states = True
    copy_parameters(encoder, ours.backbone)
    for source, target in (
        (head.conv_pool, ours.aspp.pooling),
        (head.conv_aspp, ours.aspp.pointwise),
        (head.conv_projection, ours.aspp.project),
        (head.classifier, ours.classifier),
    ):
        copy_parameters(source, target)
    for size in ((65, 97), (64, 50)):  # TensorFlow's padding depends on whether a size is even
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = theirs(x).logits
            assert expected.shape[2:] == tuple(-(-n // output_stride) for n in size)
            assert relative_error(ours(x), resize_bilinear(expected, size)) < 1e-10


def branch_rate(branch: nn.Module) -> int:
    return (branch.conv if isinstance(branch, ConvNormAct) else branch).dilation[0]


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_resnet101"])
@pytest.mark.parametrize(
    ("output_stride", "rates", "last_stage"),
    [(8, (12, 24, 36), (4, 8, 16)), (16, (6, 12, 18), (2, 4, 8)), (32, (3, 6, 9), (1, 2, 4))],
)
def test_rates_of_the_paper(name: str, output_stride: int, rates: tuple[int, ...], last_stage: tuple[int, ...]) -> None:
    for variant in ("paper", "official"):
        model = models.build(name, variant=variant, device="meta")
        assert model.output_stride == 16
        model.set_output_stride(output_stride)
        assert tuple(branch_rate(b) for b in model.aspp.atrous) == model.aspp.rates == rates
        assert tuple(unit.conv2.dilation[0] for unit in model.backbone.layer4) == last_stage
        assert model.decoder is None
        assert model.refine is None
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(n.eps, n.momentum) for n in norms} == {(1e-5, 3e-4)}
        assert isinstance(model.backbone.conv1, nn.Sequential) == (variant == "official")


def test_head_follows_the_official_code() -> None:
    # The head written once more, from the official order of operations, on the model's own parameters.
    model = small(separable=True, output_stride=8).double().eval()
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)

    def separable(block: AtrousSeparableConv2d, y: Tensor) -> Tensor:
        rate = block.dilation[0]
        y = F.conv2d(y, block.depthwise.weight, None, 1, rate, rate, y.shape[1])
        return block.pointwise_norm(block.pointwise(block.depthwise_norm(y).relu())).relu()

    with torch.no_grad():
        features = model.backbone(x).output
        aspp = model.aspp
        pooled = aspp.pooling(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        branches = [pooled, aspp.pointwise(features), *(separable(block, features) for block in aspp.atrous)]
        y = model.classifier(aspp.project(torch.cat(branches, 1)))
        expected = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12
    assert [branch_rate(b) for b in aspp.atrous] == [4, 8, 12]


def test_output_stride_of_a_built_model() -> None:
    built = {s: small(output_stride=s).eval() for s in (8, 16, 32)}
    state = built[16].state_dict()
    switched = copy.deepcopy(built[16])
    x = torch.randn(1, 3, 65, 49)
    for output_stride in (8, 32, 16):
        fresh = built[output_stride]
        fresh.load_state_dict(state)
        switched.set_output_stride(output_stride)
        with torch.no_grad():
            assert torch.equal(switched(x), fresh(x))


@pytest.mark.parametrize("size", [(1, 1), (5, 33), (64, 50)])
def test_any_size(size: tuple[int, int]) -> None:
    model = small(output_stride=8).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    assert logits.isfinite().all()


def test_training_reaches_every_parameter() -> None:
    model = models.build("deeplabv3_small", 3, auxiliary=True, refine="separable")

    def loss_of(outputs: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        logits, auxiliary = outputs
        assert auxiliary.shape == logits.shape == (4, 3, 33, 33)
        return F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)

    check_training(model, steps=8, fall=0.5, loss_of=loss_of)
    assert model.eval()(torch.randn(4, 3, 33, 33)).shape == (4, 3, 33, 33)


@pytest.mark.filterwarnings("ignore")
def test_export() -> None:
    model = small(separable=True).eval()
    x = torch.randn(1, 3, 33, 49)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert relative_error(program.module()(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("deeplabv3_small", {"variant": "caffe"}, ValueError, "variant must be 'paper', got 'caffe'"),
        (
            "deeplabv3_resnet50",
            {"variant": "caffe"},
            ValueError,
            "variant must be 'paper' or 'official' or 'torchvision' or 'smp', got 'caffe'",
        ),
        ("deeplabv3_resnet50", {"stem": "5x5"}, ValueError, "stem must be '7x7' or '3x3', got '5x5'"),
        ("deeplabv3_mobilenetv2", {"multi_grid": (1, 2, 4)}, TypeError, "has no option 'multi_grid'"),
        ("deeplabv3_resnet50", {"decoder": True}, TypeError, "has no option 'decoder'"),
        ("deeplabv3_resnet50", {"refine": True}, ValueError, "refine must be 'plain', 'separable' or None, got True"),
        ("deeplabv3_small", {"atrous_rates": (6, 0)}, ValueError, r"atrous_rates must be positive ints, got \(6, 0\)"),
    ],
)
def test_bad_options(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.build(name, device="meta", **options)


def test_options_of_system_and_backbone_are_listed() -> None:
    with pytest.raises(TypeError, match="no option 'colour'") as raised:
        models.build("deeplabv3_resnet50", colour=1)
    listed = re.search("it has (.*)", str(raised.value))[1].split(", ")
    assert listed[:2] == ["num_classes", "output_stride"]
    assert {"variant", "separable", "stem", "strided_unit", "multi_grid", "momentum"} <= set(listed)
    assert len(set(listed)) == len(listed)
