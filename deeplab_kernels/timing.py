"""Timing of alternatives against each other: interleaved in one process, medians.

A machine's speed drifts (frequency, neighbours, page cache), so alternatives timed one after the other are not
comparable. Here every round visits every alternative, in a new order, and the medians over rounds are compared.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; of one sample both are that sample."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def iqr(self) -> float:
        """Interquartile range, the spread of the samples; 0 with one sample."""
        low, high = self.quartiles
        return high - low

    def summary(self) -> dict[str, float]:
        """For JSON: statistics of the samples in milliseconds, and how many there are."""
        return {
            "median_ms": self.median,
            "min_ms": self.minimum,
            "max_ms": max(self.samples),
            "mean_ms": statistics.fmean(self.samples),
            "stddev_ms": statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0,
            "q1_ms": self.quartiles[0],
            "q3_ms": self.quartiles[1],
            "iqr_ms": self.iqr,
            "rounds": len(self.samples),
        }


def _wall_clock(function: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - start


def thread_clock(function: Callable[[], object], count: int) -> float:
    """Processor seconds of this thread alone: what can be compared while others work, with one thread."""
    start = time.thread_time()
    for _ in range(count):
        function()
    return time.thread_time() - start


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    visit_seconds: float = 1e-3,
    settle: bool = True,
    candidate_seconds: float = 4.0,
    seed: int = 0,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, Timing]:
    """Times ``candidates`` (name -> function without arguments) against each other.

    Args:
        rounds: samples per candidate; every round visits all candidates in a new random order.
        warmup: calls before the first round (one if a call takes more than a second).
        visit_seconds: a visit repeats a short function until about this long, at most 16 times; its sample is the mean.
        settle: start every visit with a call that is not timed (for functions below 10 ms), so that the sample does
            not depend on what the candidate before left in the caches. Turn it off to time with cold caches.
        candidate_seconds: a candidate that has used more than this leaves the rotation once it has 3 samples; one whose
            first call takes longer than this is not called again, that call is its only sample.
        seed: of the order.
        clock: (function, count) -> seconds that ``count`` calls take; the wall clock's by default.

    Returns:
        name -> :class:`Timing`, in the order of ``candidates``.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    clock = clock or _wall_clock
    repeats: dict[str, int] = {}
    settles: dict[str, bool] = {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for name, function in candidates.items():
        seconds = float("inf")
        for _ in range(max(warmup, 1)):
            seconds = min(seconds, clock(function, 1))
            if seconds > min(1.0, candidate_seconds):
                break
        if seconds > candidate_seconds:
            samples[name].append(seconds * 1e3)
        repeats[name] = max(1, min(16, round(visit_seconds / max(seconds, 1e-9))))
        settles[name] = settle and seconds < 0.01
    in_rotation = [name for name in candidates if not samples[name]]
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            active = [n for n in in_rotation if spent[n] < candidate_seconds or len(samples[n]) < min(3, rounds)]
            order.shuffle(active)
            for name in active:
                function, count = candidates[name], repeats[name]
                if settles[name]:
                    function()
                elapsed = clock(function, count)
                samples[name].append(elapsed / count * 1e3)
                spent[name] += elapsed
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
