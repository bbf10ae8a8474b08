"""Runs the jobs of the suite, each in a process of its own, and tells how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
from tqdm import tqdm

from .subjects import Job, Wanted

BENCHMARKS = Path(__file__).resolve().parent.parent
TIMES = "suite_seconds.json"  # how long each file took here, for the next estimate


@dataclass(frozen=True)
class Outcome:
    """How one job ended. cases: records in its results file that are of this run; cut: there was no time for all."""

    subjects: tuple[str, ...]
    script: str
    ok: bool
    seconds: float
    cases: int
    error: str = ""
    cut: bool = False


def _records(path: Path) -> set[str]:
    """The records of a results file as text, to see which are new; the file is replaced at once, never half written."""
    try:
        return {json.dumps(record) for record in json.loads(path.read_text())["records"]}
    except (OSError, ValueError, KeyError):
        return set()


def _times(folder: Path, quick: bool) -> dict[str, float]:
    try:
        return dict(json.loads((folder / TIMES).read_text())["quick" if quick else "full"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(folder: Path, quick: bool, outcome: Outcome) -> None:
    known = {mode == "quick": _times(folder, mode == "quick") for mode in ("full", "quick")}
    known[quick][outcome.script] = round(outcome.seconds, 1)
    measure.save(folder / TIMES, {"full": known[False], "quick": known[True]})


class Progress:
    """A bar over estimated seconds; the time left follows how well the estimates held so far.

    estimates: file -> (seconds, cases), in the order in which they run.
    """

    def __init__(self, estimates: Mapping[str, tuple[float, int]]) -> None:
        self.estimates, self.total = estimates, sum(seconds for seconds, _ in estimates.values())
        self.start = self.last = time.monotonic()  # last: when the latest case was done
        self.planned, self.pace = 0.0, 1.0
        self.bar = tqdm(
            total=100, bar_format="{desc} {percentage:3.0f} %|{bar}| {elapsed}{postfix}", dynamic_ncols=True
        )

    def update(self, script: str, done: int) -> None:
        """``done`` cases of ``script`` are measured; every file before it is finished."""
        seconds, cases = self.estimates[script]
        names = list(self.estimates)
        before = sum(self.estimates[name][0] for name in names[: names.index(script)])
        planned, now = before + seconds * min(done / cases, 1.0), time.monotonic()
        news = planned > self.planned or now == self.start
        if planned > self.planned:
            self.planned, self.last = planned, now
            # The estimate itself counts like a fifth of the whole, so that the first cases do not turn it over.
            self.pace = (now - self.start + 0.2 * self.total) / (planned + 0.2 * self.total)
        # What the case at work has had so far, at most what it was planned to take.
        working = min((now - self.last) / self.pace, seconds / cases, self.total - self.planned)
        self.bar.n = 100 * (self.planned + working) / self.total
        name = script.removeprefix("bench_").removesuffix(".py")
        self.bar.set_description_str(f"{name} {min(done, cases)} of {cases}", False)
        self.bar.set_postfix_str(f"about {clock(self.pace * (self.total - self.planned - working))} left", False)
        if news or sys.stderr.isatty():
            self.bar.refresh()

    def finish(self, script: str) -> None:
        self.update(script, self.estimates[script][1])

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def run_job(
    job: Job, folder: Path, quick: bool, tell: Callable[[int], None], deadline: Deadline, poll: float = 0.5
) -> Outcome:
    """Runs one file to its end, or to the deadline's; ``tell`` gets the number of cases done. Interrupted, the file is
    stopped first."""
    results = folder / job.results
    old, start = _records(results), time.monotonic()
    environment = {**os.environ, **measure.TUNED_ALLOCATOR, "DEEPLAB_KERNELS_RESULTS": str(folder)}
    arguments = job.arguments(quick, folder, deadline.share_minutes)
    cut = False
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]],
            cwd=BENCHMARKS.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not (cut := deadline.is_over):
                tell(len(_records(results) - old))
                time.sleep(poll)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        output.seek(0)
        text = output.read()
    # Exit code 1 without a traceback: measured, and a bar is missed, which the report lists.
    ok = cut or process.returncode == 0 or (process.returncode == 1 and "Traceback (most recent call last)" not in text)
    lines = text.strip().splitlines()
    error = "" if ok else (lines[-1] if lines else f"exit code {process.returncode}")
    seconds, count = time.monotonic() - start, len(_records(results) - old)
    return Outcome(job.subjects, job.script, ok, seconds, count, error, cut)


@dataclass(frozen=True)
class Deadline:
    """When everything must be over (by time.monotonic; 0: never), and what one file may plan with until then."""

    end: float = 0.0
    share_minutes: float = 0.0

    @property
    def is_over(self) -> bool:
        return bool(self.end) and time.monotonic() >= self.end


REPORT_SECONDS = 4.0  # for the report after the last file
LEAST_SHARE = 0.4  # of the time left, for a file that fills what the later ones leave


def run(wanted: Wanted, folder: Path) -> list[Outcome]:
    """All jobs in turn; one that fails does not stop the others. If cut, what was measured is in ``folder``."""
    start, jobs, quick = time.monotonic(), wanted.jobs, wanted.quick
    end = start + max(60 * wanted.minutes - REPORT_SECONDS, 1.0) if wanted.minutes else 0.0
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    known = _times(folder, quick)
    estimates = {
        job.script: (plan.seconds if job.fills else known.get(job.script, plan.seconds), plan.cases)
        for job in jobs
        if (plan := job.plan(quick))
    }
    limit = f", {clock(60 * wanted.minutes)} at most" if wanted.minutes else ""
    print(f"{len(jobs)} files, about {clock(sum(s for s, _ in estimates.values()))}{limit}, into {folder}",
          file=sys.stderr)  # fmt: skip
    progress, outcomes = Progress(estimates), []
    try:
        for job in jobs:
            planned = estimates[job.script][0]
            left = end - time.monotonic() if end else float("inf")
            if left < min(0.5 * planned, 60.0):
                tqdm.write(f"{job.script}: left out, {left:.0f} s are left", file=sys.stderr)
                outcomes.append(Outcome(job.subjects, job.script, True, 0.0, 0, cut=True))
                continue
            later = sum(estimates[other.script][0] for other in jobs[jobs.index(job) + 1 :])
            share = max(left - later, LEAST_SHARE * left) / 60 if end else 0.0
            deadline = Deadline(end, share)
            outcome = run_job(job, folder, quick, partial(progress.update, job.script), deadline)
            outcomes.append(outcome)
            progress.finish(job.script)
            if not outcome.ok:
                tqdm.write(f"{job.script} failed: {outcome.error}", file=sys.stderr)
            elif outcome.cut:
                tqdm.write(f"{job.script}: the time is over, {outcome.cases} cases done", file=sys.stderr)
            elif not job.fills:
                _remember(folder, quick, outcome)
    finally:
        progress.close()
    return outcomes


def to_dict(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "seconds": round(outcome.seconds, 1)}
