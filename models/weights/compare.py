"""What a state_dict does not tell: whether two models with the same weights compute the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from ..registry import build, list_models
from ..system import SegmentationModel

# Of convolutions, poolings, separable blocks and whole models.
_GEOMETRY = ("stride", "dilation", "padding", "align_corners", "tf_padding", "interpolation")


def differences(
    model: SegmentationModel, name: str, options: Mapping[str, Any], prefix: str = "", free: str = ""
) -> list[str]:
    """Where ``model`` differs from ``build(name, **options)`` at the same output stride, in modules that both have.

    Args:
        prefix: of the modules to compare, such as "backbone.".
        free: regular expression of names of modules that are not compared.

    Returns:
        "attribute of module: value here, value there" for each difference; nothing for models of another kind.
    """
    if name not in list_models():
        return []
    other = build(name, model.num_classes, device="meta", **options)
    ours, theirs = (m.get_submodule(prefix.rstrip(".")) for m in (model, other))
    if type(ours) is not type(theirs):
        return []
    with contextlib.suppress(ValueError):
        other.set_output_stride(model.output_stride)
    others = dict(theirs.named_modules())
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for module_name, module in ours.named_modules(prefix=prefix.rstrip(".")):
        twin = others.get(module_name[len(prefix) :])
        if twin is None or (free and re.fullmatch(free, module_name)):
            continue
        for attribute in _GEOMETRY:
            values = getattr(module, attribute, None), getattr(twin, attribute, None)
            # A part that differs as the whole does is not named again.
            if values[0] != values[1] and found.get((module_name.rpartition(".")[0], attribute)) != values:
                found[module_name, attribute] = values
    return [
        f"{attribute}{f' of {module_name}' if module_name else ''}: {here}, {there}"
        for (module_name, attribute), (here, there) in found.items()
    ]
