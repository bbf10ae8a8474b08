"""``python -m deeplab_kernels bench``: the benchmark suite of a source checkout, and its report."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError

HELP = "measure the operators and models against PyTorch, and write report.html (source checkout only)"
SUBJECTS = ("models", "separable", "depthwise", "crf", "filters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: under 3 minutes on 4 cores")
    parser.add_argument(
        "--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=f"some of {', '.join(SUBJECTS)} (default: all)"
    )
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
    compare, page, rows, runner, subjects = (
        importlib.import_module(f"suite.{name}") for name in ("compare", "page", "rows", "runner", "subjects")
    )
    before = rows.read(args.compare) if args.compare else None
    folder = args.output or _default_folder(root, args.quick)
    outcomes: list[Any] = []
    try:
        if not args.report_only:
            outcomes = runner.run(subjects.jobs(args.only, args.quick), folder, args.quick)
    except KeyboardInterrupt:
        # What was measured until then is in the folder already.
        report, _ = _write_report(folder, before, page, rows)
        print(f"report of what was measured: {report}", file=sys.stderr)
        raise
    report, results = _write_report(folder, before, page, rows)
    slower = compare.slowdowns(compare.changes(before, results)) if before else []
    summary = {
        "results": str(folder),
        "report": str(report),
        "subjects": [runner.to_dict(outcome) for outcome in outcomes],
        "rows": len(results.rows),
        "missed_bars": [vars(bar) for bar in results.missed],
        "slower": [
            {"subject": c.now.subject, "case": c.now.case, "mode": c.now.mode, "contender": c.now.contender,
             "before_ms": c.before.median_ms, "now_ms": c.now.median_ms, "ratio": c.ratio}
            for c in slower
        ],
    }  # fmt: skip
    print(json.dumps(summary, indent=2) if args.json else _text(summary))
    return int(bool(slower) or not all(outcome.ok for outcome in outcomes))


def _default_folder(root: Path, quick: bool) -> Path:
    if quick:
        return root / ".benchmarks" / "quick"
    return Path(importlib.import_module("measure").results_folder())


def _write_report(folder: Path, before: Any, page: Any, rows: Any) -> tuple[Path, Any]:
    results = rows.read(folder)
    path = folder / "report.html"
    path.write_text(page.render(results, before), encoding="utf-8")
    return path, results


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{s['script']}: {s['cases']} cases, {s['seconds']:.0f} s" + ("" if s["ok"] else f", failed: {s['error']}")
        for s in summary["subjects"]
    ]
    for bar in summary["missed_bars"]:
        lines.append(f"missed: {bar['subject']}, {bar['case']}: {bar['what']}")
    for c in summary["slower"]:
        what = f"{c['subject']}, {c['case']}, {c['mode']}, {c['contender']}"
        lines.append(f"slower: {what}: {c['before_ms']:.3g} -> {c['now_ms']:.3g} ms, {c['ratio']:.2f} times")
    return "\n".join([*lines, f"{summary['rows']} rows; report: {summary['report']}"])
