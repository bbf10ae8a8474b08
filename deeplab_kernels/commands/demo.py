"""``python -m deeplab_kernels demo``: the main job from end to end."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..demo.results import Results

HELP = "train a small DeepLab v3+ on drawn scenes, segment unseen ones and photographs, and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="folder to write into (default: demo)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the scenes, the weights and the crops (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="only check that every part runs; the figures mean little")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps instead of the default")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="seconds of training at most; it is planned shorter if need be"
    )
    parser.add_argument(
        "--photo", type=Path, action="append", metavar="FILE", help="segment this photograph, too (may be repeated)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    for name in ("steps", "threads", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")

    from ..demo.photographs import bundled, given

    photographs = [*(bundled(("coins",)) if args.quick else bundled()), *(given(path) for path in args.photo or [])]
    import dataclasses

    import torch

    from ..demo import main_job
    from ..densecrf import set_num_threads

    if args.threads:
        torch.set_num_threads(args.threads)
        set_num_threads(args.threads)
    changes: dict[str, Any] = {"steps": args.steps, "time_limit": args.time_limit}
    settings = dataclasses.replace(
        main_job.QUICK if args.quick else main_job.FULL, **{k: v for k, v in changes.items() if v is not None}
    )
    results = main_job.run(
        args.output,
        seed=args.seed,
        settings=settings,
        photographs=photographs,
        command=_command(args),
        quick=args.quick,
    )
    print(json.dumps(results.summary(), indent=2) if args.json else _text(results, args.output))
    return 0


def _command(args: argparse.Namespace) -> str:
    parts = ["python -m deeplab_kernels demo", f"--output {args.output}", f"--seed {args.seed}"]
    parts += ["--quick"] if args.quick else []
    parts += [f"--{n.replace('_', '-')} {v}" for n in ("steps", "time_limit", "threads") if (v := getattr(args, n))]
    return " ".join([*parts, *(f"--photo {path}" for path in args.photo or [])])


def _text(r: Results, output: Path) -> str:
    lines = [f"mean IoU {100 * r.mean_iou:.1f} % on {r.test_scenes} unseen scenes ({len(r.losses)} steps of training)"]
    for name, value in zip(r.class_names, r.iou, strict=True):
        lines.append(f"  {name:<12}" + ("     -" if math.isnan(value) else f"{100 * value:6.1f} %"))
    lines.append("depthwise + batch normalisation + ReLU, ms      layout  task       ours   PyTorch  ratio")
    for row in r.speed:
        what = f"  {row.layer.name}, {row.layer.channels} x {row.layer.size} x {row.layer.size}"
        times = f"{row.ours_ms:8.2f}  {row.torch_ms:8.2f}  {row.ratio:5.1f}"
        lines.append(f"{what:<47} {row.layout:<7} {row.task:<9}{times}")
    lines.append(f"{sum(r.seconds.values()):.0f} s in all; report: {output / 'report.html'}")
    return "\n".join(lines)
