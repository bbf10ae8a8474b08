"""``python -m deeplab_kernels doctor``: examines the installation; exit code 1 where something is broken."""

from __future__ import annotations

import argparse
import json

HELP = "examine the installation: libraries, every operator on every device, threads, what makes it slow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from .. import doctor

    findings = doctor.examine()
    print(json.dumps(doctor.to_dict(findings), indent=2) if args.json else doctor.render(findings))
    return 0 if doctor.healthy(findings) else 1
