"""Which benchmark files the suite runs, with which options, and about how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import cases

SUBJECTS = (*cases.SUBJECTS, "crf", "filters")
QUICK_MINUTES, FULL_MINUTES = 2.4, 60.0
START_SECONDS = 12.0  # of the product's file: imports and the ceilings


@dataclass(frozen=True)
class Plan:
    """Options of one run of a file. seconds: an estimate for 4 cores; cases: records that it writes."""

    seconds: float
    cases: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One benchmark file. subjects: it runs if one of them is wanted; results: the file that it writes; quick: None
    where --quick leaves it out."""

    subjects: tuple[str, ...]
    script: str
    results: str
    full: Plan
    quick: Plan | None = None
    # The last argument before the path, of files that write only where they are told when --quick or a choice of
    # cases is given.
    path_option: tuple[str, ...] = ()
    # It takes --minutes and leaves out what does not fit; its plan's seconds are what the other files leave it.
    fills: bool = False

    def plan(self, quick: bool) -> Plan | None:
        return self.quick if quick else self.full

    def arguments(self, quick: bool, folder: Path, minutes: float = 0.0) -> list[str]:
        plan = self.plan(quick)
        assert plan is not None
        path = [*self.path_option, str(folder / self.results)] if self.path_option else []
        time = ["--minutes", f"{minutes:.3f}"] if self.fills else []
        return [self.script, *plan.options, *time, *path]


PYRAMID = Job(
    ("aspp",),
    "bench_atrous_spatial_pyramid.py",
    "atrous_spatial_pyramid.json",
    Plan(240, 21),
    Plan(12, 3, ("--quick", "--rounds", "3", "--seconds", "0.3")),
)
CRF = Job(
    ("crf",),
    "bench_dense_crf.py",
    "dense_crf.json",
    Plan(300, 4),
    Plan(15, 1, ("--quick", "--cases", "80/13 + 3")),
    path_option=("--json",),
)
CRF_LAYER = Job(("crf",), "bench_dense_crf_layer.py", "dense_crf_layer.json", Plan(120, 8))
FILTERS = Job(
    ("filters",),
    "bench_gaussian_filter.py",
    "gaussian_filter.json",
    Plan(300, 14),
    Plan(20, 7, ("--quick", "--rounds", "3")),
)


@dataclass(frozen=True)
class Wanted:
    """What the command's options choose."""

    subjects: Sequence[str] = SUBJECTS
    quick: bool = False
    minutes: float = FULL_MINUTES  # 0: no limit
    selection: cases.Selection = field(default_factory=cases.Selection)
    threads: int = 0
    device: str = "cpu"  # of the product: "cpu" or "cuda"

    @property
    def jobs(self) -> list[Job]:
        """The most telling first: a run may be cut."""
        others = [
            job
            for job in (CRF, CRF_LAYER, FILTERS, PYRAMID)
            if job.plan(self.quick) and set(job.subjects) & set(self.subjects)
        ]
        product = [subject for subject in cases.SUBJECTS if subject in self.subjects]
        return [*([self._product(product, others)] if product else []), *others]

    def _product(self, subjects: Sequence[str], others: Sequence[Job]) -> Job:
        chosen = self.selection
        options = ["--device", self.device, "--subjects", *subjects, *(["--quick"] if self.quick else [])]
        for name, values, every in (
            ("layers", chosen.what, None),
            ("modes", chosen.modes, cases.MODES),
            ("batch", chosen.batches, cases.BATCHES),
            ("dtypes", chosen.dtypes, cases.DTYPES),
            ("contenders", chosen.contenders, cases.CONTENDERS),
            ("layouts", chosen.layouts, cases.LAYOUTS),
        ):
            if values is not None and tuple(values) != every:
                options += [f"--{name}", *map(str, values)]
        if self.threads:
            options += ["--threads", str(self.threads)]
        estimates = self.estimates(subjects)
        plans = [job.plan(self.quick) for job in others]
        left = 60 * self.minutes - sum(plan.seconds for plan in plans if plan)
        seconds = min(max(left, 24 * self.minutes), START_SECONDS + sum(estimates)) if self.minutes else sum(estimates)
        plan = Plan(seconds, fitting(estimates, seconds - START_SECONDS), tuple(options))
        both = (plan, plan) if self.quick else (plan, None)
        return Job(tuple(subjects), "bench_contenders.py", "contenders.json", *both, fills=True)

    def estimates(self, subjects: Sequence[str]) -> list[float]:
        """Seconds of each case of the product."""
        chosen = replace(self.selection, subjects=tuple(subjects))
        tasks = cases.quick(chosen) if self.quick else cases.product(chosen, self.device)
        rounds, limit = (5, 0.3) if self.quick else (9, 1.0)
        return [task.seconds(rounds, limit) for task in tasks]


def fitting(estimates: Sequence[float], seconds: float) -> int:
    """How many of the cases are expected to be done in that time: in order, one that is too long is passed over."""
    count, used = 0, 0.0
    for estimate in estimates:
        if used + estimate <= seconds:
            count, used = count + 1, used + estimate
    return max(count, 1)
