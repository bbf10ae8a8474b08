"""Builders of the systems: a network's class on a backbone, with the arrangements that several sources have of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .backbones import Backbone
from .system import SegmentationModel

Variants = Mapping[str, Mapping[str, Any]]
PAPER = "paper"


def on_backbone(
    system: Callable[..., SegmentationModel], backbone: Callable[..., Backbone], variants: Variants | None = None
) -> Callable[..., SegmentationModel]:
    """A function (num_classes, output_stride, *, variant, options) -> model, for a system's ``BUILDERS``.

    Its options are the keyword-only parameters of ``system`` and of ``backbone``; one that both have goes to both. Its
    signature lists them all.

    Args:
        system: (backbone, num_classes, *, options) -> model.
        backbone: (*, output_stride, options) -> backbone.
        variants: name -> options that differ from the parameters' own defaults; ``output_stride`` may be among them
            (else 16). The first is the default; options that are given override those of the variant.

    Raises (of the function):
        ValueError: no such variant, or what ``system`` and ``backbone`` raise.
    """
    variants = variants or {PAPER: {}}
    of_system, of_backbone = (_keyword_only(function) for function in (system, backbone))
    of_backbone.pop("output_stride", None)

    def build(
        num_classes: int = 21, output_stride: int | None = None, *, variant: str = next(iter(variants)), **options: Any
    ) -> SegmentationModel:
        if variant not in variants:
            raise ValueError(f"variant must be {' or '.join(map(repr, variants))}, got {variant!r}")
        chosen = {"output_stride": 16, **variants[variant], **options}
        if output_stride is not None:
            chosen["output_stride"] = output_stride
        stride = chosen.pop("output_stride")
        extractor = backbone(output_stride=stride, **{k: v for k, v in chosen.items() if k in of_backbone})
        return system(extractor, num_classes, **{k: v for k, v in chosen.items() if k in of_system})

    own = inspect.signature(build).parameters
    parameters = {**{k: own[k] for k in ("num_classes", "output_stride")}, **of_system, **of_backbone}
    parameters["variant"] = own["variant"]
    build.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    build.__doc__ = f"Builds {getattr(system, '__name__', system)}; options are those of it and of its backbone."
    return build


def _keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
