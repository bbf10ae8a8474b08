"""What a report is made of: one row for one contender at one case, bars that are missed, what was not measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars

Record = Mapping[str, Any]
_REDUCED = re.compile(r"float16|\b(bf16|fp16|tf32)\b")


@dataclass(frozen=True)
class Row:
    """One contender at one case. Times in ms; None where the results do not have it."""

    subject: str
    case: str
    mode: str
    contender: str
    ours: bool
    median_ms: float
    iqr_ms: float | None = None
    samples: int | None = None
    rival: str = ""  # the fastest alternative that this one is compared with
    rival_ms: float | None = None
    madds: int | None = None
    bytes: int | None = None  # that must be moved: inputs read once, results written once
    peak_bytes: int | None = None
    setting: str = ""  # allocator and threads, where a case was measured in several
    copy_gb_per_s: float | None = None
    gflop_per_s: float | None = None  # of the fastest matrix product
    with_gaps_ms: float | None = None  # on a GPU: of ordinary calls, where the median is of CUDA-graph replays
    network: str = ""  # whole networks: what the plot of latencies calls it
    statistics: Record = field(default_factory=dict, compare=False, hash=False)  # what Timing.summary gives

    @property
    def key(self) -> tuple[str, ...]:
        return self.subject, self.case, self.mode, self.contender, self.setting

    @property
    def full_precision(self) -> bool:
        return not _REDUCED.search(f"{self.case} {self.contender}")

    @property
    def ratio(self) -> float | None:
        return None if self.rival_ms is None else self.rival_ms / self.median_ms

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median; None of a single sample."""
        return None if self.iqr_ms is None or self.samples == 1 else self.iqr_ms / self.median_ms

    @property
    def achieved_gflop_per_s(self) -> float | None:
        return None if not self.madds else 2e-6 * self.madds / self.median_ms

    @property
    def bandwidth_share(self) -> float | None:
        if self.bytes is None or not self.copy_gb_per_s:
            return None
        return self.bytes / self.median_ms / 1e6 / self.copy_gb_per_s

    @property
    def matrix_share(self) -> float | None:
        achieved = self.achieved_gflop_per_s
        return None if achieved is None or not self.gflop_per_s else achieved / self.gflop_per_s


@dataclass(frozen=True)
class Missed:
    """A bar that is not reached."""

    subject: str
    case: str
    what: str
    source: str


@dataclass(frozen=True)
class Unavailable:
    """What was to be measured and could not be."""

    subject: str
    case: str
    mode: str
    contender: str
    reason: str


@dataclass
class Results:
    """What a folder of results, or one results file, holds."""

    source: Path
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    judged: list[tuple[str, str, bars.Bar]] = field(default_factory=list)  # subject, case, bar
    unavailable: list[Unavailable] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases that there was no time for
    provenance: list[dict[str, str]] = field(default_factory=list)  # one entry for each file

    @property
    def missed(self) -> list[Missed]:
        return [
            Missed(subject, case, f"{bar.layout}: {bar.shortfall}", bars.DEMANDS[bar.demand].source)
            for subject, case, bar in self.judged
            if not bar.passed
        ]

    @property
    def verdicts(self) -> list[bars.Verdict]:
        return bars.verdicts([(f"{case}, {bar.layout}", bar) for _, case, bar in self.judged])
