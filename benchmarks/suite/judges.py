"""Records of each kind of results file, judged by benchmarks/bars.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import bars

Record = Mapping[str, Any]


def models(record: Record, machine: Record) -> list[bars.Bar]:
    import bench_models

    return bench_models.judged(record)


def depthwise(record: Record, machine: Record) -> list[bars.Bar]:
    return bars.bars(record, machine.get("last_level_cache_bytes", 32 << 20))


def separable(record: Record, machine: Record) -> list[bars.Bar]:
    return bars.separable(record)


def pyramid(record: Record, machine: Record) -> list[bars.Bar]:
    return bars.pyramid(record)


def dense_crf(record: Record, machine: Record) -> list[bars.Bar]:
    import bench_dense_crf

    names = {"faster": "crf", "faster_with_one": "crf, one thread", "memory_share": "crf memory"}
    found = [
        bars.bar(names[key], value, key.replace("_", " "), "")
        for key, value in bench_dense_crf.ratios(record).items()
        if record["case"][key] is not None
    ]
    if "large" in record:
        found.append(bars.bar("crf large", record["memory"]["ours"]["peak_bytes"] / 1e9, "peak memory, GB", ""))
    return found


def crf_layer(record: Record, machine: Record) -> list[bars.Bar]:
    if record["recompute"]:
        return []  # its backward contains the forward
    return [bars.bar("crf backward", record["backward"] / record["forward"], "backward / forward", "")]


def gpu(document: Record) -> Iterable[tuple[str, bars.Bar]]:
    """Of the dense CRF in a file of gpu_suite: (case, bar)."""
    for record in document.get("crf", []):
        times = record.get("times", {})
        for key, demand in (
            ("10 iterations, lattices built", f"gpu crf {record['picture']}"),
            ("exact appearance filter", "gpu exact filter"),
        ):
            if key in times and demand in bars.DEMANDS:
                yield f"CRF {record['picture']}", bars.bar(demand, times[key]["median_us"] / 1e3, "ms", "")
