"""Which benchmark files the suite runs, with which options, and about how long they take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SUBJECTS = ("models", "separable", "depthwise", "crf", "filters")


@dataclass(frozen=True)
class Plan:
    """Options of one run of a file. seconds: an estimate for 4 cores; cases: records that it writes."""

    seconds: float
    cases: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One benchmark file. results: the file that it writes; quick: None where --quick leaves it out."""

    subject: str
    script: str
    results: str
    full: Plan
    quick: Plan | None = None
    # The last argument before the path, of files that write only where they are told when --quick or a choice of
    # cases is given.
    path_option: tuple[str, ...] = field(default=())

    def plan(self, quick: bool) -> Plan | None:
        return self.quick if quick else self.full

    def arguments(self, quick: bool, folder: Path) -> list[str]:
        plan = self.plan(quick)
        assert plan is not None
        path = [*self.path_option, str(folder / self.results)] if self.path_option else []
        return [self.script, *plan.options, *path]


# The most telling first: a run may be cut.
JOBS = (
    Job(
        "models",
        "bench_models.py",
        "models.json",
        Plan(900, 8, ("--table-5",)),
        Plan(45, 1, ("--cases", "inference16", "--seconds", "4", "--no-memory", "--compile-layouts")),
    ),
    Job(
        "separable",
        "bench_atrous_separable.py",
        "atrous_separable.json",
        Plan(240, 29, ("--output-stride-8",)),
        Plan(25, 4, ("--quick", "--rounds", "5", "--seconds", "0.5")),
    ),
    Job(
        "depthwise",
        "bench_atrous_depthwise.py",
        "atrous_depthwise.json",
        Plan(2400, 108),
        Plan(45, 8, ("--quick", "--shapes", "M8,A12,A24,D304")),
        path_option=("--json",),
    ),
    Job(
        "crf",
        "bench_dense_crf.py",
        "dense_crf.json",
        Plan(300, 4),
        Plan(15, 1, ("--quick", "--cases", "80/13 + 3")),
        path_option=("--json",),
    ),
    Job("crf", "bench_dense_crf_layer.py", "dense_crf_layer.json", Plan(120, 8)),
    Job(
        "filters",
        "bench_gaussian_filter.py",
        "gaussian_filter.json",
        Plan(300, 14),
        Plan(25, 7, ("--quick", "--rounds", "3")),
    ),
)


def jobs(only: list[str] | None, quick: bool) -> list[Job]:
    """The jobs of the subjects named, or of all."""
    return [job for job in JOBS if job.plan(quick) and (not only or job.subject in only)]
