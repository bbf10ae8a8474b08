"""Reads results files of all subjects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from deeplab_kernels.errors import UserError

from . import judges
from .kinds import KINDS, TITLES, gpu_case
from .rows import Record, Results, Unavailable


def read(source: Path) -> Results:
    """The results of a folder, or of one file whose name is one of :data:`kinds.KINDS` with .json.

    Raises:
        UserError: nothing there, no JSON, or not what the benchmarks write.
    """
    files = [source / f"{kind}.json" for kind in KINDS] if source.is_dir() else [source]
    files = [file for file in files if file.exists()]
    if not files:
        raise UserError(f"{source}: no results; expected a results file or a folder with one of {_known()}")
    results = Results(source)
    for file in files:
        if file.stem not in KINDS:
            raise UserError(f"{file}: what it holds is told by its name, which must be one of {_known()}")
        try:
            _add(results, file.stem, json.loads(file.read_text()))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{file}: not a results file of {file.stem}: {type(error).__name__} {error}") from error
    _fill_ceiling(results)
    return results


def _known() -> str:
    return ", ".join(f"{kind}.json" for kind in KINDS)


def _add(results: Results, name: str, document: Record) -> None:
    kind, machine = KINDS[name], document.get("machine", {})
    copy = machine.get("copy_gb_per_s") or document.get("copy_gb_per_s")
    seen: Counter[tuple[str, ...]] = Counter()
    for row in kind.rows(kind.title, document):
        seen[row.key] += 1
        if seen[row.key] > 1:  # layers of one shape that differ in where the ReLU is
            row = replace(row, case=f"{row.case} ({seen[row.key]})")
        gflop = row.gflop_per_s or machine.get("matrix_gflop_per_s")
        results.rows.append(replace(row, copy_gb_per_s=copy, gflop_per_s=gflop))
    for record in document.get("records", []):
        subject = TITLES.get(record.get("subject", ""), kind.title)
        if not (kind.judged or "unavailable" in record):
            continue
        case, mode = kind.case(record), f", {record['mode']}" if "mode" in record else ""
        for bar in kind.judged(record, machine) if kind.judged else []:
            results.judged.append((subject, case + mode, bar))
        for contender, reason in record.get("unavailable", {}).items():
            results.unavailable.append(Unavailable(subject, case, record["mode"], contender, reason))
    results.judged += [(kind.title, case, bar) for case, bar in judges.gpu(document)]
    for part in ("layers", "pyramids", "crf"):
        for record in document.get(part, []):
            if "failed" in record:
                results.unavailable.append(Unavailable(kind.title, gpu_case(record), "", "all", record["failed"]))
    for what, reason in document.get("unavailable", {}).items():
        results.unavailable.append(Unavailable("", "all", "", what, reason))
    if monai := document.get("monai"):
        results.unavailable.append(Unavailable(kind.title, "all", "", "MONAI", monai))
    results.left_out += document.get("left_out", [])
    results.machine = {**machine, **results.machine}
    records = [r for r in document.get("records", []) if "commit" in r] or [document]
    results.provenance.append(
        {
            "file": f"{name}.json",
            "cases": str(len(document.get("records", document.get("layers", [])))),
            "commit": _distinct(records, "commit"),
            "date": _distinct(records, "date"),
            "allocator": _distinct(records, "allocator"),
            "threads": _distinct([machine, *records], "threads"),
            "load average": _range(records, "load_average"),
            "copy, GB/s": str(copy or ""),
        }
    )


def _distinct(records: Iterable[Record], key: str) -> str:
    return ", ".join(dict.fromkeys(str(r[key]) for r in records if key in r))


def _range(records: Sequence[Record], key: str) -> str:
    values = [r[key] for r in records if key in r]
    return f"{min(values)} to {max(values)}" if values else ""


def _fill_ceiling(results: Results) -> None:
    """Files without a matrix ceiling of their own are held to the fastest product that the other files measured."""
    known = [row.gflop_per_s for row in results.rows if row.gflop_per_s]
    if known:
        results.rows = [row if row.gflop_per_s else replace(row, gflop_per_s=max(known)) for row in results.rows]
