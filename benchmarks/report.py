"""Tables, as text or Markdown, from the records of depthwise.measure_convolution.

python benchmarks/report.py             # rewrites every results/<machine>/atrous_depthwise.md from its .json
python benchmarks/report.py --readme benchmarks/results/<machine>    # and the README's tables, and its GPU parts
python benchmarks/report.py --readme                                 # only what README says of GPUs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bars
import tables

from deeplab_kernels.errors import UserError

RESULTS = Path(__file__).parent / "results"

_COMMON = ["shape", "layout", "ours", "best PyTorch", "which", "ratio", "clone", "/clone"]
COLUMNS = {
    "inference": [
        *_COMMON,
        "floor",
        "eager",
        "compile",
        "frozen",
        "bf16",
        "bf16/fp32",
        "PyTorch bf16",
        "spread",
        "bars",
    ],
    "training": [
        *_COMMON,
        "floor",
        "forward",
        "eager nchw",
        "eager nhwc",
        "compile nchw",
        "compile nhwc",
        "kept",
        "spread",
        "bars",
    ],
}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator is not None and denominator else ""


def cells(record: Mapping[str, Any], layout: str, machine: Mapping[str, Any]) -> dict[str, str]:
    """One row of the table: column -> text. Milliseconds unless the column is a ratio."""
    ours = bars.median(record, "ours", "float32", layout)
    half = bars.median(record, "ours", "bfloat16", layout)
    main = "float32" if ours is not None else "bfloat16"
    time = ours if ours is not None else half
    rival = bars.yardstick(record, main, layout)
    clone = bars.median(record, "clone", main, layout)
    demands = [b for b in bars.bars(record, machine.get("last_level_cache_bytes", 32 << 20)) if b.layout == layout]
    failed = [b.shortfall for b in demands if not b.passed]
    size = 4 if main == "float32" else 2
    x, out = (record[key] // 4 * size for key in ("input_bytes", "output_bytes"))
    moved = x + out if record["mode"] == "inference" else 3 * x + 2 * out
    timing = record["timings"].get(f"ours {main} {layout}")
    row = {
        "shape": record["name"],
        "layout": layout + ("" if main == "float32" else " bf16"),
        "ours": _ms(time),
        "best PyTorch": _ms(rival[0] if rival else None),
        "which": rival[1].removesuffix(f" {layout}") if rival else "",
        "ratio": _ratio(rival[0] if rival else None, time),
        "clone": _ms(clone),
        "/clone": _ratio(time, clone),
        "floor": _ms(clone * moved / (2 * x) if clone else None),
        "spread": f"{timing['iqr_ms'] / timing['median_ms']:.0%}" if timing else "",
        "bars": "; ".join(failed) if failed else "PASS" if demands else "",
        "bf16": _ms(half),
        "bf16/fp32": _ratio(half, ours),
        "PyTorch bf16": _ms((bars.best_pytorch(record, "bfloat16", [layout]) or (None,))[0]),
        "forward": _ms(bars.median(record, "ours forward", main, layout)),
    }
    for kind in ("eager", "compile", "frozen"):
        row[kind] = _ms(bars.median(record, kind, main, layout))
        for other in ("nchw", "nhwc"):
            row[f"{kind} {other}"] = _ms(bars.median(record, kind, main, other))
    if "kept_bytes" in record:
        row["kept"] = f"{record['kept_bytes'][layout] / record['input_bytes']:.2f} x"
    return row


def rows(records: Iterable[Mapping[str, Any]], machine: Mapping[str, Any]) -> list[dict[str, str]]:
    return [cells(record, layout, machine) for record in records for layout in bars.layouts_of(record)]


def used_columns(columns: Sequence[str], table: Sequence[Mapping[str, str]]) -> list[str]:
    return [c for c in columns if any(row.get(c) for row in table)]


def text(table: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Aligned columns for a terminal."""
    lines = [list(columns), *([row.get(c, "") for c in columns] for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(table: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    return tables.markdown(columns, ([row.get(c, "") for c in columns] for row in table))


def summary(records: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> list[str]:
    """One line per kind of bar: how many hold, and the worst."""
    found: dict[tuple[str, float], list[tuple[bars.Bar, str]]] = {}
    for record in records:
        for bar in bars.bars(record, machine.get("last_level_cache_bytes", 32 << 20)):
            found.setdefault((f"{record['mode']}: {bar.name}", bar.limit), []).append((bar, record["name"]))
    lines = []
    for (name, limit), entries in found.items():
        passed = sum(bar.passed for bar, _ in entries)
        worst, where = min(entries, key=lambda e: e[0].value if e[0].at_least else -e[0].value)
        verdict = "PASS" if passed == len(entries) else "FAIL"
        relation = ">=" if worst.at_least else "<="
        count = f"{passed} of {len(entries)}, worst {worst.value:.2f} ({where} {worst.layout})"
        lines.append(f"{verdict} {name} {relation} {limit:g}: {count}")
    return lines


def document(results: Mapping[str, Any]) -> str:
    """The whole Markdown page of one results file."""
    machine = results["machine"]
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    parts = ["# Depthwise + batch normalisation + ReLU on the CPU", "", f"Machine: {facts}.", ""]
    parts += [
        "Milliseconds (medians of interleaved rounds), fp32 unless said otherwise; clone is `x.clone()`, floor the",
        "bytes that must be moved at the speed of that clone, spread the interquartile range of ours over its median.",
        "Bars: `bars.py`.",
        "",
    ]
    for allocator in ("tuned", "default"):
        for mode, columns in COLUMNS.items():
            records = [r for r in results["records"] if r["mode"] == mode and r["allocator"] == allocator]
            if not records:
                continue
            table = rows(records, machine)
            commits = sorted({f"{r['commit']} ({r['date']})" for r in records})
            parts += [f"## {mode.capitalize()}, {allocator} allocator", "", f"Commit {', '.join(commits)}.", ""]
            parts += [*(f"- {line}" for line in summary(records, machine)), ""]
            parts += [markdown(table, used_columns(columns, table)), ""]
    return "\n".join(parts)


README = Path(__file__).parent.parent / "README.md"
README_LAYERS = {
    "E128:128x257/N1": "entry flow: 128 channels, 257 x 257",
    "728x33/N1": "middle flow, output stride 16: 728 channels, 33 x 33",
    "M8:728x65r2/N1": "middle flow, output stride 8: 728 channels, 65 x 65, rate 2",
    "A6:2048x33r6/N1": "ASPP: 2048 channels, 33 x 33, rate 6",
    "A12:2048x33r12/N1": "ASPP, rate 12",
    "A18:2048x33r18/N1": "ASPP, rate 18",
    "A24:2048x65r24/N1": "ASPP, output stride 8: 2048 channels, 65 x 65, rate 24",
    "D304:304x129/N1": "decoder: 304 channels, 129 x 129",
}


def readme_table(results: Mapping[str, Any]) -> str:
    """Ours against PyTorch's best: inference in each layout, a training step in the better layout of each."""
    records = {(r["name"], r["mode"]): r for r in results["records"] if r["allocator"] == "tuned"}
    table = []
    for name, layer in README_LAYERS.items():
        row = {"layer (N = 1)": layer}
        if inference := records.get((name, "inference")):
            for layout in ("nchw", "nhwc"):
                ours, rival = (
                    bars.median(inference, "ours", "float32", layout),
                    bars.yardstick(inference, "float32", layout),
                )
                if ours and rival:
                    row[f"inference {layout.upper()}"] = f"{ours:.2f} / {rival[0]:.2f} ms, **{rival[0] / ours:.1f}x**"
        if training := records.get((name, "training")):
            times = [t for layout in ("nchw", "nhwc") if (t := bars.median(training, "ours", "float32", layout))]
            rival = bars.yardstick(training, "float32", "nchw")
            if times and rival:
                row["training step"] = f"{min(times):.2f} / {rival[0]:.2f} ms, **{rival[0] / min(times):.1f}x**"
        table.append(row)
    machine = results["machine"]
    dates = sorted({f"{r['date']}, commit {r['commit']}" for r in records.values()})
    caption = (
        f"ours / PyTorch's best, fp32, medians, on {machine['cores']} cores of an {machine['cpu']} "
        f"({machine['instruction_set']}), torch {machine['torch']}; {'; '.join(dates)}"
    )
    return markdown(table, ["layer (N = 1)", "inference NCHW", "inference NHWC", "training step"]) + f"\n\n{caption}."


def readme_crf_table(results: Mapping[str, Any]) -> str:
    """deeplab_kernels.densecrf against pydensecrf."""
    table = []
    for record in results["records"]:
        times = {name: timing["median_ms"] for name, timing in record["timings"].items()}
        if "pydensecrf" not in times:
            continue
        theirs = times.pop("pydensecrf")
        row = {"image, labels, sigmas": record["name"], "pydensecrf": f"{theirs:.0f} ms"}
        for name, time in ((name, time) for name, time in times.items() if name.startswith("ours")):
            row["ours, one thread" if "1 thread" in name else f"ours, {record['threads']} threads"] = (
                f"{time:.0f} ms, **{theirs / time:.1f}x**"
            )
        memory = record.get("memory", {})
        if "pydensecrf" in memory:
            ours, other = (memory[name]["above_inputs_bytes"] / 1e6 for name in ("ours", "pydensecrf"))
            row["memory, ours / pydensecrf"] = f"{ours:.0f} / {other:.0f} MB"
        table.append(row)
    columns = list(dict.fromkeys(column for row in table for column in row))
    dates = sorted({f"{r['date']}, commit {r['commit']}" for r in results["records"]})
    machine = results["machine"]
    caption = (
        "10 iterations, lattices built in each call, medians; height x width x labels, sxy/srgb of the appearance "
        f"kernel + sxy of the smoothness kernel; {machine['cores']} cores of an {machine['cpu']}; {'; '.join(dates)}"
    )
    return markdown(table, columns) + f"\n\n{caption}."


def readme_models_table(results: Mapping[str, Any]) -> str:
    """Whole networks, ours against the better of PyTorch's eager and compiled, each in its better layout."""
    table = []
    for record in results["records"]:
        times: dict[str, float] = {}
        for name, timing in record["timings"].items():
            kind = "ours" if name.startswith("ours") else "PyTorch"
            times[kind] = min(times.get(kind, timing["median_ms"]), timing["median_ms"])
        ours, theirs, case = times["ours"], times["PyTorch"], record["case"]
        allocator = ", malloc's own settings" if record.get("allocator") == "default" else ""
        row = {
            "case": f"{record['mode']}, output stride {case['output_stride']}, N = {case['batch']}{allocator}",
            "ours / PyTorch's best": f"{ours:.0f} / {theirs:.0f} ms, **{theirs / ours:.2f}x**",
            "as one matrix product": f"{record['floor_ms']:.0f} ms",
        }
        if memory := record.get("peak_bytes"):
            row["peak memory, ours / PyTorch"] = f"{memory['ours'] / 1e6:.0f} / {memory['eager'] / 1e6:.0f} MB"
        table.append(row)
    columns = list(dict.fromkeys(column for row in table for column in row))
    machine, dates = results["machine"], sorted({f"{r['date']}, commit {r['commit']}" for r in results["records"]})
    caption = (
        "as one matrix product: the network's Multiply-Adds (threefold in training) at the rate of the fastest "
        f"`torch.mm` of the same run; fp32, medians, {machine['cores']} cores of an {machine['cpu']}; "
        f"{'; '.join(dates)}"
    )
    return markdown(table, columns) + f"\n\n{caption}."


# file of results -> the README's table from it
README_TABLES = {
    "atrous_depthwise.json": ("speed table", readme_table),
    "dense_crf.json": ("CRF table", readme_crf_table),
    "models.json": ("network table", readme_models_table),
}


GPU_TABLE = "GPU table"


def update_readme(folder: Path | None, readme: Path = README, results: Path = RESULTS) -> None:
    """README's tables: of speed from the files in ``folder`` that are there, and what it says of GPUs from all of
    ``results``."""
    import status

    text = readme.read_text()
    for file, (name, table) in README_TABLES.items():
        if folder is not None and (folder / file).exists():
            text = _replaced(text, name, table(json.loads((folder / file).read_text())))
    measured = status.runs(results)
    text = _replaced(status.update_rows(text, measured), GPU_TABLE, status.bars_table(results, measured))
    readme.write_text(text)


def _replaced(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: from benchmarks/results -->", f"<!-- end of the {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"README must have {begin} and {end}, once each")
    head, tail = text.split(begin)[0], text.split(end)[-1]
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def main() -> None:
    if sys.argv[1:2] == ["--readme"]:
        update_readme(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    for path in sorted(RESULTS.glob("*/atrous_depthwise.json")):
        path.with_suffix(".md").write_text(document(json.loads(path.read_text())))
        print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
