"""transformers' MobileNetV2ForSemanticSegmentation."""

from __future__ import annotations

import re
from typing import Any

from .layout import Layout, Rule, State

_PARTS = {"convolution": "conv", "normalization": "norm"}
_HALVES = {
    ("conv_3x3", "convolution"): "depthwise",
    ("conv_3x3", "normalization"): "depthwise_norm",
    ("reduce_1x1", "convolution"): "pointwise",
    ("reduce_1x1", "normalization"): "pointwise_norm",
}
_PART = r"\.(convolution|normalization)\.(\w+)"


def _layer(scope: str, target: str) -> Rule:
    return scope + _PART, lambda match: f"{target}.{_PARTS[match[1]]}.{match[2]}"


def _half(match: re.Match[str]) -> str:
    # The stem holds the first block, which has no expansion.
    block = 0 if match["block"] is None else int(match["block"]) + 1
    *_, layer, part, leaf = match.groups()
    return f"backbone.blocks.{block}.separable.{_HALVES[layer, part]}.{leaf}"


def _model(state: State) -> tuple[str, dict[str, Any]]:
    return "deeplabv3_mobilenetv2", {"variant": "official"}


LAYOUTS = (
    Layout(
        origin="huggingface",
        network="DeepLab v3 with MobileNetV2",
        marks=(
            r"mobilenet_v2\.conv_stem\.first_conv\.convolution\.weight",
            r"segmentation_head\.classifier\.convolution\.weight",
        ),
        rules=(
            _layer(r"mobilenet_v2\.conv_stem\.first_conv", "backbone.stem"),
            (rf"mobilenet_v2\.(?:conv_stem|layer\.(?P<block>\d+))\.(conv_3x3|reduce_1x1){_PART}", _half),
            (
                rf"mobilenet_v2\.layer\.(\d+)\.expand_1x1{_PART}",
                lambda m: f"backbone.blocks.{int(m[1]) + 1}.expand.{_PARTS[m[2]]}.{m[3]}",
            ),
            _layer(r"mobilenet_v2\.conv_1x1", "backbone.last"),
            _layer(r"segmentation_head\.conv_pool", "aspp.pooling"),
            _layer(r"segmentation_head\.conv_aspp", "aspp.pointwise"),
            _layer(r"segmentation_head\.conv_projection", "aspp.project"),
            (r"segmentation_head\.classifier\.convolution\.(\w+)", r"classifier.\1"),
        ),
        norm_eps={"": 1e-5, "backbone.": 1e-3},
        optional=r"backbone\.last\..+",  # the segmentation network ends before it
        model=_model,
    ),
)
