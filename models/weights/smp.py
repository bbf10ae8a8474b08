"""segmentation_models_pytorch: DeepLabV3, DeepLabV3Plus, PSPNet and Unet on encoders that exist here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..system import IMAGENET
from .layout import Layout, Rule, State, conv_norm, pooled_last, resnet_name
from .torchvision import EPS, RESNET, aspp_rules, mobilenetv2_rules

_ENCODER: tuple[Rule, ...] = ((rf"encoder\.{RESNET}", r"backbone.\1"), *mobilenetv2_rules("encoder."))
_CLASSIFIER: Rule = (r"segmentation_head\.0\.(\w+)", r"classifier.\1")
_OF_IMAGES: Rule = (r"classification_head\..+", None)


def _encoder_name(state: State) -> str:
    if "encoder.layer1.0.conv1.weight" in state:
        return resnet_name(state, "encoder.")
    return "mobilenetv2" if "encoder.features.1.conv.0.0.weight" in state else "an encoder that is not here"


def _separable(pattern: str, target: str, norm: str) -> tuple[Rule, ...]:
    """Depthwise and pointwise convolution at ``pattern``.0 and .1, one normalisation at ``norm``."""
    return (
        (rf"{pattern}\.0\.(weight)", rf"{target}.depthwise.\1"),
        (rf"{pattern}\.1\.(weight)", rf"{target}.pointwise.\1"),
        (rf"{norm}\.(\w+)", rf"{target}.pointwise_norm.\1"),
    )


def _layout(network: str, marks: tuple[str, ...], rules: tuple[Rule, ...], system: str, **options: Any) -> Layout:
    def model(state: State) -> tuple[str, dict[str, Any]]:
        return f"{system}_{_encoder_name(state)}", options

    return Layout(
        origin="smp",
        network=network,
        marks=(r"encoder\..+", r"segmentation_head\.0\.weight", *marks),
        rules=(*_ENCODER, *rules, _CLASSIFIER, _OF_IMAGES),
        normalization=IMAGENET,
        norm_eps={"": EPS},
        convert=pooled_last,
        free=r"aspp\..*",
        model=model,
    )


def _pooled_branch(match: re.Match[str]) -> str:
    # The first has no normalisation but a bias.
    index, part, leaf = match.groups()
    if index == "0":
        return f"pyramid_pooling.branches.0.{part}.{leaf}"
    return f"pyramid_pooling.branches.{index}.{'conv' if part == '0' else 'norm'}.{leaf}"


def _double_conv(match: re.Match[str]) -> str:
    # (conv1, conv2) x (convolution, normalisation) -> a Sequential with ReLU between.
    return f"decoder.{match[1]}.{3 * (int(match[2]) - 1) + int(match[3])}.{match[4]}"


def _pspnet_options(state: State) -> dict[str, Any]:
    from ..pspnet import SMP_OPTIONS

    options = dict(SMP_OPTIONS)
    # The encoder's depth shows in the width of what is pooled: 512 channels at stride 8, 1024 at 16, 2048 at 32.
    stride = {512: 8, 1024: 16, 2048: 32}.get(state["decoder.conv.0.weight"].shape[1] // 2, 8)
    return {**options, "feature_stride": stride, "output_stride": max(8, stride)}


_PSPNET = _layout(
    "PSPNet",
    (r"decoder\.psp\.blocks\.0\.pool\.1\.0\.weight",),
    (
        (r"decoder\.psp\.blocks\.(\d)\.pool\.1\.([01])\.(\w+)", _pooled_branch),
        *conv_norm(r"decoder\.conv", "project"),
    ),
    "pspnet",
)

LAYOUTS = (
    _layout(
        "DeepLabV3Plus",
        (r"decoder\.aspp\.0\.convs\.0\.0\.weight", r"decoder\.block2\.0\.0\.weight"),
        (
            *aspp_rules(r"decoder\.aspp\.0\.", separable=True),
            *_separable(r"decoder\.aspp\.1", "refine", r"decoder\.aspp\.2"),
            *conv_norm(r"decoder\.block1", "decoder.reduce"),
            *_separable(r"decoder\.block2\.0", "decoder.convs.0", r"decoder\.block2\.1"),
        ),
        "deeplabv3plus",
        variant="smp",
    ),
    _layout(
        "DeepLabV3",
        (r"decoder\.aspp\.convs\.0\.0\.weight", r"decoder\.bn\.weight"),
        (
            *aspp_rules(r"decoder\.aspp\."),
            (r"decoder\.conv\.(\w+)", r"refine.conv.\1"),
            (r"decoder\.bn\.(\w+)", r"refine.norm.\1"),
        ),
        "deeplabv3",
        variant="smp",
    ),
    replace(_PSPNET, model=lambda state: (f"pspnet_{_encoder_name(state)}", _pspnet_options(state))),
    _layout(
        "Unet",
        (r"decoder\.blocks\.0\.conv1\.0\.weight",),
        ((r"decoder\.blocks\.(\d)\.conv([12])\.([01])\.(\w+)", _double_conv),),
        "unet",
    ),
)
