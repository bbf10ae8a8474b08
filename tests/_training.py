"""Runs of the command train on a few drawn scenes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deeplab_kernels import cli

TINY = {
    "data": "generated:length=4,size=40",
    "crop": 33,
    "batch_size": 2,
    "learning_rate": 0.02,
    "steps": 3,
    "workers": 0,
    "device": "cpu",
}


def flags(output: Path, **changes: Any) -> list[str]:
    values = {**TINY, "output": output, **changes}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None)]


def fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
