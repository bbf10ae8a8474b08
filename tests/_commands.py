"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from _processes import run_python

from deeplab_kernels.models import build
from deeplab_kernels.models.data import CLASS_NAMES, PALETTE
from deeplab_kernels.models.weights import save_weights_file

SMALL = "deeplabv3plus_small"


def small_weights(folder: Path) -> str:
    """A weights file of :data:`SMALL` for the classes of the generated dataset, all of which come out."""
    torch.manual_seed(0)
    model = build(SMALL, num_classes=len(CLASS_NAMES))
    with torch.no_grad():
        model.classifier.weight.normal_()
    path = folder / "weights.pt"
    save_weights_file(path, model, name=SMALL, class_names=CLASS_NAMES, palette=PALETTE, notes={"steps": 0})
    return str(path)


def check_refusals(
    command: Callable[..., int],
    cases: Iterable[tuple[Sequence[object], str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``command(*arguments)`` of each (arguments, message) is wrong use: the message in one line of stderr."""
    for arguments, message in cases:
        assert command(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1, arguments


def check_not_imported(code: str, modules: Sequence[str]) -> None:
    """None of ``modules`` is imported by ``code``, in an interpreter of its own."""
    code = f"{code}; import sys; print([name for name in {tuple(modules)} if name in sys.modules])"
    assert run_python(code).strip() == "[]"
