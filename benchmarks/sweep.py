"""Random sweep: is there a shape, rate, stride or layout where ours is slower than PyTorch?

    python benchmarks/sweep.py                              # 200 runs; writes results/<machine>/sweep.json
    python benchmarks/sweep.py --runs 20 --seed 7 --mode inference

Each run draws a convolution (kernel, stride, rate, padding, multiplier, batch, channels, height, width), a mode, a
layout and a dtype, and times ours against PyTorch eager in the same layout (inference: BN folded; training step:
conv2d, batch_norm, relu). A loss is more than 10 % slower, and is measured a second time, longer, before it counts. A
run whose result is wrong is not timed, and fails the sweep.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import depthwise
import measure
import report
import torch

TOLERANCE = 1.1
MAX_ELEMENTS = 4_000_000  # of x and of out: the sweep must end


@dataclass(frozen=True)
class Draw:
    conv: depthwise.Convolution
    mode: str
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        c = self.conv
        text = f"N{c.batch} {c.channels}x{c.height}x{c.width} k{c.kernel} s{c.stride} r{c.rate} p{c.padding}"
        return f"{self.mode} {text} m{c.multiplier} {self.layout} {self.dtype}"


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def draw(rng: random.Random, modes: Sequence[str] = ("inference", "training")) -> Draw:
    """One run; draws again until the convolution exists and is neither too large nor a single value per channel."""
    while True:
        kernel = rng.choices((3, 5, 7), (8, 1, 1))[0]
        rate = _log_uniform(rng, 1, 36)
        reach = rate * (kernel - 1)
        # Half of the runs are of the sizes that networks have, half of any.
        channels_from, size_from = (64, 17) if rng.random() < 0.5 else (1, 5)
        conv = depthwise.Convolution(
            batch=rng.choice((1, 1, 2, 4, 8)),
            channels=_log_uniform(rng, channels_from, 2048),
            height=_log_uniform(rng, size_from, 257),
            width=_log_uniform(rng, size_from, 257),
            kernel=kernel,
            stride=rng.choices((1, 2, 3), (7, 2, 1))[0],
            rate=rate,
            padding=reach // 2 if rng.random() < 0.7 else rng.randint(0, reach),
            multiplier=rng.choices((1, 2), (8, 2))[0],
        )
        mode = rng.choice(list(modes))
        layout = rng.choice(list(measure.LAYOUTS))
        dtype = rng.choices(("float32", "bfloat16"), (3, 1))[0] if mode == "inference" else "float32"
        if min(conv.out_size) < 1 or conv.batch * math.prod(conv.out_size) < 8:
            continue
        if max(conv.input_elements, conv.output_elements) <= MAX_ELEMENTS:
            return Draw(conv, mode, layout, dtype)


def draws(count: int, seed: int, modes: Sequence[str] = ("inference", "training")) -> list[Draw]:
    rng = random.Random(seed)
    return [draw(rng, modes) for _ in range(count)]


def measure_draw(run: Draw, rounds: int, candidate_seconds: float) -> dict[str, Any]:
    """Checks ours, times both; the record's ratio is ours over PyTorch's."""
    problem = depthwise.Problem(run.conv, run.mode)
    dtype = depthwise.DTYPES[run.dtype]
    peer = problem.eager_step if run.mode == "training" else problem.folded
    functions = {"ours": problem.ours(run.layout, dtype), "pytorch": peer(run.layout, dtype)}
    with torch.set_grad_enabled(run.mode == "training"):
        problem.check(run.name, functions["ours"](), dtype)
        timings = measure.interleaved(functions, rounds=rounds, candidate_seconds=candidate_seconds)
    ours, pytorch = timings["ours"].median, timings["pytorch"].median
    return {
        "name": run.name,
        "convolution": asdict(run.conv),
        "mode": run.mode,
        "layout": run.layout,
        "dtype": run.dtype,
        "ours_ms": ours,
        "pytorch_ms": pytorch,
        "ratio": ours / pytorch,
    }


def is_loss(record: Mapping[str, Any]) -> bool:
    return record["ratio"] > TOLERANCE


def quantiles(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Speed-up of ours: how it is distributed."""
    speedups = sorted(1 / r["ratio"] for r in records)
    cuts = statistics.quantiles(speedups, n=20, method="inclusive") if len(speedups) > 1 else speedups * 19
    return {"min": speedups[0], "5%": cuts[0], "25%": cuts[4], "50%": cuts[9], "75%": cuts[14], "max": speedups[-1]}


def summary(records: Sequence[Mapping[str, Any]], wrong: Sequence[str] = ()) -> str:
    lines = [f"FAIL not timed, {message}" for message in wrong]
    for mode in sorted({r["mode"] for r in records}):
        chosen = [r for r in records if r["mode"] == mode]
        spread = ", ".join(f"{name} {value:.2f}x" for name, value in quantiles(chosen).items())
        lines.append(f"{mode}: {len(chosen)} runs, speed-up over PyTorch: {spread}")
    losses = sorted((r for r in records if is_loss(r)), key=lambda r: -r["ratio"])
    lines.append(f"{'FAIL' if losses else 'PASS'}: {len(losses)} of {len(records)} runs lose more than 10 %")
    if losses:
        table = [
            {
                "run": r["name"],
                "ours ms": f"{r['ours_ms']:.3g}",
                "PyTorch ms": f"{r['pytorch_ms']:.3g}",
                "ours/PyTorch": f"{r['ratio']:.2f}",
            }
            for r in losses
        ]
        lines.append(report.text(table, list(table[0])))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["inference", "training", "both"], default="both")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--default-allocator", action="store_true", help="do not raise malloc's thresholds")
    parser.add_argument("--json", type=Path, help="default for a sweep of 200: results/<machine>/sweep.json")
    args = parser.parse_args()
    if not args.default_allocator:
        measure.use_tuned_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.json or (measure.results_folder() / "sweep.json" if args.runs >= 200 else None)
    modes = ("inference", "training") if args.mode == "both" else (args.mode,)
    document: dict[str, Any] = {
        "machine": measure.machine(),
        "seed": args.seed,
        "allocator": measure.allocator(),
        **measure.stamp(),
    }
    start, records, wrong = time.monotonic(), [], []
    for i, run in enumerate(draws(args.runs, args.seed, modes)):
        try:
            record = measure_draw(run, rounds=7, candidate_seconds=0.15)
            if is_loss(record):
                record = measure_draw(run, rounds=31, candidate_seconds=1.0) | {"first_ratio": record["ratio"]}
        except measure.CheckFailed as error:
            wrong.append(str(error))
            print(f"wrong: {error}", flush=True)
            continue
        if is_loss(record):
            print(f"loss {record['ratio']:.2f}: {run.name}", flush=True)
        records.append(record)
        if sys.stderr.isatty():
            print(f"\r\033[K{i + 1}/{args.runs}", end="", file=sys.stderr, flush=True)
        if path and i % 20 == 19:
            measure.save(path, document | {"records": records, "wrong": wrong})
    if path:
        measure.save(path, document | {"records": records, "wrong": wrong})
    print(summary(records, wrong))
    print(f"seed {args.seed}, {time.monotonic() - start:.0f} s" + (f", written: {path}" if path else ""))
    if wrong or any(map(is_loss, records)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
