"""A run against a stored one, contender by contender."""

from __future__ import annotations

from dataclasses import dataclass

from .rows import Results, Row

UNKNOWN_SPREAD = 0.1  # of a time of which only one sample is there


@dataclass(frozen=True)
class Change:
    """One contender at one case, before and now."""

    before: Row
    now: Row

    @property
    def ratio(self) -> float:
        """Time now over time before: above 1 is slower."""
        return self.now.median_ms / self.before.median_ms

    @property
    def noise_ms(self) -> float:
        """The larger interquartile range of both."""
        return max(
            row.median_ms * (UNKNOWN_SPREAD if row.spread is None else row.spread) for row in (self.before, self.now)
        )

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" where the medians differ by more than the spread, else ""."""
        difference = self.now.median_ms - self.before.median_ms
        return "" if abs(difference) <= self.noise_ms else "slower" if difference > 0 else "faster"


def changes(before: Results, now: Results) -> dict[tuple[str, ...], Change]:
    """Every contender that both runs measured, by :attr:`Row.key`."""
    stored = {row.key: row for row in before.rows}
    return {row.key: Change(stored[row.key], row) for row in now.rows if row.key in stored}


def slowdowns(found: dict[tuple[str, ...], Change]) -> list[Change]:
    """Ours that became slower beyond the spread, the worst first."""
    slower = [change for change in found.values() if change.now.ours and change.verdict == "slower"]
    return sorted(slower, key=lambda change: -change.ratio)


def other_machine(before: Results, now: Results) -> list[str]:
    """What differs between the machines of two runs, so that their times should not be compared."""
    keys = ("cpu", "gpu", "cores", "threads", "torch")
    pairs = [(key, before.machine.get(key), now.machine.get(key)) for key in keys]
    return [f"{key}: {old} before, {new} now" for key, old, new in pairs if old != new]
