"""torchvision's networks."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..backbones.vgg import classifier_convolutions
from ..system import IMAGENET
from .layout import Layout, Rule, State, conv_norm, pooled_last, resnet_name

EPS = 1e-5
# A ResNet has torchvision's names here; so it has in timm and segmentation_models_pytorch.
RESNET = r"((?:conv1|bn1|layer[1-4])\..+)"
AUXILIARY = r"aux_classifier\..+"
_SEPARABLE = ("depthwise", "depthwise_norm", "pointwise", "pointwise_norm")


def aspp_rules(prefix: str, *, separable: bool = False) -> tuple[Rule, ...]:
    """Rules of an ASPP whose list ``convs`` has the 1x1 convolution, the atrous ones, and the image pooling."""

    def branch(match: re.Match[str]) -> str:
        return f"aspp.atrous.{int(match[1]) - 1}"

    atrous: tuple[Rule, ...] = (
        (rf"{prefix}convs\.([1-3])\.0\.(weight)", lambda m: f"{branch(m)}.conv.{m[2]}"),
        (rf"{prefix}convs\.([1-3])\.1\.(\w+)", lambda m: f"{branch(m)}.norm.{m[2]}"),
    )
    if separable:
        atrous = (
            (rf"{prefix}convs\.([1-3])\.0\.0\.(weight)", lambda m: f"{branch(m)}.depthwise.{m[2]}"),
            (rf"{prefix}convs\.([1-3])\.0\.1\.(weight)", lambda m: f"{branch(m)}.pointwise.{m[2]}"),
            (rf"{prefix}convs\.([1-3])\.1\.(\w+)", lambda m: f"{branch(m)}.pointwise_norm.{m[2]}"),
        )
    return (
        *conv_norm(rf"{prefix}convs\.0", "aspp.pointwise"),
        *atrous,
        *conv_norm(rf"{prefix}convs\.4", "aspp.pooling", 1),
        *conv_norm(rf"{prefix}project", "aspp.project"),
    )


def mobilenetv2_rules(prefix: str = "") -> tuple[Rule, ...]:
    """``features`` is the stem, the blocks, and the last 1x1 convolution; the first block's list ``conv`` has no
    expansion."""

    def half(match: re.Match[str]) -> str:
        """depthwise, pointwise or one of their normalisations of the block."""
        positions = ("0.0", "0.1", "1", "2") if match[1] == "1" else ("1.0", "1.1", "2", "3")
        part = _SEPARABLE[positions.index(match[2])]
        return f"backbone.blocks.{int(match[1]) - 1}.separable.{part}.{match[3]}"

    head = re.escape(prefix)
    block = rf"{head}features\.(\d+)\.conv\."

    def expand(part: str) -> Rule:
        index = {"conv": 0, "norm": 1}[part]
        return rf"{block}0\.{index}\.(\w+)", lambda m: f"backbone.blocks.{int(m[1]) - 1}.expand.{part}.{m[2]}"

    return (
        *conv_norm(rf"{head}features\.0", "backbone.stem"),
        *conv_norm(rf"{head}features\.18", "backbone.last"),
        (rf"{head}features\.(1)\.conv\.(0\.0|0\.1|1|2)\.(\w+)", half),
        expand("conv"),
        expand("norm"),
        (rf"{block}(1\.0|1\.1|2|3)\.(\w+)", half),
    )


def _fully_connected(model: nn.Module, state: State) -> dict[str, tuple[str, Tensor]]:
    """fc6 and fc7 of VGG's classifier, for each place of ``model`` that has them as convolutions: our name -> (theirs,
    tensor)."""
    found: dict[str, tuple[str, Tensor]] = {}
    if "classifier.3.weight" not in state:
        return found
    for name, module in model.named_modules():
        fc6 = getattr(module, "fc6", None)
        if isinstance(fc6, nn.Conv2d):
            weights = classifier_convolutions(state, fc6.out_channels, fc6.kernel_size[0])
            for part, tensor in weights.items():
                theirs = f"classifier.{3 * (int(part[2]) - 6)}.{part.partition('.')[2]}"
                found[f"{name}.{part}"] = theirs, tensor
    return found


LAYOUTS = (
    Layout(
        origin="torchvision",
        network="DeepLab v3 with a ResNet",
        marks=(r"backbone\.layer1\.0\.conv1\.weight", r"classifier\.0\.convs\.0\.0\.weight"),
        rules=(
            (rf"backbone\.{RESNET}", r"backbone.\1"),
            *aspp_rules(r"classifier\.0\."),
            *conv_norm("classifier", "refine", 1),
            (r"classifier\.4\.(\w+)", r"classifier.\1"),
            (r"(aux_classifier\.\d\.\w+)", r"\1"),
        ),
        normalization=IMAGENET,
        norm_eps={"": EPS},
        optional=AUXILIARY,
        convert=pooled_last,
        model=lambda state: (f"deeplabv3_{resnet_name(state, 'backbone.')}", {"variant": "torchvision"}),
    ),
    Layout(
        origin="torchvision",
        network="FCN with a ResNet",
        marks=(r"backbone\.layer1\.0\.conv1\.weight", r"classifier\.0\.weight", r"classifier\.4\.weight"),
        rules=(
            (rf"backbone\.{RESNET}", r"backbone.\1"),
            (r"((?:aux_)?classifier\.\d\.\w+)", r"\1"),
        ),
        normalization=IMAGENET,
        norm_eps={"": EPS},
        optional=AUXILIARY,
        classifier="classifier.4",
        model=lambda state: (f"fcn_{resnet_name(state, 'backbone.')}", {"output_stride": 8}),
    ),
    Layout(
        origin="torchvision",
        network="VGG-16 (classification)",
        marks=(r"features\.0\.weight", r"features\.(28|40)\.weight"),  # plain, with batch normalisation
        rules=(
            (r"(features\.\d+\.\w+)", r"backbone.\1"),
            (r"classifier\.\d\.\w+", None),
        ),
        normalization=IMAGENET,
        prefix="backbone.",
        fit=_fully_connected,
        model=lambda state: ("deeplabv1_vgg16" + ("_bn" if "features.40.weight" in state else ""), {}),
    ),
    Layout(
        origin="torchvision",
        network="MobileNetV2 (classification)",
        marks=(r"features\.0\.0\.weight", r"features\.1\.conv\.0\.0\.weight", r"features\.18\.0\.weight"),
        rules=(*mobilenetv2_rules(), (r"classifier\.1\.\w+", None)),
        normalization=IMAGENET,
        norm_eps={"backbone.": EPS},
        prefix="backbone.",
        optional=r"backbone\.last\..+",
        model=lambda state: ("deeplabv3plus_mobilenetv2", {}),
    ),
    Layout(
        origin="torchvision",
        network="ResNet (classification)",
        marks=(r"conv1\.(0\.)?weight", r"layer1\.0\.conv1\.weight", r"layer4\..*"),
        rules=((RESNET, r"backbone.\1"), (r"fc\.\w+", None)),
        normalization=IMAGENET,
        norm_eps={"backbone.": EPS},
        prefix="backbone.",
        model=lambda state: (f"deeplabv3_{resnet_name(state)}", {"variant": "torchvision"}),
    ),
)
__all__ = ["AUXILIARY", "EPS", "LAYOUTS", "RESNET", "aspp_rules", "mobilenetv2_rules"]
