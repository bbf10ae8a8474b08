"""Checkpoints of the official DeepLab code (TensorFlow-Slim)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..system import Normalization
from .layout import Layout, Rule, State

# What optimisers and moving averages keep beside a variable, and what belongs to no network.
_SLOT = re.compile(r".*/(Momentum|RMSProp(_1)?|Adam(_1)?|ExponentialMovingAverage)|global_step|.*biased|.*local_step")
# The ResNets see 0..255 less ImageNet's mean, undivided.
_SUBTRACTED_MEAN = Normalization((123.15 / 255, 115.90 / 255, 103.06 / 255), (1 / 255, 1 / 255, 1 / 255))
_AVERAGE = "/ExponentialMovingAverage"
_LEAVES = {
    "weights": "weight",
    "depthwise_weights": "weight",
    "biases": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# What follows the scope of a layer: a convolution's own variable, or one of its batch normalisation.
_CONV, _NORM = r"/(weights|biases)", r"/BatchNorm/(gamma|beta|moving_mean|moving_variance)"
_DEPTHWISE = r"/(depthwise_weights)"
_NAMES = ("conv", "norm")
_HALVES = ("depthwise", "depthwise_norm"), ("pointwise", "pointwise_norm")


def _select(state: State) -> State:
    """The variables of the network; their exponential moving averages where they were kept."""
    return {name: state.get(name + _AVERAGE, tensor) for name, tensor in state.items() if not _SLOT.fullmatch(name)}


def _layer(scope: str, target: Callable[[re.Match[str]], str], names: tuple[str, str] = _NAMES) -> tuple[Rule, ...]:
    """Rules of the layer ``scope``: our module's name is ``target`` of the match, its parts are called ``names``."""

    def rule(tail: str, name: str) -> Rule:
        return scope + tail, lambda match: f"{target(match)}{name}.{_LEAVES[match[match.re.groups]]}"

    weights = _DEPTHWISE if names[0].startswith("depthwise") else _CONV
    return rule(weights, f".{names[0]}" if names[0] else ""), rule(_NORM, f".{names[1]}")


def _separable(scope: str, target: Callable[[re.Match[str]], str]) -> tuple[Rule, ...]:
    return (
        *_layer(scope + "_depthwise", target, _HALVES[0]),
        *_layer(scope + "_pointwise", target, _HALVES[1]),
    )


def _named(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: match.expand(template)


def _convert(name: str, tensor: Tensor) -> Tensor:
    """HWIO -> OIHW; depthwise: height, width, channels, multiplier -> (channels multiplier) 1 height width."""
    if tensor.dim() != 4:
        return tensor
    if re.search(r"\.depthwise\.weight$", name):
        return tensor.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1).contiguous()
    return tensor.permute(3, 2, 0, 1).contiguous()


# ASPP, decoder and classifier, whatever the backbone. Separable or not shows in the names.
_HEADS: tuple[Rule, ...] = (
    *_layer("image_pooling", _named("aspp.pooling")),
    *_layer("aspp0", _named("aspp.pointwise")),
    *_layer(r"aspp(\d)", lambda match: f"aspp.atrous.{int(match[1]) - 1}"),
    *_separable(r"aspp(\d)", lambda match: f"aspp.atrous.{int(match[1]) - 1}"),
    *_layer("concat_projection", _named("aspp.project")),
    *_layer(r"decoder/feature_projection0", _named("decoder.reduce")),
    *_separable(r"decoder/decoder_conv(\d)", _named(r"decoder.convs.\1")),
    *_layer(r"decoder/decoder_conv0/decoder_conv0_(\d)", lambda match: f"decoder.convs.{int(match[1]) - 1}"),
    *_layer("logits/semantic", _named("classifier"), ("", "norm")),
)


def _xception_rules(entry: int, middle: int) -> tuple[Rule, ...]:
    first = {"entry": 0, "middle": entry, "exit": entry + middle}

    def block(match: re.Match[str]) -> str:
        # Slim counts units of the middle flow's one block, and blocks of one unit elsewhere.
        index = int(match["unit"] if match["flow"] == "middle" else match["block"]) - 1
        return f"backbone.blocks.{first[match['flow']] + index}"

    scope = r"xception_\d+/"
    unit = scope + r"(?P<flow>entry|middle|exit)_flow/block(?P<block>\d+)/unit_(?P<unit>\d+)/xception_module/"
    return (
        *_layer(scope + r"entry_flow/conv1_(\d)", lambda match: f"backbone.stem.{int(match[1]) - 1}"),
        *_layer(unit + "shortcut", lambda match: f"{block(match)}.shortcut"),
        *_separable(
            unit + r"separable_conv(?P<conv>\d)", lambda match: f"{block(match)}.convs.{int(match['conv']) - 1}"
        ),
        (scope + r"logits/.*", None),  # the classifier of ImageNet
    )


def _xception(depth: int, entry: int, middle: int, *, classification: bool) -> Layout:
    def model(state: State) -> tuple[str, dict[str, Any]]:
        options: dict[str, Any] = {"multi_grid": (1, 1, 1)}
        if not classification:
            options["decoder"] = "decoder/feature_projection0/weights" in state
            options["separable"] = "aspp1_depthwise/depthwise_weights" in state
        return f"deeplabv3plus_xception{depth}", options

    return Layout(
        origin="tensorflow",
        network=f"Xception-{depth} (classification)" if classification else f"DeepLab v3+ with Xception-{depth}",
        marks=(rf"xception_{depth}/entry_flow/.*", r"logits/semantic/weights")[: 1 if classification else 2],
        rules=(*_xception_rules(entry, middle), *(() if classification else _HEADS)),
        norm_eps={"backbone.": 1e-3} if classification else {"": 1e-5, "backbone.": 1e-3},
        prefix="backbone." if classification else "",
        select=_select,
        convert=_convert,
        model=model,
    )


def _mobilenetv2_rules() -> tuple[Rule, ...]:
    def block(match: re.Match[str]) -> str:
        return f"backbone.blocks.{match['block'] or 0}"

    scope = "MobilenetV2/"
    unit = scope + r"expanded_conv(?:_(?P<block>\d+))?/"
    return (
        *_layer(scope + "Conv", _named("backbone.stem")),
        *_layer(scope + "Conv_1", _named("backbone.last")),
        *_layer(unit + "expand", lambda match: f"{block(match)}.expand"),
        *_layer(unit + "depthwise", lambda match: f"{block(match)}.separable", _HALVES[0]),
        *_layer(unit + "project", lambda match: f"{block(match)}.separable", _HALVES[1]),
        (scope + r"Logits/.*", None),
    )


def _mobilenetv2(*, classification: bool) -> Layout:
    def model(state: State) -> tuple[str, dict[str, Any]]:
        return "deeplabv3_mobilenetv2", {"variant": "official"}

    return Layout(
        origin="tensorflow",
        network="MobileNetV2 (classification)" if classification else "DeepLab v3 with MobileNetV2",
        marks=("MobilenetV2/Conv/weights", "logits/semantic/weights")[: 1 if classification else 2],
        rules=(*_mobilenetv2_rules(), *(() if classification else _HEADS)),
        norm_eps={"backbone.": 1e-3} if classification else {"": 1e-5, "backbone.": 1e-3},
        prefix="backbone." if classification else "",
        optional=r"backbone\.last\..+",
        select=_select,
        convert=_convert,
        model=model,
    )


def _resnet_rules() -> tuple[Rule, ...]:
    """The "beta" variant: three 3x3 convolutions as the root."""

    def unit(match: re.Match[str]) -> str:
        return f"backbone.layer{match['block']}.{int(match['unit']) - 1}"

    scope = r"resnet_v1_\d+/"
    bottleneck = scope + r"block(?P<block>\d)/unit_(?P<unit>\d+)/bottleneck_v1/"
    return (
        *_layer(scope + "conv1_1", _named("backbone.conv1"), ("0", "1")),
        *_layer(scope + "conv1_2", _named("backbone.conv1"), ("3", "4")),
        *_layer(scope + "conv1_3", _named("backbone"), ("conv1.6", "bn1")),
        *(rule for i in (1, 2, 3) for rule in _layer(f"{bottleneck}conv{i}", unit, (f"conv{i}", f"bn{i}"))),
        *_layer(bottleneck + "shortcut", lambda match: f"{unit(match)}.downsample", ("0", "1")),
        (scope + r"logits/.*", None),
    )


def _resnet(depth: int) -> Layout:
    return Layout(
        origin="tensorflow",
        network=f"ResNet-{depth}, beta (classification)",
        marks=(rf"resnet_v1_{depth}/conv1_3/weights",),
        rules=_resnet_rules(),
        normalization=_SUBTRACTED_MEAN,
        norm_eps={"backbone.": 1e-5},
        prefix="backbone.",
        select=_select,
        convert=_convert,
        model=lambda state: (f"deeplabv3_resnet{depth}", {"variant": "official"}),
    )


LAYOUTS = (
    *(
        _xception(*variant, classification=classification)
        for classification in (False, True)
        for variant in ((41, 3, 8), (65, 3, 16), (71, 5, 16))
    ),
    _mobilenetv2(classification=False),
    _mobilenetv2(classification=True),
    _resnet(50),
    _resnet(101),
)
