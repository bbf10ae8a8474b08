"""timm's classification networks as backbones."""

from __future__ import annotations

import re
from dataclasses import replace

from ..system import IMAGENET, SYMMETRIC
from . import torchvision
from .layout import Layout, Rule, State, depth

_HALVES = {"conv_dw": "depthwise", "bn_dw": "depthwise_norm", "conv_pw": "pointwise", "bn_pw": "pointwise_norm"}


def _separable(match: re.Match[str]) -> str:
    return f"backbone.blocks.{match[1]}.convs.{int(match[2]) - 1}.{_HALVES[match[3]]}.{match[4]}"


def xception_rules(prefix: str = "", dot: str = r"\.") -> tuple[Rule, ...]:
    """``dot`` separates a list's name from the index: feature extraction writes an underscore."""
    head = re.escape(prefix)
    halves = "|".join(_HALVES)
    return (
        (rf"{head}stem{dot}(\d)\.conv\.(\w+)", r"backbone.stem.\1.conv.\2"),
        (rf"{head}stem{dot}(\d)\.bn\.(\w+)", r"backbone.stem.\1.norm.\2"),
        (rf"{head}blocks{dot}(\d+)\.shortcut\.conv\.(\w+)", r"backbone.blocks.\1.shortcut.conv.\2"),
        (rf"{head}blocks{dot}(\d+)\.shortcut\.bn\.(\w+)", r"backbone.blocks.\1.shortcut.norm.\2"),
        (rf"{head}blocks{dot}(\d+)\.stack\.conv(\d)\.({halves})\.(\w+)", _separable),
    )


def xception_name(state: State, prefix: str = "", dot: str = r"\.") -> str:
    blocks = depth(state, rf"{re.escape(prefix)}blocks{dot}(\d+)\.")
    return {13: "xception41", 21: "xception65", 23: "xception71"}.get(blocks, f"an Xception of {blocks} blocks")


_STAGES = (0, 1, 3, 6, 10, 13, 16)  # index of the first block of each stage of MobileNetV2
_EXPAND = {"conv_pw": "expand.conv", "bn1": "expand.norm"}
_AFTER_EXPAND = {"conv_dw": "depthwise", "bn2": "depthwise_norm", "conv_pwl": "pointwise", "bn3": "pointwise_norm"}
_FIRST = {"conv_dw": "depthwise", "bn1": "depthwise_norm", "conv_pw": "pointwise", "bn2": "pointwise_norm"}


def _inverted_residual(match: re.Match[str]) -> str:
    stage, block, part, leaf = int(match[1]), int(match[2]), match[3], match[4]
    if stage > 0 and part in _EXPAND:
        name = _EXPAND[part]
    else:
        name = f"separable.{(_AFTER_EXPAND if stage > 0 else _FIRST)[part]}"
    return f"backbone.blocks.{_STAGES[stage] + block}.{name}.{leaf}"


LAYOUTS = (
    Layout(
        origin="timm",
        network="MobileNetV2 (classification)",
        marks=(r"conv_stem\.weight", r"blocks\.1\.0\.conv_pwl\.weight", r"blocks\.6\.0\.bn3\.weight"),
        rules=(
            (r"conv_stem\.(\w+)", r"backbone.stem.conv.\1"),
            (r"bn1\.(\w+)", r"backbone.stem.norm.\1"),
            (r"blocks\.(0)\.(0)\.(conv_dw|bn1|conv_pw|bn2)\.(\w+)", _inverted_residual),
            (r"blocks\.([1-6])\.(\d)\.(conv_pw|bn1|conv_dw|bn2|conv_pwl|bn3)\.(\w+)", _inverted_residual),
            (r"conv_head\.(\w+)", r"backbone.last.conv.\1"),
            (r"bn2\.(\w+)", r"backbone.last.norm.\1"),
            (r"classifier\.\w+", None),
        ),
        normalization=IMAGENET,
        norm_eps={"backbone.": 1e-5},
        prefix="backbone.",
        optional=r"backbone\.last\..+",
        model=lambda state: ("deeplabv3plus_mobilenetv2", {}),
    ),
    Layout(
        origin="timm",
        network="Xception (classification)",
        marks=(r"stem\.0\.conv\.weight", r"blocks\.0\.stack\.conv1\.conv_dw\.weight"),
        rules=(*xception_rules(), (r"head\.fc\.\w+", None)),
        normalization=SYMMETRIC,
        norm_eps={"backbone.": 1e-3},
        prefix="backbone.",
        model=lambda state: (f"deeplabv3plus_{xception_name(state)}", {"multi_grid": (1, 1, 1)}),
    ),
    # timm's ResNets have torchvision's names.
    *(replace(layout, origin="timm") for layout in torchvision.LAYOUTS if layout.network.startswith("ResNet")),
)
