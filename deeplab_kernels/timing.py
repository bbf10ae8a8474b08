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
    def iqr(self) -> float:
        """Interquartile range, the spread of the samples; 0 with one sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def summary(self) -> dict[str, float]:
        return {
            "median_ms": self.median,
            "min_ms": self.minimum,
            "iqr_ms": self.iqr,
            "rounds": len(self.samples),
        }


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    visit_seconds: float = 1e-3,
    settle: bool = True,
    candidate_seconds: float = 4.0,
    seed: int = 0,
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

    Returns:
        name -> :class:`Timing`, in the order of ``candidates``.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    repeats: dict[str, int] = {}
    settles: dict[str, bool] = {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for name, function in candidates.items():
        seconds = float("inf")
        for _ in range(max(warmup, 1)):
            start = time.perf_counter()
            function()
            seconds = min(seconds, time.perf_counter() - start)
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
                start = time.perf_counter()
                for _ in range(count):
                    function()
                elapsed = time.perf_counter() - start
                samples[name].append(elapsed / count * 1e3)
                spent[name] += elapsed
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
