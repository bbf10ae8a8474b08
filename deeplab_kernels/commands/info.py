"""``python -m deeplab_kernels info``: what is installed, what was built, what serves where."""

from __future__ import annotations

import argparse
import json

HELP = "print versions, what was built, and which backend serves each operator on each device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from .. import info

    report = info.collect()
    print(json.dumps(report, indent=2) if args.json else info.render(report))
    return 0
