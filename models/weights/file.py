"""The package's own weights file: a model's name, its options, classes, input normalisation and tensors."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplab_kernels._files import written_whole
from deeplab_kernels.errors import UserError

from ..registry import build
from ..system import SYMMETRIC, Normalization, SegmentationModel

_FORMAT = "deeplab_kernels weights"
_FORMAT_VERSION = 1


def save_weights_file(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    name: str,
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    options: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Writes what :func:`build_from_file` needs: tensors and plain values, nothing that runs code when loaded.

    ``model.normalization`` and the epsilons of the batch normalisations are stored, too: they differ by the origin of
    the weights.

    Args:
        name, options: ``build(name, num_classes=len(class_names), **options)`` made the model.
        palette: (red, green, blue) in 0..255 for each class.
        notes: plain values that are kept with the weights, such as how they were trained.

    Raises:
        OSError: the file cannot be written whole; what was there before is still there.
    """
    normalization = getattr(model, "normalization", SYMMETRIC)
    content = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "model": name,
        "options": dict(options or {}),
        "class_names": list(class_names),
        "palette": [[int(value) for value in colour] for colour in palette],
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "norm_eps": norm_eps(model),
        "notes": dict(notes or {}),
        "state_dict": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
    }
    write_whole(path, content)


def write_whole(path: str | os.PathLike[str], content: Any) -> None:
    """``torch.save`` that leaves either the new file, safely on the disk, or the old one.

    Raises:
        OSError: no room, no permission.
    """
    try:
        with written_whole(path) as partial, partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # torch's zip writer, on its way out, hides why a write failed.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from None


def read_weights_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a weights file, checked; tensors on the CPU. Code inside a file is never run.

    Keys: model, options, class_names, palette, notes and state_dict as :func:`save_weights_file` got them,
    normalization as :class:`deeplab_kernels.models.system.Normalization` (SYMMETRIC for files without it), norm_eps as
    :func:`norm_eps` gives it.

    Raises:
        UserError: the file is damaged, holds something else, or holds code.
        OSError: there is no such file, or it may not be read.
    """
    return check_weights_file(read_pickle(path), os.fspath(path))


def check_weights_file(content: Any, where: str) -> dict[str, Any]:
    """:func:`read_weights_file` for what was already read from the file ``where``."""
    if not is_weights_file(content):
        raise UserError(f"{where}: not a weights file of this package (one is written by 'deeplab_kernels demo')")
    if content.get("version") != _FORMAT_VERSION:
        version = content.get("version")
        raise UserError(f"{where}: weights of format version {version}; this package reads {_FORMAT_VERSION}")
    kinds = {"model": str, "options": dict, "class_names": list, "palette": list, "state_dict": dict}
    names: Any = content.get("class_names")
    palette: Any = content.get("palette")
    sound = (
        all(isinstance(content.get(key), kind) for key, kind in kinds.items())
        and 0 < len(names) == len(palette) <= 256
        and all(isinstance(name, str) for name in names)
        and all(isinstance(c, list) and len(c) == 3 and all(v in range(256) for v in c) for c in palette)
    )
    if not sound:
        raise UserError(f"{where}: the weights file lacks its model, classes or palette")
    eps: Any = content.setdefault("norm_eps", {})
    if not isinstance(eps, dict) or not all(isinstance(v, float) and v > 0 for v in eps.values()):
        raise UserError(f"{where}: the weights file's epsilons are wrong")
    try:
        content["normalization"] = Normalization(**content.get("normalization", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the weights file's normalization is wrong ({error})") from None
    return content


def build_from_file(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[SegmentationModel, dict[str, Any]]:
    """The model that a weights file names, with its weights and normalisation, and the file's content.

    Raises:
        UserError: see :func:`read_weights_file`; or the weights do not fit the model.
    """
    content = read_weights_file(path)
    try:
        model = build(content["model"], num_classes=len(content["class_names"]), **content["options"])
        model.load_state_dict(content["state_dict"])
        set_norm_eps(model, content["norm_eps"])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{os.fspath(path)}: the weights do not fit {content['model']} ({reason[:200]})") from None
    model.normalization = content["normalization"]
    return model.to(device), content


def norm_eps(model: nn.Module) -> dict[str, float]:
    """The epsilon of every batch normalisation by the module's name."""
    return {name: float(module.eps) for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def set_norm_eps(model: nn.Module, eps: Mapping[str, float]) -> None:
    """Sets epsilons as :func:`norm_eps` gives them; a batch normalisation that is not named keeps its own.

    Raises:
        AttributeError: a name that is no batch normalisation of ``model``.
    """
    modules = dict(model.named_modules())
    for name, value in eps.items():
        module = modules.get(name)
        if not isinstance(module, _BatchNorm):
            raise AttributeError(f"no batch normalisation {name}")
        module.eps = value


def is_weights_file(content: object) -> bool:
    """Whether ``content``, as read from a file, calls itself the package's own format."""
    return isinstance(content, dict) and content.get("format") == _FORMAT


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU, unless it needs code to be run.

    Raises:
        UserError: damaged, something else, or with code in it.
        OSError: there is no such file, or it may not be read.
    """
    where = os.fspath(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what is wrong with the file; the error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{where}: not a weights file, or one with code in it, which is never run") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{where}: the weights file is damaged ({_first_line(error)})") from None
    except Exception as error:  # torch and pickle raise nearly anything on damaged files
        raise UserError(f"{where}: not a weights file, or a damaged one ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].split(". ")[0][:160]
