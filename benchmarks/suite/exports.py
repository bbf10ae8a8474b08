"""The report's rows for other programs: pytest-benchmark's JSON, and Markdown."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import report

from .rows import Results, Row

STATISTICS = ("min_ms", "max_ms", "mean_ms", "stddev_ms", "median_ms", "iqr_ms", "q1_ms", "q3_ms")


def pytest_benchmark(results: Results) -> dict[str, Any]:
    """What ``pytest-benchmark compare FILE`` reads: seconds. Rows of older files, which lack some of the statistics,
    are not in it."""
    machine = results.machine
    commits = next((entry["commit"] for entry in results.provenance if entry["commit"]), "unknown")
    return {
        "machine_info": {
            "node": "",
            "processor": machine.get("cpu", machine.get("gpu", "")),
            "machine": platform.machine(),
            "python_version": machine.get("python", ""),
            "cpu": {"brand_raw": machine.get("cpu", ""), "count": machine.get("cores")},
            **machine,
        },
        "commit_info": {"id": commits.split(", ")[0].removesuffix("-dirty"), "dirty": "dirty" in commits},
        "benchmarks": [_benchmark(row) for row in results.rows if _complete(row)],
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": "5.3.1",
    }


def _complete(row: Row) -> bool:
    return all(key in row.statistics for key in STATISTICS)


def _benchmark(row: Row) -> dict[str, Any]:
    seconds = {key.removesuffix("_ms"): row.statistics[key] / 1e3 for key in STATISTICS}
    rounds = int(row.statistics["rounds"])
    name = f"{row.case}, {row.mode}, {row.contender}"
    extra = {
        "ours": row.ours,
        "setting": row.setting,
        "best_alternative": row.rival,
        "ratio": row.ratio,
        "multiply_adds": row.madds,
        "bytes": row.bytes,
        "bandwidth_share": row.bandwidth_share,
        "matrix_share": row.matrix_share,
        "peak_bytes": row.peak_bytes,
        "with_launch_gaps_ms": row.with_gaps_ms,
    }
    return {
        "group": f"{row.subject}: {row.case}, {row.mode}",
        "name": name,
        "fullname": f"{row.subject}::{name}",
        "params": None,
        "param": None,
        "extra_info": {key: value for key, value in extra.items() if value not in (None, "")},
        "options": {"timer": "perf_counter", "min_rounds": rounds, "warmup": True},
        "stats": {
            **seconds,
            "rounds": rounds,
            "iterations": 1,
            "outliers": "0;0",
            "iqr_outliers": 0,
            "stddev_outliers": 0,
            "ld15iqr": seconds["min"],
            "hd15iqr": seconds["max"],
            "ops": 1 / seconds["mean"],
            "total": seconds["mean"] * rounds,
        },
    }


COLUMNS = (
    "case", "mode", "contender", "median, ms", "with launch gaps, ms", "spread", "best alternative", "ratio",
    "Multiply-Adds, M", "bytes, MB", "of copy bandwidth", "of matrix ceiling", "peak memory, MB",
)  # fmt: skip


def markdown(results: Results) -> str:
    """The tables of the report."""
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results.machine.items())
    parts = ["# Benchmarks", "", f"{facts}.", "", "## Bars", "", _bars(results), ""]
    for subject in dict.fromkeys(row.subject for row in results.rows):
        table = [_cells(row) for row in results.rows if row.subject == subject]
        parts += [f"## {subject}", "", report.markdown(table, report.used_columns(COLUMNS, table)), ""]
    if results.unavailable:
        rows = [{"what": f"{u.contender}: {u.case} {u.mode}".strip(), "reason": u.reason} for u in results.unavailable]
        parts += ["## Not measured", "", report.markdown(_clean(rows), ["what", "reason"]), ""]
    if results.left_out:
        parts += [f"{len(results.left_out)} cases were left out for want of time.", ""]
    return "\n".join(parts)


def _bars(results: Results) -> str:
    rows = [
        {
            "asked by": verdict.demand.source,
            "on": verdict.demand.device,
            "what": verdict.demand.what,
            "bar": f"{'>=' if verdict.demand.at_least else '<='} {verdict.demand.limit:g}",
            "cases met": f"{verdict.met} of {verdict.measured}" if verdict.measured else "",
            "furthest from it": "" if verdict.worst is None else f"{verdict.worst:.2f}",
            "verdict": verdict.text,
        }
        for verdict in results.verdicts
    ]
    return report.markdown(rows, list(rows[0]))


def _cells(row: Row) -> dict[str, str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = {
        "case": row.case,
        "mode": row.mode,
        "contender": row.contender,
        "median, ms": number(row.median_ms, ".3g"),
        "with launch gaps, ms": number(row.with_gaps_ms, ".3g"),
        "spread": number(row.spread, ".0%"),
        "best alternative": f"{row.rival_ms:.3g} ({row.rival})" if row.rival_ms is not None else "",
        "ratio": number(row.ratio, ".2f"),
        "Multiply-Adds, M": number(row.madds / 1e6 if row.madds else None, ".1f"),
        "bytes, MB": number(row.bytes / 1e6 if row.bytes else None, ".1f"),
        "of copy bandwidth": number(row.bandwidth_share, ".0%"),
        "of matrix ceiling": number(row.matrix_share, ".0%"),
        "peak memory, MB": number(row.peak_bytes / 1e6 if row.peak_bytes else None, ".0f"),
    }
    return _clean([cells])[0]


def _clean(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """No cell ends its table's column or row."""
    return [{key: value.replace("|", "/").replace("\n", " ") for key, value in row.items()} for row in rows]
