"""timm's classification networks as backbones."""

from __future__ import annotations

import re

from ..system import IMAGENET, SYMMETRIC
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


LAYOUTS = (
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
)
__all__ = ["IMAGENET", "LAYOUTS", "xception_name", "xception_rules"]
