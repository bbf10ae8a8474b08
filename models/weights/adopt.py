"""The model that fits weights of another library, built and filled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deeplab_kernels.errors import UserError

from ..registry import build, list_models
from ..system import SegmentationModel
from .load import LoadReport, layout_of, load_state
from .sources import Loaded, read_source


class Adopted(NamedTuple):
    """A model with weights, and what :func:`deeplab_kernels.models.weights.save_weights_file` wants to know of it.
    content: of this package's own weights file, where the weights come from one."""

    model: SegmentationModel
    name: str
    options: dict[str, Any]
    report: LoadReport
    content: dict[str, Any] | None


def check_complete(adopted: Adopted) -> None:
    """Raises UserError where the weights left a part of the model at random: those of a backbone."""
    if missing := adopted.report.missing:
        parts = ", ".join(sorted({name.partition(".")[0] for name in missing}))
        raise UserError(f"{adopted.report.source}: has no weights of {adopted.name}'s {parts}: train it first")


def class_names_of(
    adopted: Adopted, given: str | os.PathLike[str] | Sequence[str] = ""
) -> tuple[tuple[str, ...], Sequence[Sequence[int]]]:
    """Names and colours of the model's classes: those given (see ``data.classes.named_classes``), else those that the
    package's own weights file holds, else "class 0", "class 1" ..."""
    from ..data.classes import named_classes

    if given:
        return named_classes(given)
    content, number = adopted.content, adopted.model.num_classes
    if content is not None and len(content["class_names"]) == number:
        return tuple(content["class_names"]), content["palette"]
    return named_classes([f"class {i}" for i in range(number)])


def adopt(
    source: str | os.PathLike[str] | Mapping[str, Any],
    name: str | None = None,
    num_classes: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    origin: str | None = None,
    skip_classifier: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sha256: str | None = None,
) -> Adopted:
    """Builds the model that computes what the library's own does, and loads the weights into it.

    Args:
        source, origin, skip_classifier, cache, progress, sha256: as of :func:`deeplab_kernels.models.load_weights`.
        name: of another model, one of :func:`deeplab_kernels.models.list_models`.
        num_classes: by default that of the weights.
        options: of the model's builder; they replace those that the weights suggest.

    Raises:
        UserError: the weights do not tell their model or their number of classes and neither do the arguments; see also
            :func:`deeplab_kernels.models.load_weights`.
    """
    loaded = read_source(source, cache=cache, progress=progress, sha256=sha256)
    suggested, suggested_options, classes = _suggestion(loaded, origin)
    if name is None:
        if suggested is None:
            raise UserError(f"{loaded.where}: its names do not tell the model; give it (--model)")
        if suggested not in list_models():
            raise UserError(f"{loaded.where}: these are weights of {suggested}, which does not exist here")
        name = suggested
    num_classes = num_classes if num_classes is not None else classes
    if num_classes is None:
        raise UserError(f"{loaded.where}: weights of a backbone have no number of classes; give it (--num-classes)")
    chosen = {**(suggested_options if name == suggested else {}), **(options or {})}
    try:
        model = build(name, num_classes, **chosen)
    except TypeError as error:  # an option that the model does not have
        raise UserError(str(error)) from None
    report = load_state(model, loaded, origin=origin, skip_classifier=skip_classifier)
    return Adopted(model, name, chosen, report, loaded.content)


def _suggestion(loaded: Loaded, origin: str | None) -> tuple[str | None, dict[str, Any], int | None]:
    """The name and options of the model that fits, and the number of classes, as far as the weights tell them."""
    if loaded.content is not None:
        return loaded.content["model"], loaded.content["options"], len(loaded.content["class_names"])
    layout = layout_of(loaded, origin)
    if layout is None:
        bias = loaded.state.get("classifier.bias")
        return None, {}, None if bias is None else len(bias)
    name, options = layout.model(loaded.state) if layout.model is not None else (None, {})
    return name, options, layout.classes(loaded.state)
