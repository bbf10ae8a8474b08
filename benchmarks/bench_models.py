"""Whole networks on the CPU: ours against the same architecture in plain PyTorch.

    python benchmarks/bench_models.py                   # writes results/<machine>/models.json and .md
    python benchmarks/bench_models.py --quick           # a small network and image, nothing compiled; writes nothing
    python benchmarks/bench_models.py --cases training8 # one case, merged into the results
    python benchmarks/bench_models.py --table-5         # inference of the v3+ paper's other variants too
    python benchmarks/bench_models.py --cases training16 training8 --default-allocator   # beside the others

DeepLab v3+ on Xception-65 at 513 x 513, fp32, output stride 16 and 8: inference of one image, and a training step
(forward, cross entropy, backward) of two. The plain network has the same parameters, every separable convolution of it
being nn.Conv2d, nn.BatchNorm2d and nn.ReLU; for inference its batch normalisations are folded into the convolutions
(ours are not: the operators take them as they are), eagerly and by torch.compile with freezing. Eager runs in both
layouts, and the better one is the yardstick; compiled code is measured in channels_last (--compile-layouts).

All contenders of a case alternate in one process. One whose first call takes longer than --seconds is not called again:
that call, a cold one, is its sample. Nothing is timed whose result differs: plain and ours are compared in float64,
forward and all gradients, on a small image, and every inference at full size. The floor is the network's Multiply-Adds
(three times for a training step) at the rate of the fastest matrix product of the same run. Peak memory is the growth
of a process that does nothing but one call, in the layout that was faster.

The column allocator: "tuned" is glibc's malloc told to keep what is freed, so that kernels are compared and not page
faults; "default" (--default-allocator) is what a user has who sets nothing: every tensor above 32 MB is mapped, its
pages cleared and given back at each use, by ours and by PyTorch's operators alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import bars
import measure
import report
import torch
from bench_dense_crf import peak_bytes
from networks import (
    CASES,
    COMPILED,
    EAGER,
    OURS,
    QUICK,
    TABLE_5,
    Case,
    build,
    check,
    images,
    step,
)
from torch import Tensor
from tqdm import tqdm

from deeplab_kernels import models
from deeplab_kernels.timing import interleaved

FILE = "models.json"
COLUMNS = [
    "case",
    "allocator",
    "ours NCHW",
    "ours NHWC",
    "eager NCHW",
    "eager NHWC",
    "compiled NCHW",
    "compiled NHWC",
    "ratio",
    "spread",
    "Multiply-Adds",
    "floor",
    "of ceiling",
    "MB ours",
    "MB eager",
    "bars",
]


# Contenders.


def contender(case: Case, kind: str, layout: str) -> Callable[[], Tensor]:
    model = build(case, kind).to(memory_format=measure.LAYOUTS[layout])
    x = images(case).contiguous(memory_format=measure.LAYOUTS[layout])
    call: Callable[[Tensor], Tensor] = model
    if kind == COMPILED:
        call = torch.compile(model, dynamic=False, options={"freezing": True})
    if case.mode == "inference":
        return lambda: call(x)
    labels = torch.randint(0, 21, (case.batch, case.size, case.size), generator=torch.Generator().manual_seed(2))
    return lambda: step(model, x, labels)


def contenders(case: Case, compile_layouts: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    found = {f"{kind} {layout}": contender(case, kind, layout) for kind in (OURS, EAGER) for layout in measure.LAYOUTS}
    if case.mode == "inference":
        found |= {f"{COMPILED} {layout}": contender(case, COMPILED, layout) for layout in compile_layouts}
    return found


def check_outputs(case: Case, functions: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Largest relative difference of each output from the eager network's; also what compiles."""
    expected = functions[f"{EAGER} nchw"]().double()
    errors = {name: measure.relative_error(function(), expected) for name, function in functions.items()}
    for name, error in errors.items():
        if not error < 1e-3:  # of float32 through a hundred layers
            raise measure.CheckFailed(f"{case.name}: {name} differs by {error:.2g}")
    return errors


def memory_of(case: Case, kind: str, layout: str, threads: int) -> int:
    """Growth of a process's peak by the first call, in bytes."""
    arguments = json.dumps({"case": asdict(case), "kind": kind, "layout": layout, "threads": threads})
    command = [sys.executable, __file__, "--memory", arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(arguments: Mapping[str, Any]) -> None:
    torch.set_num_threads(arguments["threads"])
    case = Case(**arguments["case"])
    torch.ones(2, requires_grad=True).mul(2).backward(torch.ones(2))  # loads what the first backward pass loads
    with torch.inference_mode(case.mode == "inference"):
        function = contender(case, arguments["kind"], arguments["layout"])
        before = peak_bytes()
        function()
    print(peak_bytes() - before)


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Checks, then times; a JSON-ready record."""
    torch._dynamo.reset()
    equal = check(case)
    variant = {"decoder": case.decoder, "separable": case.separable}
    network = models.build(case.model, 21, case.output_stride, device="meta", **variant)
    madds = case.batch * models.madds(network, case.size, "true") * (3 if case.mode == "training" else 1)
    rate = measure.matrix_rate()
    with torch.inference_mode(case.mode == "inference"):
        functions = contenders(case, options.compile_layouts)
        errors = check_outputs(case, functions) if case.mode == "inference" else {}
        timings = interleaved(functions, rounds=case.rounds, warmup=1, candidate_seconds=options.seconds)
    record: dict[str, Any] = {
        "name": case.name,
        "mode": case.mode,
        "case": asdict(case),
        "madds": madds,
        "gemm_madds_per_s": rate,
        "floor_ms": madds / rate * 1e3,
        "float64_difference": equal,
        "relative_error": errors,
        "timings": {name: timing.summary() for name, timing in timings.items()},
        "allocator": measure.allocator(),
        "threads": torch.get_num_threads(),
        "load_average": round(measure.load_average(), 1),
        **measure.stamp(),
    }
    del functions
    if not options.no_memory:
        record["peak_bytes"] = {
            kind: memory_of(case, kind, best(record, kind)[1].split()[1], torch.get_num_threads())
            for kind in (OURS, EAGER)
        }
    return record


# Bars and tables.


def best(record: Mapping[str, Any], *kinds: str) -> tuple[float, str]:
    """Milliseconds and name of the fastest contender of these kinds."""
    return min((t["median_ms"], name) for name, t in record["timings"].items() if name.split()[0] in kinds)


def judged(record: Mapping[str, Any]) -> list[bars.Bar]:
    """The demands on the whole network; its variants without decoder or SC have none."""
    case = record["case"]
    found = []
    if case["model"] == Case.model and case.get("decoder", True) and case.get("separable", True):
        ratio = best(record, EAGER, COMPILED)[0] / best(record, OURS)[0]
        found = bars.network(record["mode"], case["output_stride"], ratio)
    if memory := record.get("peak_bytes"):
        found.append(bars.bar("network memory", memory[OURS] / memory[EAGER], "memory of eager's"))
    return found


def failures(record: Mapping[str, Any]) -> list[str]:
    return [f"{bar.shortfall} ({bars.DEMANDS[bar.demand].source})" for bar in judged(record) if not bar.passed]


def row(record: Mapping[str, Any]) -> dict[str, str]:
    ours, theirs = best(record, OURS), best(record, EAGER, COMPILED)
    timing = record["timings"][ours[1]]
    cells = {
        "case": f"{record['mode']}, {record['name'].split(', ', 1)[1]}",
        "allocator": record.get("allocator", "tuned"),
        "ratio": f"{theirs[0] / ours[0]:.2f}",
        "spread": f"{timing['iqr_ms'] / timing['median_ms']:.0%}",
        "Multiply-Adds": f"{record['madds'] / 1e9:.1f} B",
        "floor": f"{record['floor_ms']:.0f}",
        "of ceiling": f"{record['floor_ms'] / ours[0]:.0%}",
        "bars": "; ".join(failures(record)) or "met",
    }
    for name, values in record["timings"].items():
        kind, layout = name.split()
        once = " (once)" if values["rounds"] == 1 else ""
        cells[f"{kind} {layout.upper()}"] = f"{values['median_ms']:.0f}{once}"
    for kind, size in record.get("peak_bytes", {}).items():
        cells[f"MB {kind}"] = f"{size / 1e6:.0f}"
    return cells


def table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [row(record) for record in records]
    return report.markdown(rows, report.used_columns(COLUMNS, rows))


def document(results: Mapping[str, Any]) -> str:
    """The Markdown page of a results file."""
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["machine"].items())
    commits = sorted({f"{r['commit']} ({r['date']})" for r in results["records"]})
    rates = ", ".join(f"{r['gemm_madds_per_s'] / 1e9:.0f}" for r in results["records"])
    return "\n".join(
        [
            "# Whole networks on the CPU",
            "",
            f"Machine: {facts}. Commit {', '.join(commits)}.",
            "",
            "DeepLab v3+ on Xception-65, fp32. Milliseconds, medians of interleaved rounds; ratio is the better of",
            "PyTorch's eager (batch normalisations folded for inference) and compiled (frozen) over ours, both in the",
            "better layout; spread the interquartile range of ours over its median; floor the Multiply-Adds (threefold",
            f"in training) at the rate of the fastest matrix product of the same run ({rates} G/s); MB the growth of",
            "the process's peak by one call. Allocator: tuned, malloc keeps what is freed; default, the C library's",
            "own settings, what a user has. What is measured, exactly: `bench_models.py`.",
            "",
            table(results["records"]),
            "",
        ]
    )


def chosen(options: argparse.Namespace) -> list[Case]:
    if options.quick:
        return [case for case in QUICK if not options.cases or case.key in options.cases]
    every = (*CASES, *TABLE_5)
    return [
        case for case in every if (case.key in options.cases if options.cases else case in CASES or options.table_5)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [case.key for case in (*CASES, *TABLE_5)]
    parser.add_argument("--quick", action="store_true", help="a small network, few rounds, nothing compiled or written")
    parser.add_argument("--cases", nargs="+", choices=keys, metavar="CASE", help=", ".join(keys))
    parser.add_argument("--table-5", action="store_true", help="the paper's variants without decoder and SC, too")
    parser.add_argument("--seconds", type=float, default=12, help="of a contender before it leaves the rotation")
    parser.add_argument("--compile-layouts", nargs="*", choices=list(measure.LAYOUTS), default=["nhwc"])
    parser.add_argument("--default-allocator", action="store_true", help="do not raise malloc's thresholds")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores by default")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        report_memory(json.loads(options.memory))
        return 0
    if not options.default_allocator:
        measure.use_tuned_allocator()
    if options.quick:
        options.compile_layouts = []
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    path = measure.results_folder() / FILE
    records = []
    for case in tqdm(chosen(options), disable=None):
        records.append(run(case, options))
        if not options.quick:
            results = measure.load(path)
            results = {"machine": measure.machine(), "records": measure.merge(results["records"], records[-1])}
            measure.save(path, results)
            path.with_suffix(".md").write_text(document(results))
    print(table(records))
    print(f"{time.perf_counter() - start:.0f} s" + ("" if options.quick else f", {path}"))
    return 0 if options.quick else int(any(failures(record) for record in records))


if __name__ == "__main__":
    sys.exit(main())
