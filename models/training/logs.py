"""Logs of a run: a CSV file that survives interruptions, and TensorBoard's."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import TracebackType
from typing import Any

from deeplab_kernels._files import written_whole

COLUMNS = ("step", "learning_rate", "loss", "seconds", "mean_iou", "pixel_accuracy")


class Log:
    """Writes one row a step to ``folder``/log.csv, and the same to TensorBoard if asked for.

    Rows after ``step``, of a run that was continued from an earlier checkpoint, are removed.

    Raises:
        ImportError: tensorboardX is asked for and not installed.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        path = folder / "log.csv"
        rows = read_log(path, step) if step and path.exists() else []
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self._writer: Any = None
        if tensorboard:
            self._writer = _tensorboard().SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            start = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            start.writeheader()
            start.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        """``row``: by :data:`COLUMNS`; values that were not measured are left out."""
        self._csv.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path, step: int) -> list[dict[str, str]]:
    """The rows of a log up to ``step``; a last row that was not written whole is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return [row for row in rows if row.keys() == set(COLUMNS) and row["step"].isdecimal() and int(row["step"]) <= step]


def _tensorboard() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError:
        raise ImportError("a log for TensorBoard needs tensorboardX: pip install tensorboardX") from None
