"""Loads weights of other libraries into the networks here."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deeplab_kernels.errors import UserError

from ..crf_stage import DenseCRFStage
from ..system import Normalization, SegmentationModel
from . import huggingface, smp, tensorflow, timm, torchvision
from .compare import differences
from .file import norm_eps, set_norm_eps
from .layout import Layout, State, Translation, find
from .sources import Loaded, read_source

OWN = "deeplab_kernels"
LAYOUTS: tuple[Layout, ...] = tuple(
    layout for library in (tensorflow, huggingface, smp, torchvision, timm) for layout in library.LAYOUTS
)
_SHOWN = 20  # names in an error message
# What depends on the number of classes in the networks here.
_LAST = re.compile(
    r"(model\.)?((aux_)?classifier(\.4)?|head\.(classifier|fc8|branches\.\d+(\.fc8)?)|(skips|deconvolutions)\.\d+)\.(weight|bias)"
)
_COUNTER = "num_batches_tracked"  # torch counts batches for momentum=None only; other libraries do not


@dataclass
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        source: where the weights came from.
        origin: the library whose names they have, "deeplab_kernels" for this package's own.
        network: what they are weights of.
        matched: names that are the same here.
        renamed: our name -> theirs, for the others.
        missing: names of the model that were not given and keep their values.
        surplus: names that were given and not used though they might have been (with ``strict=False``).
        ignored: names that were given and have no place here: auxiliary heads, another classifier, optimiser slots.
        normalization: of the input, as the weights expect it; set on the model.
        differences: "attribute of module: value here, theirs", where the model does not compute what the library's own
            does with the same weights: other rates, strides or ways of resizing.
    """

    source: str
    origin: str
    network: str
    matched: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    normalization: Normalization | None = None
    differences: list[str] = field(default_factory=list)

    def untouched(self) -> list[str]:
        """The modules of which nothing was loaded, each named by the largest part that was left as it is."""
        touched = {prefix for name in (*self.matched, *self.renamed) for prefix in _prefixes(name)}
        return list(dict.fromkeys(next(p for p in (*_prefixes(n), n) if p not in touched) for n in self.missing))

    def __str__(self) -> str:
        counts = f"{len(self.matched) + len(self.renamed)} tensors loaded"
        for name in ("missing", "surplus", "ignored"):
            if values := getattr(self, name):
                counts += f", {len(values)} {name}"
        if self.differences:
            counts += f", {len(self.differences)} differences in what is computed"
        return f"{self.network} of {self.origin} ({self.source}): {counts}"


def load_weights(
    model: SegmentationModel,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    origin: str | None = None,
    strict: bool = True,
    skip_classifier: bool | None = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sha256: str | None = None,
) -> LoadReport:
    """Loads weights into ``model``, whatever library they come from; sets its normalisation and the epsilon of its
    batch normalisations to what they were trained with.

    Either everything fits, or an error is raised and the model is as before. Weights of a classification network go
    into the backbone; the rest of the model keeps its values. Weights of a whole network warn where the model fits but
    computes something else than the library's (:attr:`LoadReport.differences`).

    Args:
        model: built by :func:`deeplab_kernels.models.build`; not on the meta device.
        source: a name of :func:`known_weights`, a file (.pth, .pt, .safetensors, this package's own weights file, a
            TensorFlow checkpoint's prefix, folder or .tar.gz), an https URL, or a state_dict.
        origin: the library, where its names should not tell: one of :func:`origins`.
        strict: False takes what fits by name, and reports what is missing and surplus.
        skip_classifier: leave the last layer as it is, for another number of classes. None does so only where the
            weights have another number of classes, or no last layer.
        cache: folder of downloads; by default that of ``torch.hub``.
        progress: show a progress bar while downloading.
        sha256: of the file, or the beginning of it; it is checked.

    Raises:
        UserError: no such name, a damaged file, wrong checksum, code in a file, names or shapes that do not fit.
        ValueError: an argument that is not allowed.
        ImportError: a library that reads this kind of file is not installed; the message tells how to get it.
    """
    if origin is not None and origin not in origins():
        raise ValueError(f"origin must be one of {', '.join(origins())}, got {origin!r}")
    if any(t.is_meta for t in model.state_dict().values()):
        raise ValueError("model is on the meta device: build it on a real one, or call model.to_empty(device=...)")
    loaded = read_source(source, cache=cache, progress=progress, sha256=sha256)
    return load_state(model, loaded, origin=origin, strict=strict, skip_classifier=skip_classifier)


def _prefixes(name: str) -> list[str]:
    """The modules that a parameter lies in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def origins() -> list[str]:
    """The libraries whose names are known."""
    return sorted({OWN, *(layout.origin for layout in LAYOUTS)})


def load_state(
    model: SegmentationModel,
    loaded: Loaded,
    *,
    origin: str | None = None,
    strict: bool = True,
    skip_classifier: bool | None = False,
) -> LoadReport:
    """:func:`load_weights` for what was already read."""
    if isinstance(model, DenseCRFStage) and not any(name.startswith("crf.") for name in loaded.state):
        model = model.model  # other libraries' networks have no CRF
    expected = model.state_dict()
    layout = layout_of(loaded, origin, expected)
    if layout is None:
        translation = Translation(loaded.state, {name: name for name in loaded.state})
    else:
        translation = layout.translate(model, loaded.state)
    theirs = translation.theirs
    tensors = {name: tensor for name, tensor in translation.tensors.items() if name in expected}
    last = _last_layers(model, tensors, expected)
    may_lack_last = skip_classifier is not False
    if skip_classifier is None:
        skip_classifier = any(tensors[n].shape[:1] != expected[n].shape[:1] for n in last if n in tensors)
    skipped = [name for name in tensors if skip_classifier and name in last]
    for name in skipped:
        del tensors[name]
    report = _report(loaded, layout, translation, tensors, expected)
    report.ignored = [theirs[name] for name in skipped] + report.ignored
    if strict:
        prefix = layout.prefix if layout else ""
        _refuse(
            report, [n for n in report.missing if n.startswith(prefix) and not (may_lack_last and n in last)], model
        )
    _check_shapes(loaded.where, tensors, expected, theirs, last)
    if not tensors:
        raise UserError(f"{loaded.where}: none of its {len(loaded.state)} tensors belongs to {type(model).__name__}")
    model.load_state_dict(tensors, strict=False)
    report.normalization = loaded.normalization or (layout.normalization if layout else model.normalization)
    model.normalization = report.normalization
    set_norm_eps(model, _eps(model, layout) if layout else loaded.norm_eps)
    if layout is not None:
        _compare(model, layout, loaded, report)
    return report


def _last_layers(model: SegmentationModel, tensors: State, expected: Mapping[str, Tensor]) -> set[str]:
    """Names of what depends on the number of classes: the classifiers, and what has another size here."""
    names = {name for name in expected if _LAST.fullmatch(name)}
    for name, tensor in tensors.items():
        shape = expected[name].shape
        if tensor.shape != shape and shape[:1] == (model.num_classes,):
            names.add(name)
    return names


def _report(
    loaded: Loaded, layout: Layout | None, translation: Translation, tensors: State, expected: Mapping[str, Tensor]
) -> LoadReport:
    origin, network = (layout.origin, layout.network) if layout else (OWN, "weights")
    report = LoadReport(loaded.where, origin, network, ignored=translation.ignored, surplus=translation.unknown)
    for ours, theirs in translation.theirs.items():
        if ours not in expected and not ours.endswith(_COUNTER):
            optional = layout is not None and re.fullmatch(layout.optional, ours)
            (report.ignored if optional else report.surplus).append(theirs)
        elif ours in tensors and theirs == ours:
            report.matched.append(ours)
        elif ours in tensors:
            report.renamed[ours] = theirs
    report.missing = [name for name in expected if name not in tensors and not name.endswith(_COUNTER)]
    return report


def _compare(model: SegmentationModel, layout: Layout, loaded: Loaded, report: LoadReport) -> None:
    """Fills ``report.differences``, and warns of those of a whole network."""
    if layout.model is None:
        return
    name, options = layout.model(loaded.state)
    report.differences = differences(model, name, options, layout.prefix, layout.free)
    if report.differences and not layout.prefix:
        warnings.warn(
            f"{loaded.where}: the model does not compute what {layout.origin}'s does: {_listed(report.differences)}; "
            f"build(...) with {options} would",
            stacklevel=4,
        )


def layout_of(loaded: Loaded, origin: str | None, expected: Collection[str] = ()) -> Layout | None:
    """The layout of what was read; None for this package's own names, of which ``expected`` are some.

    Raises:
        UserError: the names are of no library that is known, or not of ``origin``.
    """
    if origin == OWN or (origin is None and loaded.own):
        return None
    candidates = [layout for layout in LAYOUTS if origin in (None, layout.origin)]
    layout = find(candidates, loaded.state)
    if layout is None and origin is None and (not expected or not loaded.state.keys().isdisjoint(expected)):
        return None
    if layout is None:
        names = _listed(sorted(loaded.state)[:5], len(loaded.state))
        of = f"names of {origin}" if origin else "names of any known library"
        raise UserError(f"{loaded.where}: it has no {of}, but {names}")
    return layout


def _refuse(report: LoadReport, lacking: list[str], model: nn.Module) -> None:
    """Raises UserError if names are missing or surplus."""
    problems = []
    if lacking:
        problems.append(f"missing: {_listed(lacking)}")
    if report.surplus:
        problems.append(f"surplus: {_listed(report.surplus)}")
    if problems:
        raise UserError(
            f"{report.source}: the weights ({report.network} of {report.origin}) do not fit {type(model).__name__}; "
            + "; ".join(problems)
            + " (strict=False takes what fits)"
        )


def _check_shapes(
    where: str,
    tensors: State,
    expected: Mapping[str, Tensor],
    theirs: Mapping[str, str],
    last: Collection[str],
) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if tensor.shape != expected[name].shape}
    if not wrong:
        return
    if set(wrong) <= set(last):
        given, wanted = (int(values[next(iter(wrong))].shape[0]) for values in (wrong, expected))
        if given != wanted:
            raise UserError(
                f"{where}: the weights are for {given} classes, the model has {wanted}; build it with "
                f"num_classes={given}, or take everything but the last layer (skip_classifier=True)"
            )
    lines = [
        f"{theirs[name]} {tuple(tensor.shape)} for {name} {tuple(expected[name].shape)}"
        for name, tensor in wrong.items()
    ]
    raise UserError(f"{where}: shapes differ: {_listed(lines)}")


def _listed(names: Iterable[str], total: int | None = None) -> str:
    names = list(names)
    total = len(names) if total is None else total
    shown = names[:_SHOWN]
    more = f" and {total - len(shown)} more" if total > len(shown) else ""
    return f"{', '.join(shown)}{more} ({total})" if total > 1 else shown[0] if shown else "none"


def _eps(model: nn.Module, layout: Layout) -> dict[str, float]:
    return {name: eps for name in norm_eps(model) if (eps := layout.eps_of(name)) is not None}
