"""Means, spreads and verdicts: the arithmetic between the records and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REPRODUCED = "reproduced"
WITHIN = "within the spread"
NOT_HERE = "not at this scale"
NO_VERDICT = "no verdict"

SAME = 0.01
"""Differences of mean IoU up to one point count as the same."""

# 95 % quantiles of Student's t distribution by degrees of freedom.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)

RULE = (
    "Differences are taken between networks of the same seed, or between two ways to evaluate the same "
    "trained network; d is their mean over the seeds, s its standard error, t the one-sided 95 % quantile of "
    "Student's distribution for that number of seeds (2.92 for three). *Reproduced*: d has the papers' sign "
    "and exceeds t s. *Not at this scale*: d has the other sign and exceeds t s. *Within the spread*: "
    "neither. Where the papers find two things about equal, *reproduced* means that d is at most "
    f"{100 * SAME:.0f} point, *not at this scale* that it exceeds this by t s."
)


@dataclass(frozen=True)
class Summary:
    """mean and sample standard deviation (NaN for one value)."""

    mean: float
    deviation: float
    count: int

    @property
    def error(self) -> float:
        return self.deviation / math.sqrt(self.count) if self.count else math.nan


def summarise(values: Sequence[float]) -> Summary:
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return Summary(mean, statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def paired(more: Mapping[int, float], less: Mapping[int, float]) -> Summary:
    """The differences more - less of the seeds that both have."""
    return summarise([more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())])


def t_quantile(count: int) -> float:
    """Of ``count`` >= 2 values; that of ten values for more, which is on the safe side."""
    return _T95[min(count - 1, len(_T95)) - 1]


def greater(difference: Summary) -> str:
    """The verdict on "the difference is positive"."""
    if difference.count < 2:
        return NO_VERDICT
    margin = t_quantile(difference.count) * difference.error
    if difference.mean > margin:
        return REPRODUCED
    return NOT_HERE if difference.mean < -margin else WITHIN


def same(difference: Summary, limit: float = SAME) -> str:
    """The verdict on "there is no difference to speak of"."""
    if difference.count < 2:
        return NO_VERDICT
    if abs(difference.mean) <= limit:
        return REPRODUCED
    margin = t_quantile(difference.count) * difference.error
    return NOT_HERE if abs(difference.mean) > limit + margin else WITHIN


def lower(new: float, old: float, spread: float) -> str:
    """The verdict on "``new`` is lower", by more than ``spread``."""
    if old - new > spread:
        return REPRODUCED
    return NOT_HERE if new - old > spread else WITHIN
