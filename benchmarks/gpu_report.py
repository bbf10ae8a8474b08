"""What the steps of gpu_suite.py share: results on disk after every step, and the command line of a step."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Results so far, on disk after every step."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.data: dict[str, Any] = {"steps": []}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def flush(self) -> None:
        self.data["elapsed_s"] = round(time.monotonic() - self.start, 1)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)

    def step(self, name: str, **result: Any) -> None:
        self.data["steps"].append({"step": name, **result})
        print(f"[{time.monotonic() - self.start:6.1f} s] {name}: {json.dumps(result)[:400]}", flush=True)
        self.flush()


def step_main(description: str | None, measure: Callable[[Report, bool], None]) -> None:
    """Runs ``measure(report, rehearse)`` as a process of its own, so that an error of the device ends nothing else."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="stop in good order before this many (default: 120)")
    parser.add_argument("--rehearse", action="store_true", help="tiny and on the CPU")
    arguments = parser.parse_args()
    report = Report(arguments.output, arguments.seconds)
    measure(report, arguments.rehearse)
    report.flush()
