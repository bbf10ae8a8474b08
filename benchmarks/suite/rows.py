"""Results files of all subjects as rows of one kind: one row for one contender at one case."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bars

from deeplab_kernels.errors import UserError

from . import judges

Record = Mapping[str, Any]
_REDUCED = re.compile(r"float16|\b(bf16|fp16|tf32)\b")


@dataclass(frozen=True)
class Row:
    """One contender at one case. Times in ms; None where the results do not have it."""

    subject: str
    case: str
    mode: str
    contender: str
    ours: bool
    median_ms: float
    iqr_ms: float | None = None
    samples: int | None = None
    rival: str = ""  # the fastest alternative that this one is compared with
    rival_ms: float | None = None
    madds: int | None = None
    bytes: int | None = None  # that must be moved: inputs read once, results written once
    peak_bytes: int | None = None
    setting: str = ""  # allocator and threads, where a case was measured in several
    copy_gb_per_s: float | None = None
    gflop_per_s: float | None = None  # of the fastest matrix product
    with_gaps_ms: float | None = None  # on a GPU: of ordinary calls, where the median is of CUDA-graph replays
    network: str = ""  # whole networks: what the plot of latencies calls it
    statistics: Record = field(default_factory=dict, compare=False, hash=False)  # what Timing.summary gives

    @property
    def key(self) -> tuple[str, ...]:
        return self.subject, self.case, self.mode, self.contender, self.setting

    @property
    def full_precision(self) -> bool:
        return not _REDUCED.search(f"{self.case} {self.contender}")

    @property
    def ratio(self) -> float | None:
        return None if self.rival_ms is None else self.rival_ms / self.median_ms

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median; None of a single sample."""
        return None if self.iqr_ms is None or self.samples == 1 else self.iqr_ms / self.median_ms

    @property
    def achieved_gflop_per_s(self) -> float | None:
        return None if not self.madds else 2e-6 * self.madds / self.median_ms

    @property
    def bandwidth_share(self) -> float | None:
        if self.bytes is None or not self.copy_gb_per_s:
            return None
        return self.bytes / self.median_ms / 1e6 / self.copy_gb_per_s

    @property
    def matrix_share(self) -> float | None:
        achieved = self.achieved_gflop_per_s
        return None if achieved is None or not self.gflop_per_s else achieved / self.gflop_per_s


@dataclass(frozen=True)
class Missed:
    """A bar that is not reached."""

    subject: str
    case: str
    what: str
    source: str


@dataclass(frozen=True)
class Unavailable:
    """What was to be measured and could not be."""

    subject: str
    case: str
    mode: str
    contender: str
    reason: str


@dataclass
class Results:
    """What a folder of results, or one results file, holds."""

    source: Path
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    judged: list[tuple[str, str, bars.Bar]] = field(default_factory=list)  # subject, case, bar
    unavailable: list[Unavailable] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases that there was no time for
    provenance: list[dict[str, str]] = field(default_factory=list)  # one entry for each file

    @property
    def missed(self) -> list[Missed]:
        return [
            Missed(subject, case, f"{bar.layout}: {bar.shortfall}", bars.DEMANDS[bar.demand].source)
            for subject, case, bar in self.judged
            if not bar.passed
        ]

    @property
    def verdicts(self) -> list[bars.Verdict]:
        return bars.verdicts([(f"{case}, {bar.layout}", bar) for _, case, bar in self.judged])


def _timed(record: Record, **shared: Any) -> Iterable[Row]:
    """A row for each entry of ``timings``, without what is known of each contender alone."""
    for name, timing in record["timings"].items():
        yield Row(
            contender=name,
            median_ms=timing["median_ms"],
            iqr_ms=timing.get("iqr_ms"),
            samples=timing.get("rounds"),
            statistics=timing,
            **{"ours": name.startswith("ours"), **shared},
        )


def _with_rival(row: Row, rivals: Iterable[Row]) -> Row:
    best = min(rivals, key=lambda r: r.median_ms, default=None)
    return row if best is None else replace(row, rival=best.contender, rival_ms=best.median_ms)


def _setting(record: Record) -> str:
    parts = [f"{record['allocator']} allocator"] if record.get("allocator", "tuned") != "tuned" else []
    return ", ".join([*parts, *([f"{record['threads']} threads"] if "threads" in record else [])])


# One function for each kind of file: a record -> its rows.


def _depthwise(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        conv, training = record["convolution"], record["mode"] == "training"
        taps = conv["kernel"] ** 2 * record["output_bytes"] // 4
        rows = list(_timed(record, subject=subject, case=record["name"], mode=record["mode"], setting=_setting(record)))
        for row in rows:
            kind, dtype, layout = row.contender.rsplit(" ", 2)
            x, out = (record[key] * (2 if dtype == "bfloat16" else 4) // 4 for key in ("input_bytes", "output_bytes"))
            whole = training and kind != "ours forward"  # a step: forward, grad_x and grad_weight
            moved = 2 * x if kind == "clone" else 3 * x + 2 * out if whole else x + out
            row = replace(row, bytes=moved, madds=0 if kind == "clone" else taps * (3 if whole else 1))
            if kind not in ("clone", "ours forward") and (best := bars.yardstick(record, dtype, layout)):
                row = replace(row, rival=f"{best[1].split()[0]} {dtype} {best[1].split()[1]}", rival_ms=best[0])
            yield row


def _separable(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        rows = list(
            _timed(
                record,
                subject=subject,
                case=record["name"],
                mode=record.get("mode", "inference"),
                madds=record["madds"],
                bytes=record["bytes"],
                setting=_setting(record),
            )
        )
        for row in rows:
            rivals = [r for r in rows if _plain(r) and r.contender.split()[-1] == row.contender.split()[-1]]
            yield _with_rival(replace(row, ours=not _plain(row)), rivals)


def _plain(row: Row) -> bool:
    return row.contender.startswith(("eager", "compile"))


def _models(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        shared = {"subject": subject, "case": record["name"], "mode": record["mode"], "setting": _setting(record)}
        shared["network"] = ", ".join(record["name"].split(", ")[:-2])  # without the size and N
        rows = list(_timed(record, madds=record["madds"], gflop_per_s=2e-9 * record["gemm_madds_per_s"], **shared))
        fastest = {kind: min(r.median_ms for r in rows if r.contender.startswith(kind)) for kind in ("ours", "eager")}
        for row in rows:
            kind = row.contender.split()[0]
            peak = record.get("peak_bytes", {}).get(kind) if row.median_ms == fastest.get(kind) else None
            yield _with_rival(replace(row, peak_bytes=peak), (r for r in rows if not r.ours))


def _contenders(subject: str, document: Record) -> Iterable[Row]:
    """The product of bench_contenders, each record under its own subject."""
    ceilings = document["machine"].get("matrix_gflop_per_s_of", {})
    for record in document["records"]:
        case, gaps = record["case"], record.get("with_gaps", {})
        shared = {
            "subject": TITLES[record["subject"]],
            "case": record["name"],
            "mode": record["mode"],
            "madds": record["madds"],
            "bytes": record["bytes"],
            "setting": _setting(record),
            "gflop_per_s": ceilings.get(case["dtype"]),
            "network": case["what"] if record["subject"] == "models" else "",
        }
        rows = list(_timed(record, **shared))
        rivals = [row for row in rows if not row.ours and not row.contender.startswith("copy")]
        same_layout = record["subject"] == "depthwise" and record["mode"] == "inference"
        for row in rows:
            layout = row.contender.rsplit(" ", 1)[1]
            row = replace(
                row,
                peak_bytes=record.get("peak_bytes", {}).get(row.contender),
                with_gaps_ms=gaps.get(row.contender, {}).get("median_ms"),
            )
            if row.contender.startswith("copy"):
                yield replace(row, madds=0)
            else:
                yield _with_rival(row, (r for r in rivals if not same_layout or r.contender.endswith(layout)))


def _dense_crf(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        memory = record.get("memory", {})
        rows = list(_timed(record, subject=subject, case=record["name"], mode="10 iterations"))
        if not rows and "ours" in memory:  # the large case: one run in a process of its own
            alone = {"median_ms": 1e3 * memory["ours"]["seconds"], "rounds": 1}
            single = {"timings": {f"ours, {record['threads']} threads": alone}}
            rows = list(_timed(single, subject=subject, case=record["name"], mode="10 iterations"))
        for index, row in enumerate(rows):
            who = memory.get("ours" if row.ours and index == 0 else row.contender, {})  # ours on one thread: not taken
            row = replace(row, peak_bytes=who.get("above_inputs_bytes"))
            yield _with_rival(row, (r for r in rows if not r.ours))


def _crf_layer(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        case = f"{record['sigmas']}; trained: {record['trained']}" + ("; recompute" if record["recompute"] else "")
        for mode in ("inference", "forward", "backward"):
            peak = record["peak_bytes"] if mode == "backward" else None
            yield Row(subject, case, mode, "ours", True, record[mode], peak_bytes=peak)


def _filters(subject: str, document: Record) -> Iterable[Row]:
    plain: dict[tuple[str, str], Row] = {}  # the time of every pair does not depend on the picture
    for record in document["records"]:
        windowed = record["what"].startswith("window")
        rows = list(_timed(record, subject=subject, case=f"{record['size']}, {record['what']}", mode=""))
        rows = [replace(row, mode=row.contender.split()[-1]) for row in rows]
        own = {row.mode: row for row in rows if not row.ours}
        if not windowed:
            plain |= {(record["size"], mode): row for mode, row in own.items()}
        for row in rows:
            rival = own.get(row.mode) or (None if windowed else plain.get((record["size"], row.mode)))
            yield _with_rival(row, [rival] if rival else [])


def _sweep(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        shared = (subject, record["name"], record["mode"])
        rival = Row(*shared, "PyTorch", False, record["pytorch_ms"])
        yield from (_with_rival(row, [rival]) for row in (Row(*shared, "ours", True, record["ours_ms"]), rival))


def _overhead(subject: str, document: Record) -> Iterable[Row]:
    for call, microseconds in document["microseconds"].items():
        ours = not call.startswith("F.") and "PyTorch" not in call
        yield Row(subject, call, "one call", "ours" if ours else "PyTorch", ours, microseconds / 1e3)


def _gpu(subject: str, document: Record) -> Iterable[Row]:
    """Layers, pyramids and CRFs on a GPU, as benchmarks/gpu_suite.py writes them (microseconds)."""
    for record in [*document.get("layers", []), *document.get("pyramids", [])]:
        case = _gpu_case(record)
        for mode in ("inference", "forward", "backward"):
            times = record.get(mode, {})
            rows = [
                Row(subject, case, mode, name, name.startswith("ours"), t["median_us"] / 1e3)
                for name, t in times.items()
                if isinstance(t, Mapping)
            ]
            moved = None
            if "floor_us" in times and "copy_gb_per_s" in document:
                moved = round(times["floor_us"] * document["copy_gb_per_s"] * 1e3)
            yield from (_with_rival(replace(r, bytes=moved), (o for o in rows if not o.ours)) for r in rows)
    for record in document.get("crf", []):
        for name, timing in record.get("times", {}).items():
            ours = not name.startswith("MONAI")
            yield Row(subject, _gpu_case(record), "", name, ours, timing["median_us"] / 1e3)


def _gpu_case(record: Record) -> str:
    if "picture" in record:
        return f"CRF {record['picture']}"
    return f"{record.get('layer') or record['pyramid']}/N{record['batch']} {record['dtype']} {record['layout']}"


@dataclass(frozen=True)
class Kind:
    """A kind of results file. title: of its table."""

    title: str
    rows: Callable[[str, Record], Iterable[Row]]
    judged: Callable[[Record, Record], list[bars.Bar]] | None = None
    case: Callable[[Record], str] = lambda record: str(record["name"])


def _layer_case(record: Record) -> str:
    return f"{record['sigmas']}; trained: {record['trained']}"


TITLES = {
    "models": "Whole networks",
    "aspp": "ASPP stage",
    "separable": "Separable convolution, the whole block",
    "depthwise": "Depthwise + batch normalisation + ReLU",
}
KINDS: dict[str, Kind] = {
    "contenders": Kind("Contenders", _contenders, bars.contenders),
    "models": Kind(TITLES["models"], _models, judges.models),
    "atrous_separable": Kind(TITLES["separable"], _separable, judges.separable),
    "atrous_depthwise": Kind(TITLES["depthwise"], _depthwise, judges.depthwise),
    "dense_crf": Kind("Dense CRF for numpy", _dense_crf, judges.dense_crf),
    "dense_crf_layer": Kind("Dense CRF as a layer", _crf_layer, judges.crf_layer, _layer_case),
    "gaussian_filter": Kind("Gaussian filters", _filters),
    "sweep": Kind("Depthwise, random shapes", _sweep),
    "overhead": Kind("Cost of a call on a tiny tensor", _overhead),
    "gpu_suite": Kind("GPU", _gpu),
}


def read(source: Path) -> Results:
    """The results of a folder, or of one file whose name is one of :data:`KINDS` with .json.

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
                results.unavailable.append(Unavailable(kind.title, _gpu_case(record), "", "all", record["failed"]))
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
