"""DeepLab v3+: against segmentation_models_pytorch, against plain torch modules, and as a model to train and export."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from _models import assert_same_gradients, copy_aspp, copy_backbone, copy_parameters, randomise, relative_error
from _peers import peer
from _systems import check_training
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.heads import ASPP
from deeplab_kernels.models.layers import ConvNormAct
from deeplab_kernels.nn import AtrousSeparableConv2d


def small(num_classes: int = 5, **options: object) -> nn.Module:
    return randomise(models.build("deeplabv3plus_small", num_classes, **options))


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_aspp_equals_segmentation_models_pytorchs(separable: bool, training: bool) -> None:
    peer("segmentation_models_pytorch")
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP as TheirASPP

    theirs = randomise(TheirASPP(40, 24, (2, 5, 18), separable=separable, dropout=0.0)).double().train(training)
    ours = ASPP(40, 24, (2, 5, 18), separable=separable, normalize_depthwise=False, dropout=0.0, momentum=0.1)
    ours = ours.double().train(training)
    copy_aspp(theirs, ours)
    x = torch.randn(3, 40, 13, 9, dtype=torch.float64)
    assert relative_error(ours(x), theirs(x)) < 1e-12
    assert relative_error(ours.project.norm.running_var, theirs.project[1].running_var) < 1e-12


def copy_smp_heads(theirs: nn.Module, ours: nn.Module) -> None:
    """All of segmentation_models_pytorch's DeepLabV3Plus behind its encoder."""
    aspp, after, norm, _ = theirs.decoder.aspp
    copy_aspp(aspp, ours.aspp)
    copy_parameters(nn.Sequential(after, norm), ours.refine)
    copy_parameters(theirs.decoder.block1, ours.decoder.reduce)
    # Theirs concatenates the deep feature first, as ours does.
    copy_parameters(theirs.decoder.block2, ours.decoder.convs[0])
    copy_parameters(theirs.segmentation_head[0], ours.classifier)


SMP_ENCODERS = {"resnet50": "resnet50", "resnet101": "resnet101", "mobilenetv2": "mobilenet_v2"}


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [("resnet50", 8), ("resnet50", 16), ("resnet101", 16), ("mobilenetv2", 8), ("mobilenetv2", 16)],
)
def test_equals_segmentation_models_pytorchs(name: str, output_stride: int) -> None:
    smp = peer("segmentation_models_pytorch")
    with torch.device("meta"):
        theirs = smp.DeepLabV3Plus(
            SMP_ENCODERS[name],
            encoder_weights=None,
            encoder_output_stride=output_stride,
            decoder_atrous_rates=(24, 48, 72) if output_stride == 8 else (12, 24, 36),
            classes=5,
        )
        ours = models.build(f"deeplabv3plus_{name}", 5, output_stride, variant="smp")
    theirs = randomise(theirs.to_empty(device="cpu")).double().eval()
    ours = ours.to_empty(device="cpu").double().eval()
    copy_backbone(theirs.encoder, ours.backbone)
    copy_smp_heads(theirs, ours)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-10


def test_xception_equals_segmentation_models_pytorchs() -> None:
    smp = peer("segmentation_models_pytorch")
    options = {"multi_grid": (1, 1, 1), "refine": "separable", "normalize_depthwise": False, "decoder_convs": 1}
    with torch.device("meta"):
        theirs = smp.DeepLabV3Plus(
            "tu-xception65", encoder_weights=None, decoder_atrous_rates=(3, 6, 9), classes=5, encoder_output_stride=16
        )
        ours = models.build("deeplabv3plus_xception65", 5, 16, atrous_rates=(3, 6, 9), **options)
    theirs, ours = randomise(theirs.to_empty(device="cpu")).eval(), ours.to_empty(device="cpu").eval()
    from test_xception import adopt

    encoder = theirs.encoder.model  # timm's feature extraction writes "_" for the first "."
    adopt(ours.backbone, {re.sub(r"^(stem|blocks)_", r"\1.", k): v for k, v in encoder.state_dict().items()})
    copy_smp_heads(theirs, ours)
    # timm takes the low-level feature after the ReLU in front of the next convolution.
    ours.decoder.reduce.register_forward_pre_hook(lambda _module, inputs: inputs[0].relu())
    x = torch.randn(1, 3, 96, 64)  # theirs takes multiples of 16 only, and resizes by factors
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"decoder_convs": 1}, [256 + 48, 256]),
        ({"decoder_convs": 3, "low_level_channels": 8}, [256 + 8, 256, 256, 256]),
        ({"decoder_channels": 128}, [256 + 48, 128, 128]),
        ({"decoder_kernel": 1, "decoder_convs": 1}, [256 + 48, 256]),
        ({"low_level": "conv3"}, [256 + 48, 256, 256]),
        ({"low_level": "conv2+conv3"}, [256 + 48, 256, 256]),
    ],
)
@pytest.mark.parametrize("name", ["deeplabv3plus_resnet50", "deeplabv3plus_xception41", "deeplabv3plus_mobilenetv2"])
def test_decoders_of_the_papers_ablation(name: str, options: dict, widths: list[int]) -> None:
    # Chen et al., arXiv:1802.02611, tables 1 and 2.
    model = models.build(name, device="meta", separable=False, **options).eval()
    decoder, sizes = model.decoder, []
    decoder.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape)))
    assert model(torch.empty(1, 3, 129, 65, device="meta")).shape == (1, 21, 129, 65)
    convs = [conv.conv for conv in decoder.convs]
    assert [convs[0].in_channels, *(conv.out_channels for conv in convs)] == widths
    assert {conv.kernel_size for conv in convs} == {(options.get("decoder_kernel", 3),) * 2}
    assert decoder.reduce.conv.out_channels == options.get("low_level_channels", 48)
    grid = (17, 9) if options.get("low_level") == "conv3" else (33, 17)
    assert sizes == [(1, widths[-1], *grid)]
    stride = 8 if options.get("low_level") == "conv3" else 4
    assert decoder.reduce.conv.in_channels == model.backbone.channels[stride]
    if options.get("low_level") == "conv2+conv3":
        assert decoder.coarser.reduce.conv.in_channels == model.backbone.channels[8]
        assert len(decoder.coarser.convs) == 2
    else:
        assert decoder.coarser is None


def test_two_decoders_one_after_the_other() -> None:
    model = small(low_level="conv2+conv3", decoder_channels=40).double().eval()
    x = torch.randn(1, 3, 65, 49, dtype=torch.float64)
    with torch.no_grad():
        conv2, conv3, features = model.backbone.pyramid(x, (4, 8, 32))
        y = model.aspp(features)
        for decoder, low_level in ((model.decoder.coarser, conv3), (model.decoder, conv2)):
            y = F.interpolate(y, low_level.shape[2:], mode="bilinear", align_corners=True)
            y = decoder.convs(torch.cat([y, decoder.reduce(low_level)], 1))
        expected = F.interpolate(model.classifier(y), x.shape[2:], mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12


def test_initial_weights_of_the_heads_follow_the_official_code() -> None:
    model = models.build("deeplabv3plus_small")
    branch = model.aspp.atrous[0]
    for weight, std in (
        (branch.depthwise.weight, 0.33 * 0.8796),  # a normal distribution cut at two deviations keeps 0.8796
        (branch.pointwise.weight, 0.06 * 0.8796),
        (model.classifier.weight, 0.01 * 0.8796),
        (model.aspp.project.conv.weight, (2 / (5 * 64 + 64)) ** 0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.06)
    assert not model.classifier.bias.any()


class PlainSeparable(nn.Sequential):
    """depthwise, norm, ReLU, pointwise, norm, ReLU as in the official ASPP and decoder, of torch's own modules."""

    def __init__(self, block: AtrousSeparableConv2d) -> None:
        depthwise = nn.Conv2d(
            block.in_channels,
            block.in_channels,
            3,
            padding=block.dilation[0],
            dilation=block.dilation,
            groups=block.in_channels,
            bias=False,
        )
        depthwise.weight, pointwise = block.depthwise.weight, block.pointwise
        super().__init__(depthwise, block.depthwise_norm, nn.ReLU(), pointwise, block.pointwise_norm, nn.ReLU())


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("separable", [True, False])
def test_heads_follow_the_official_code(decoder: bool, separable: bool) -> None:
    # The head written once more, from the official order of operations, on the model's own parameters.
    model = small(decoder=decoder, separable=separable, output_stride=8).double().eval()
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)

    def conv(part: nn.Module) -> nn.Module:
        if isinstance(part, AtrousSeparableConv2d):
            return PlainSeparable(part).eval()
        return nn.Sequential(part.conv, part.norm, nn.ReLU())

    with torch.no_grad():
        low_level, features = model.backbone(x)
        pooled = conv(model.aspp.pooling)(F.avg_pool2d(features, features.shape[2:]))
        branches = [F.interpolate(pooled, features.shape[2:], mode="bilinear", align_corners=True)]
        branches += [conv(model.aspp.pointwise)(features), *(conv(branch)(features) for branch in model.aspp.atrous)]
        y = conv(model.aspp.project)(torch.cat(branches, 1))
        if decoder:
            y = F.interpolate(y, low_level.shape[2:], mode="bilinear", align_corners=True)
            y = torch.cat([y, conv(model.decoder.reduce)(low_level)], 1)
            for part in model.decoder.convs:
                y = conv(part)(y)
        y = F.conv2d(y, model.classifier.weight, model.classifier.bias)
        expected = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12
    assert [branch_rate(b) for b in model.aspp.atrous] == [4, 8, 12]


def branch_rate(branch: nn.Module) -> int:
    return (branch.conv if isinstance(branch, ConvNormAct) else branch).dilation[0]


@pytest.mark.parametrize(("output_stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
def test_rates_of_the_papers_models(output_stride: int, rates: tuple[int, ...]) -> None:
    model = models.build("deeplabv3plus_xception65", device="meta")
    model.set_output_stride(output_stride)
    assert tuple(branch_rate(b) for b in model.aspp.atrous) == model.aspp.rates == rates
    assert model.output_stride == model.backbone.output_stride == output_stride
    heads = [m for part in (model.aspp, model.decoder) for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in heads} == {(1e-5, 3e-4)}
    assert len(heads) == 3 + 3 * 2 + 1 + 2 * 2
    assert model.decoder.reduce.conv.weight.shape == (48, 256, 1, 1)
    assert [c.out_channels for c in model.decoder.convs] == [256, 256]
    assert model.aspp.dropout.p == 0.1


@pytest.mark.parametrize("separable", [True, False])
def test_output_stride_of_a_built_model(separable: bool) -> None:
    built = {s: small(output_stride=s, separable=separable).eval() for s in (8, 16, 32)}
    state = built[16].state_dict()
    switched = copy.deepcopy(built[16])
    x = torch.randn(1, 3, 65, 49)
    outputs = {}
    for output_stride in (8, 32, 16):
        fresh = built[output_stride]
        assert list(fresh.state_dict()) == list(state)
        fresh.load_state_dict(state)
        switched.set_output_stride(output_stride)
        with torch.no_grad():
            outputs[output_stride] = switched(x)
            assert torch.equal(outputs[output_stride], fresh(x))
    assert not torch.allclose(outputs[8], outputs[16])
    assert not torch.allclose(outputs[32], outputs[16])
    assert all(torch.equal(v, state[k]) for k, v in switched.state_dict().items())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 33), (64, 50), (127, 65)])
@pytest.mark.parametrize("decoder", [True, False])
def test_any_size(size: tuple[int, int], decoder: bool) -> None:
    model = small(decoder=decoder, output_stride=8).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


def test_batch_entries_do_not_mix() -> None:
    model = small().eval()
    x = torch.randn(3, 3, 65, 33)
    with torch.no_grad():
        assert relative_error(model(x)[1:2], model(x[1:2])) < 1e-5
        assert model(x[:0]).shape == (0, 5, 65, 33)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 65, 65), r"x must have shape \(N, 3, H, W\), got \(3, 65, 65\)"),
        ((1, 4, 65, 65), r"x must have shape \(N, 3, H, W\), got \(1, 4, 65, 65\)"),
        ((1, 3, 0, 65), r"height and a width of at least 1, got \(1, 3, 0, 65\)"),
    ],
)
def test_bad_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().eval()(torch.randn(shape))


def test_training_on_one_image_is_refused_with_a_reason() -> None:
    model = small()
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1: the image pooling of the ASPP"):
        model(torch.randn(1, 3, 65, 65))
    for module in model.modules():  # the usual way to fine-tune with few images
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(torch.randn(1, 3, 65, 65)).sum().backward()


def test_training_learns_and_reaches_every_parameter() -> None:
    model = models.build("deeplabv3plus_small", num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_training(model, learning_rate=0.2, steps=8, fall=0.5)
    unchanged = [k for k, v in model.state_dict().items() if torch.equal(v, before[k])]
    assert not unchanged


def test_gradients_equal_those_of_torchs_own_modules() -> None:
    # Hooks make every separable block call its submodules one by one: torch's batch normalisation, no fused operator.
    fused = small().double()
    plain = copy.deepcopy(fused)
    for module in plain.modules():
        if isinstance(module, AtrousSeparableConv2d):
            module.depthwise_norm.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 33, 65, dtype=torch.float64)
    weight = torch.randn(2, 5, 33, 65, dtype=torch.float64)
    for model in (fused, plain):
        (model(x) * weight).sum().backward()
    assert_same_gradients(fused, plain, 1e-10)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10), name


def test_channels_last() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 65, 49)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        seen = []
        for module in (*model.backbone.blocks, model.aspp, model.decoder):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        actual = model(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(actual, expected) < 1e-5
    assert len(seen) == 9
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*seen, actual))


@pytest.mark.filterwarnings("ignore")
def test_compile() -> None:
    # The training step: test_export traces the evaluation mode. float64, since near ReLU's kink float32's rounding,
    # which differs between the two, decides over whole gradients.
    model = small().train().double()
    reference = copy.deepcopy(model)
    x, weight = torch.randn(2, 3, 33, 49).double(), torch.randn(2, 5, 33, 49).double()
    actual = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    expected = reference(x)
    assert relative_error(actual, expected) < 1e-9
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same_gradients(model, reference, 1e-7)
    for (name, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name


@pytest.mark.filterwarnings("ignore")
def test_export_for_any_batch_and_size() -> None:
    model = small().eval()
    batch, height, width = Dim("n", min=1, max=16), Dim("h", min=17, max=1025), Dim("w", min=17, max=1025)
    x = torch.randn(2, 3, 33, 49)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 2: height, 3: width},))
    for shape in ((2, 3, 33, 49), (1, 3, 50, 65)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_error(program.module()(x), model(x)) < 1e-5
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "deeplab_kernels.atrous_depthwise_bn_act_inference.default" in names


def test_autocast_and_deepcopy() -> None:
    model = copy.deepcopy(small()).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x)
    assert actual.dtype == torch.bfloat16
    assert ((actual - expected).norm() / expected.norm()).item() < 0.05
