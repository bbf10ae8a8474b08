"""What the operators are held to, computed from a record of measure.measure; no torch needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LAYOUTS = ("nchw", "nhwc")
LARGE = 64e6  # bytes of x from which a run is bound by memory


@dataclass(frozen=True)
class Bar:
    """One demand: ``value`` must be at least (or at most) ``limit``."""

    name: str
    layout: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def shortfall(self) -> str:
        return f"{self.name} {self.value:.2f} {'<' if self.at_least else '>'} {self.limit:g}"

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict} {self.layout} {self.name}: {self.value:.2f} {relation} {self.limit:g}"


def median(record: Mapping[str, Any], kind: str, dtype: str, layout: str) -> float | None:
    timing = record["timings"].get(f"{kind} {dtype} {layout}")
    return None if timing is None else timing["median_ms"]


def best_pytorch(record: Mapping[str, Any], dtype: str, layouts: Iterable[str]) -> tuple[float, str] | None:
    """(milliseconds, contender) of PyTorch's fastest."""
    found = [
        (ms, f"{kind} {layout}")
        for kind in ("eager", "compile", "frozen")
        for layout in layouts
        if (ms := median(record, kind, dtype, layout)) is not None
    ]
    return min(found, default=None)


def layouts_of(record: Mapping[str, Any]) -> list[str]:
    return [
        layout
        for layout in LAYOUTS
        if any(key.startswith("ours") and key.endswith(layout) for key in record["timings"])
    ]


def yardstick(record: Mapping[str, Any], dtype: str, layout: str) -> tuple[float, str] | None:
    """PyTorch's fastest that ours is compared with: of the same layout in inference, of both in training."""
    return best_pytorch(record, dtype, [layout] if record["mode"] == "inference" else LAYOUTS)


def bars(record: Mapping[str, Any], last_level_cache_bytes: int = 32 << 20) -> list[Bar]:
    """The demands on one record, for those contenders that were measured."""
    rate = record["convolution"]["rate"]
    found = []
    for layout in layouts_of(record):
        ours = median(record, "ours", "float32", layout)
        rival = yardstick(record, "float32", layout)
        clone = median(record, "clone", "float32", layout)
        if record["mode"] == "training":
            if ours is not None and rival is not None:
                found.append(Bar("training speed-up", layout, rival[0] / ours, 10 if rate >= 2 else 2, True))
            if "kept_bytes" in record:
                # Vectors of one number per channel are not of the activation's size: a hundredth is left for them.
                allowed = 1.01 * (record["input_bytes"] + record["output_bytes"])
                found.append(Bar("bytes kept / (x + out)", layout, record["kept_bytes"][layout] / allowed, 1, False))
            continue
        if ours is not None and rival is not None:
            found.append(Bar("speed-up", layout, rival[0] / ours, 8 if rate >= 6 else 1, True))
        if ours is not None and clone is not None:
            if record["input_bytes"] > LARGE:
                found.append(Bar("time / clone", layout, ours / clone, 1.5, False))
            elif record["input_bytes"] <= last_level_cache_bytes:
                found.append(Bar("time / clone", layout, ours / clone, 3, False))
        half = median(record, "ours", "bfloat16", layout)
        if ours is not None and half is not None:
            found.append(Bar("bf16 / fp32", layout, half / ours, 2, False))
    return found


def separable(record: Mapping[str, Any]) -> list[Bar]:
    """The demand on a record of bench_atrous_separable: one kernel against PyTorch's best, in the better layouts."""
    times = {name: timing["median_ms"] for name, timing in record["timings"].items()}
    ours = [ms for name, ms in times.items() if name.startswith("whole")]
    theirs = [ms for name, ms in times.items() if name.startswith(("eager", "compile"))]
    limit = 3 if record["name"].startswith("A") else 1.3  # the layers of the ASPP have names of their own
    return [Bar("speed-up", "best layout", min(theirs) / min(ours), limit, True)] if ours and theirs else []
