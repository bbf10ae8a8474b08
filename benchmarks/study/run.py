"""The command: trains and evaluates what is missing, in parallel processes of one thread, and writes the report."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

BENCHMARKS = Path(__file__).parent.parent
sys.path.append(str(BENCHMARKS))  # for measure.py

import measure  # noqa: E402

from . import cost, report, worker  # noqa: E402
from .experiments import NETWORKS, Job, Settings, jobs  # noqa: E402

_ROUNDS = 60  # of the latency


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    settings = Settings().scaled(options.scale)
    planned = [job for job in jobs(settings, options.seeds) if not options.only or job.network in options.only]
    options.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _end)
    failures: dict[str, str] = {}
    if not options.report:
        failures = _run_all(planned, options.work, options.workers, options.minutes)
    records = [json.loads(path.read_text()) for job in planned if (path := options.work / job.record_name).exists()]
    if not records:
        sys.exit("nothing was measured" + "".join(f"\n{name}: {error}" for name, error in failures.items()))
    output = options.output or measure.results_folder()
    content = {
        "machine": measure.machine(),
        **measure.stamp(),
        "settings": vars(settings),
        "scale": options.scale,
        "seeds": options.seeds,
        "processes": options.workers,
        "missing": len(planned) - len(records),
        "failures": failures,
        "cost": cost.compare(settings.scene_size, _ROUNDS if options.scale >= 0.2 else 3),
        "records": records,
    }
    report.write(content, output)
    print(json.dumps(report.summary(content), indent=1) if options.json else report.markdown(content))
    print(f"written: {output / 'study.md'}", file=sys.stderr)
    if failures:
        sys.exit("\n".join(f"{name} failed: {error}" for name, error in failures.items()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument(
        "--scale", type=_positive, default=1.0, help="length of the training; below 1 fewer scenes, too"
    )
    parser.add_argument("--seeds", type=_count, default=3, help="trainings of each network (default 3)")
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, help="processes of one thread each (default: cores)"
    )
    parser.add_argument("--minutes", type=_positive, help="start no training after so many minutes")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="where finished trainings are kept")
    parser.add_argument("--output", type=Path, help="where the report goes (default: benchmarks/results/<machine>)")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of a table")
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _end(*_: object) -> None:
    """Unwinds, so that the training processes are ended as well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


# In the training processes.

_progress: Callable[[float], object]


def _start(messages: multiprocessing.Queue[float]) -> None:
    global _progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears of it and ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _progress = messages.put
    worker.start()


def _run(job: Job, folder: Path) -> None:
    worker.run(job, folder, _progress)


# In the first process.


def _run_all(planned: Sequence[Job], folder: Path, workers: int, minutes: float | None) -> dict[str, str]:
    """Runs the jobs that have no record in ``folder`` yet, those that start within ``minutes``; returns the errors by
    "network, seed"."""
    begin = time.monotonic()
    missing = [job for job in planned if not (folder / job.record_name).exists()]
    failures: dict[str, str] = {}
    finished = 0
    if not missing:
        return failures
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started from here on
    context = multiprocessing.get_context("spawn")
    messages: multiprocessing.Queue[float] = context.Queue()
    total = sum(job.settings.steps * job.cost + worker.evaluation_cost(job) for job in missing)
    executor = ProcessPoolExecutor(min(workers, len(missing)), context, _start, (messages,))
    bar = tqdm(total=round(total), desc="training", unit="step", dynamic_ncols=True, smoothing=0.1,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    try:
        with closing(bar):
            running = {executor.submit(_run, job, folder): job for job in missing}
            while running:
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(round(_drain(messages) + bar.n) - bar.n)
                for future in done:
                    _note(future, running.pop(future), failures)
                    finished += 1
                if minutes is not None and time.monotonic() - begin > 60 * minutes:
                    running = {future: job for future, job in running.items() if not future.cancel()}
                bar.set_postfix_str(f"{finished} of {len(missing)} trainings", refresh=False)
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
    return failures


def _drain(messages: multiprocessing.Queue[float]) -> float:
    total = 0.0
    while True:
        try:
            total += messages.get_nowait()
        except queue.Empty:
            return total


def _note(future: Future[None], job: Job, failures: dict[str, str]) -> None:
    error = future.exception()
    if error is not None:
        failures[f"{job.network}, seed {job.seed}"] = f"{type(error).__name__}: {error}"
