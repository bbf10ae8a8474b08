"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deeplab_kernels.errors import UserError

from ..weights.file import read_pickle, write_whole
from .distributed import rank_and_size
from .trainer import Trainer

_FORMAT = "deeplab_kernels checkpoint"
_FORMAT_VERSION = 1


def write_checkpoint(path: Path, trainer: Trainer, *, classes: int, best: dict[str, Any] | None) -> None:
    """Writes the state of ``trainer``, and the best validation so far.

    Raises:
        OSError: it cannot be written whole (a full disk); the file that was there before is still there.
    """
    content = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "classes": classes,
        "processes": rank_and_size()[1],
        "best": best,
        "trainer": trainer.state_dict(),
    }
    write_whole(path, content)


def read_checkpoint(path: Path, classes: int) -> dict[str, Any]:
    """What :func:`write_checkpoint` wrote; tensors on the CPU.

    Raises:
        UserError: the file is damaged or something else, or of a run with other numbers of classes or processes.
        OSError: there is no such file.
    """
    try:
        content = read_pickle(path)
    except UserError as error:
        raise UserError(str(error).replace("weights file", "checkpoint")) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{path}: not a checkpoint of a training run")
    if content.get("version") != _FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint of version {content.get('version')}; this package reads {_FORMAT_VERSION}")
    if content["classes"] != classes:
        raise UserError(f"{path}: of a model with {content['classes']} classes, but the dataset has {classes}")
    if content["processes"] != rank_and_size()[1]:
        raise UserError(f"{path}: of a run in {content['processes']} processes, but this one has {rank_and_size()[1]}")
    return content


def restore(path: Path, content: dict[str, Any], trainer: Trainer) -> None:
    """Puts ``trainer`` into the state of a checkpoint.

    Raises:
        UserError: it does not fit the model.
    """
    try:
        trainer.load_state_dict(content["trainer"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: the checkpoint does not fit the model ({reason})") from None
