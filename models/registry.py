"""Models by name."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import deeplabv1, deeplabv2, deeplabv3, deeplabv3plus, fcn, hypercolumn, pspnet, unet
from .crf_stage import with_crf
from .system import SegmentationModel

# One file per system; each has its builders by name.
_SYSTEMS = (deeplabv1, deeplabv2, deeplabv3, deeplabv3plus, fcn, hypercolumn, pspnet, unet)
_BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    name: builder for system in _SYSTEMS for name, builder in system.BUILDERS.items()
}


def list_models() -> list[str]:
    """The names that :func:`build` takes, sorted."""
    return sorted(_BUILDERS)


def checked_name(name: str, argument: str = "name") -> str:
    """``name``, one of :func:`list_models`.

    Raises:
        ValueError: it is none of them; the message calls it ``argument``, and gives close ones.
    """
    if isinstance(name, str) and name in _BUILDERS:
        return name
    close = difflib.get_close_matches(str(name), _BUILDERS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(list_models())}"
    raise ValueError(f"{argument} must be the name of a model, got {name!r}; {hint}")


def build(
    name: str,
    num_classes: int = 21,
    output_stride: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SegmentationModel:
    """A freshly initialised model in training mode. forward: (N, 3, H, W) -> logits (N, num_classes, H, W).

    Args:
        name: one of :func:`list_models`.
        num_classes: channels of the logits.
        output_stride: 8, 16 or 32, where the model has it; ``model.set_output_stride`` changes it later. None is the
            model's own: 16 for v3 and v3+, else the papers'.
        device: where the parameters are created; "meta" takes no memory.
        dtype: floating point dtype of the parameters and buffers.
        options: keyword arguments of the system and its backbone, e.g. of
            :class:`deeplab_kernels.models.deeplabv3plus.DeepLabV3Plus` and
            :class:`deeplab_kernels.models.backbones.Xception`; and, for every model, ``crf``, the last stage:
            see :func:`deeplab_kernels.models.crf_stage.with_crf`.

    Raises:
        ValueError: unknown name (the message gives close ones), or a value that is not allowed.
        TypeError: an option that the model does not have, or a value of the wrong type.
    """
    builder = _BUILDERS[checked_name(name)]
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes must be an int, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    allowed = list(inspect.signature(builder).parameters)
    crf = options.pop("crf", False)
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(allowed)}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype}")
    with torch.device(device) if device is not None else contextlib.nullcontext():
        if output_stride is not None:
            options["output_stride"] = output_stride
        model = with_crf(builder(num_classes, **options), crf)
    return model.to(dtype) if dtype is not None else model
