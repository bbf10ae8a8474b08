"""``python -m deeplab_kernels bench``: the benchmark suite of a source checkout, and its report."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from .._files import written_whole
from ..errors import UserError

HELP = "measure the operators and models against PyTorch, and write report.html (source checkout only)"
SUBJECTS = ("models", "aspp", "separable", "depthwise", "crf", "filters")
# What the product of cases may be narrowed to; the same as in benchmarks/suite/cases.py.
AXES: dict[str, tuple[str, ...]] = {
    "modes": ("inference", "training"),
    "dtypes": ("fp32", "bf16", "tf32", "fp16"),
    "contenders": ("ours", "eager", "native", "compile", "frozen", "max-autotune", "copy"),
    "layouts": ("nhwc", "nchw"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: under 3 minutes, whatever machine")
    parser.add_argument(
        "--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=f"some of {', '.join(SUBJECTS)} (default: all)"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="leave out the least important beyond it (default: 60; 0: no limit)"
    )
    parser.add_argument("--layers", nargs="+", metavar="TEXT", help="layers whose name contains one, such as A12")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", choices=values, metavar=axis[:-1].upper(), help=", ".join(values))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="batch sizes (default: 1 8 16)")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="of layers and networks (default: a GPU where there is one)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (default: all cores)")
    parser.add_argument(
        "--compare", type=Path, metavar="RESULTS", help="a stored run: its folder, or one of its JSON files"
    )
    parser.add_argument("--report-only", action="store_true", help="measure nothing; write the report of what is there")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of results (default: benchmarks/results/<machine>; with --quick .benchmarks/quick)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def checkout() -> Path:
    """The source tree that has the benchmarks: this package's own, or the current directory.

    Raises:
        UserError: neither has them; an installed wheel comes without.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "suite" / "runner.py").is_file():
            return root
    raise UserError(
        "the benchmarks are not part of an installed package: run this in a checkout of deeplab_kernels' sources"
    )


def run(args: argparse.Namespace) -> int:
    root = checkout()
    sys.path.insert(0, str(root / "benchmarks"))
    compare, runner, stored = (importlib.import_module(f"suite.{name}") for name in ("compare", "runner", "stored"))
    wanted = _wanted(args)
    before = stored.read(args.compare) if args.compare else None
    folder = args.output or _default_folder(root, args.quick, wanted.device)
    outcomes: list[Any] = []
    try:
        if not args.report_only:
            outcomes = runner.run(wanted, folder)
    except KeyboardInterrupt:
        # What was measured until then is in the folder already.
        report, _ = _write_report(folder, before)
        print(f"report of what was measured: {report}", file=sys.stderr)
        raise
    report, results = _write_report(folder, before)
    slower = compare.slowdowns(compare.changes(before, results)) if before else []
    summary = {
        "results": str(folder),
        "report": str(report),
        "subjects": [runner.to_dict(outcome) for outcome in outcomes],
        "rows": len(results.rows),
        "missed_bars": [vars(bar) for bar in results.missed],
        "bars": [
            {"asked_by": v.demand.source, "on": v.demand.device, "what": v.demand.what, "limit": v.demand.limit,
             "measured": v.measured, "met": v.met, "worst": v.worst, "verdict": v.text}
            for v in results.verdicts
        ],
        "unavailable": [vars(entry) for entry in results.unavailable],
        "left_out": results.left_out,
        "slower": [
            {"subject": c.now.subject, "case": c.now.case, "mode": c.now.mode, "contender": c.now.contender,
             "before_ms": c.before.median_ms, "now_ms": c.now.median_ms, "ratio": c.ratio}
            for c in slower
        ],
    }  # fmt: skip
    print(json.dumps(summary, indent=2) if args.json else _text(summary))
    return int(bool(slower) or not all(outcome.ok for outcome in outcomes))


def _default_folder(root: Path, quick: bool, device: str) -> Path:
    if quick:
        return root / ".benchmarks" / "quick"
    gpu = ""
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name()
    return Path(importlib.import_module("measure").results_folder(gpu))


def _device(name: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        UserError: "cuda" where there is no such device.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device cuda: torch sees no CUDA device")
    return "cpu" if name == "cpu" or not there else "cuda"


def _wanted(args: argparse.Namespace) -> Any:
    """What suite.subjects is to run.

    Raises:
        UserError: a number below its least, no such device, or nothing is left of the product.
    """
    cases, subjects = (importlib.import_module(f"suite.{name}") for name in ("cases", "subjects"))
    for name, value, least in (("--minutes", args.minutes, 0), ("--threads", args.threads, 0)):
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{name} must be {least} or more, got {value}")
    if any(n < 1 for n in args.batch or ()):
        raise UserError(f"--batch must be 1 or more, got {' '.join(map(str, args.batch))}")
    given = {axis: getattr(args, axis) for axis in AXES if getattr(args, axis)}
    given |= {"what": args.layers, **({"batches": args.batch} if args.batch else {})}
    chosen = cases.Selection(**given)
    minutes = args.minutes
    if minutes is None:
        minutes = subjects.QUICK_MINUTES if args.quick else subjects.FULL_MINUTES
    wanted = subjects.Wanted(args.only or SUBJECTS, args.quick, minutes, chosen, args.threads, _device(args.device))
    product = [subject for subject in wanted.subjects if subject in cases.SUBJECTS]
    if product and not args.report_only and not wanted.estimates(product):
        raise UserError("no case is left: the options exclude each other, or --layers names none that there is")
    return wanted


def _write_report(folder: Path, before: Any) -> tuple[Path, Any]:
    """report.html, and its rows as Markdown and as pytest-benchmark's JSON."""
    exports, page, stored = (importlib.import_module(f"suite.{name}") for name in ("exports", "page", "stored"))
    results = stored.read(folder)
    path = folder / "report.html"
    for name, text in (
        (path.name, page.render(results, before)),
        ("report.md", exports.markdown(results)),
        ("pytest_benchmark.json", json.dumps(exports.pytest_benchmark(results), indent=1)),
    ):
        with written_whole(folder / name) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return path, results


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{s['script']}: {s['cases']} cases, {s['seconds']:.0f} s"
        + (", cut by the time limit" if s["cut"] else "" if s["ok"] else f", failed: {s['error']}")
        for s in summary["subjects"]
    ]
    if summary["left_out"]:
        lines.append(f"{len(summary['left_out'])} cases left out for want of time (--minutes)")
    for bar in summary["missed_bars"]:
        lines.append(f"missed: {bar['subject']}, {bar['case']}: {bar['what']} ({bar['source']})")
    for c in summary["slower"]:
        what = f"{c['subject']}, {c['case']}, {c['mode']}, {c['contender']}"
        lines.append(f"slower: {what}: {c['before_ms']:.3g} -> {c['now_ms']:.3g} ms, {c['ratio']:.2f} times")
    return "\n".join([*lines, f"{summary['rows']} rows; report: {summary['report']}"])
