"""The kinds of results files: a record of each -> its rows, and the bars that it is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import bars

from . import judges
from .rows import Record, Row


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


# One function for each kind of file.


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


def _pyramid(subject: str, document: Record) -> Iterable[Row]:
    for record in document["records"]:
        shared = {"subject": subject, "case": f"{record['name']}, {record['what']}", "mode": record["mode"]}
        ceiling = 2e-9 * record["gemm_madds_per_s"]
        rows = [
            replace(row, ours=not _plain(row))
            for row in _timed(record, madds=record["madds"], gflop_per_s=ceiling, setting=_setting(record), **shared)
        ]
        for row in rows:
            yield _with_rival(row, (r for r in rows if not r.ours))


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
        case = gpu_case(record)
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
            yield Row(subject, gpu_case(record), "", name, ours, timing["median_us"] / 1e3)


def gpu_case(record: Record) -> str:
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
    "atrous_spatial_pyramid": Kind(
        "Spatial pyramid of the ASPP", _pyramid, judges.pyramid, lambda record: f"{record['name']}, {record['what']}"
    ),
    "atrous_depthwise": Kind(TITLES["depthwise"], _depthwise, judges.depthwise),
    "dense_crf": Kind("Dense CRF for numpy", _dense_crf, judges.dense_crf),
    "dense_crf_layer": Kind("Dense CRF as a layer", _crf_layer, judges.crf_layer, _layer_case),
    "gaussian_filter": Kind("Gaussian filters", _filters),
    "sweep": Kind("Depthwise, random shapes", _sweep),
    "overhead": Kind("Cost of a call on a tiny tensor", _overhead),
    "gpu_suite": Kind("GPU", _gpu),
}
