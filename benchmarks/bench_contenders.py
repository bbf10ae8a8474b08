"""Layers and whole networks, ours against PyTorch in all its ways, on the CPU or a GPU: the suite's main part.

    python benchmarks/bench_contenders.py --minutes 30        # the most important cases that fit into half an hour
    python benchmarks/bench_contenders.py --quick             # few cases, something of every axis
    python benchmarks/bench_contenders.py --subjects separable --layers A12 728x33 --dtypes fp32 bf16 --batch 1 8
    python benchmarks/bench_contenders.py --list              # what would run, with a rough estimate
    python benchmarks/bench_contenders.py --device cuda --plan gpu-bars

Merges into results/<machine>/contenders.json, case by case. Contenders: ours; eager (oneDNN, or cuDNN in its benchmark
mode), batch normalisations folded into the convolutions for inference; native (both libraries switched off); compile,
frozen (with frozen weights; the CPU's inference), max-autotune: torch.compile; copy: x.clone(). All contenders of a
case, in both layouts, take turns in one process. Ours is compared with float64 before (suite/workloads.py) and not
timed if it is wrong. A contender that fails leaves its reason in the results.

On a GPU the median is of CUDA-graph replays, so that the gaps between launches do not count; the time of ordinary
calls, with the gaps, stands beside it. Peak memory: the CPU's of a process of its own, not of what compiles; the GPU's
of the allocator. Ceilings are measured at the start of the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import measure
import torch
from suite import cases, contenders, devices, memory, workloads
from suite.devices import Function

from deeplab_kernels.timing import Timing

FILE = "contenders.json"
NETWORK_SECONDS = 4.0  # a contender of a whole network gets at least


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection = parser.add_argument_group("selection")
    add_selection(selection)
    selection.add_argument("--plan", choices=["product", "quick", "gpu-bars", "gpu-rehearsal"], default="product")
    selection.add_argument("--quick", dest="plan", action="store_const", const="quick")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "rehearsal"], default="auto")
    parser.add_argument("--minutes", type=float, default=0.0, help="leave out what does not fit; 0: no limit")
    parser.add_argument("--rounds", type=int, help="default: 9; with --quick 5")
    parser.add_argument("--seconds", type=float, help="of one contender and layout at most; default: 1, quick 0.3")
    parser.add_argument("--compile-limit", type=float, help="seconds; default: 300, quick 25")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: all cores")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(arguments)
    quick = args.plan == "quick"
    args.rounds = args.rounds or (5 if quick else 9)
    args.seconds = args.seconds or (0.3 if quick else 1.0)
    args.compile_limit = args.compile_limit or (25.0 if quick else 300.0)
    return args


def add_selection(parser: Any) -> None:
    """The options that choose from the product, here and in the suite."""
    many: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--subjects", **many, choices=cases.SUBJECTS, default=cases.SUBJECTS)
    parser.add_argument("--layers", **many, metavar="TEXT", help="those whose name contains one of these, such as A12")
    parser.add_argument("--modes", **many, choices=cases.MODES, default=cases.MODES)
    parser.add_argument("--batch", **many, type=int, metavar="N", default=cases.BATCHES, help="default: 1 8 16")
    parser.add_argument("--dtypes", **many, choices=cases.DTYPES, default=cases.DTYPES)
    parser.add_argument("--contenders", **many, choices=cases.CONTENDERS, default=cases.CONTENDERS)
    parser.add_argument("--layouts", **many, choices=cases.LAYOUTS, default=cases.LAYOUTS)


def selection_of(args: argparse.Namespace) -> cases.Selection:
    return cases.Selection(
        args.subjects, args.layers, args.modes, args.batch, args.dtypes, args.contenders, args.layouts
    )


def tasks_of(args: argparse.Namespace, device: str) -> list[cases.Task]:
    chosen = selection_of(args)
    if args.plan == "quick":
        return cases.quick(chosen)
    if args.plan.startswith("gpu"):
        tasks = cases.gpu_bars() if args.plan == "gpu-bars" else cases.gpu_rehearsal()
        return [task for task in tasks if chosen.chooses(task.case)]
    return cases.product(chosen, device)


class Clock:
    """Decides whether a case still fits. pace: seconds used over seconds estimated, of the cases so far."""

    def __init__(self, minutes: float) -> None:
        self.start, self.limit = time.monotonic(), 60 * minutes
        self.used = self.estimated = 0.0
        self.expect(1.0)

    def expect(self, pace: float) -> None:
        """Begins with ``pace``, as if ten seconds had been estimated."""
        self.used, self.estimated = 10.0 * pace, 10.0

    @property
    def pace(self) -> float:
        return self.used / self.estimated

    def fits(self, seconds: float) -> bool:
        return not self.limit or time.monotonic() - self.start + self.pace * seconds <= self.limit

    def add(self, estimated: float, used: float) -> None:
        self.estimated, self.used = self.estimated + estimated, self.used + used


# One case.


def measure_task(task: cases.Task, device: devices.Device, args: argparse.Namespace) -> dict[str, Any]:
    """Checks, then times; a JSON-ready record."""
    torch._dynamo.reset()
    case = task.case
    devices.use_tf32(case.dtype == "tf32")
    reasons: dict[str, str] = {}
    record: dict[str, Any] = {
        "name": case.name,
        "subject": case.subject,
        "mode": case.mode,
        "case": cases.to_dict(case),
        "madds": workloads.madds(case),
        "bytes": case.bytes,
        "device": device.name,
        "allocator": measure.allocator(),
        "threads": torch.get_num_threads(),
        "load_average": round(measure.load_average(), 1),
        **measure.stamp(),
    }
    wanted = list(task.contenders)
    if "ours" in wanted:
        try:
            record["relative_error"] = workloads.check(case, device.place)
        except measure.CheckFailed as error:
            reasons["ours"], record["wrong"] = str(error), True
            wanted.remove("ours")
        except Exception as error:
            reasons["ours"] = f"{type(error).__name__}: {devices.first_line(error)}"[:300]
            wanted.remove("ours")
    ready: dict[str, Function] = {}
    for contender in wanted:
        for layout in task.layouts:
            made = contenders.prepare(case, contender, layout, device.place, args.compile_limit)
            if made.function is not None:
                ready[f"{contender} {layout}"] = made.function
            else:
                reasons[f"{contender} {layout}"] = made.reason
    record |= timings_of(ready, device, args, case)
    if not args.no_memory:
        record["peak_bytes"] = peaks(task, ready, record, device)
    record["unavailable"] = {**reasons, **record.pop("no_graph")}
    return record


def timings_of(
    ready: dict[str, Function], device: devices.Device, args: argparse.Namespace, case: cases.Case
) -> dict[str, Any]:
    """``timings`` without the gaps of launches where there are graphs, ``with_gaps`` with them."""
    seconds = max(args.seconds, NETWORK_SECONDS) if case.subject == "models" else args.seconds
    if device.kind == "cpu":
        return {"timings": _summaries(device.time(ready, args.rounds, seconds)), "no_graph": {}}
    graphs: dict[str, Function] = {}
    no_graph: dict[str, str] = {}
    for name, function in ready.items():
        made = contenders.graph_of(function, device.capture)
        if made.function is not None:
            graphs[f"{name} graph"] = made.function
        else:
            no_graph[f"{name} graph"] = made.reason
    found = _summaries(device.time({**ready, **graphs}, args.rounds, seconds))
    gaps = {name: found[name] for name in ready}
    return {
        "timings": {name: found.get(f"{name} graph", timing) for name, timing in gaps.items()},
        "with_gaps": gaps,
        "no_graph": no_graph,
    }


def _summaries(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: timing.summary() for name, timing in timings.items()}


def peaks(
    task: cases.Task, ready: dict[str, Function], record: dict[str, Any], device: devices.Device
) -> dict[str, int]:
    """Bytes, of each contender in the layout in which it is fastest."""
    found: dict[str, int] = {}
    for contender in task.contenders:
        names = [name for name in ready if name.rsplit(" ", 1)[0] == contender]
        if not names or contender == "copy":
            continue
        name = min(names, key=lambda name: record["timings"][name]["median_ms"])
        peak: int | None
        if device.kind != "cpu":
            peak = device.peak_bytes(ready[name])
        elif contender in cases.COMPILED:
            continue
        else:
            peak = memory.peak_of_call(task.case, contender, name.rsplit(" ", 1)[1], torch.get_num_threads())
        if peak is not None:
            found[name] = peak
    return found


# The run.


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what fits into the time, most important first; the document, written after every case."""
    clock = Clock(args.minutes)
    device = devices.open_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tasks = tasks_of(args, device.kind)
    dtypes = {task.case.dtype for task in tasks}
    machine = device.machine([dtype for dtype in cases.DTYPES if dtype == "fp32" or dtype in dtypes])
    # A machine with a slower matrix product than the one the estimates are from is slower in all, until cases tell.
    clock.expect(120 / machine["matrix_gflop_per_s"] if device.kind == "cpu" else 0.3)
    rates = {dtype: 1e9 * gflop for dtype, gflop in machine["matrix_gflop_per_s_of"].items()}
    path = measure.results_folder(machine.get("gpu", "")) / FILE
    document: dict[str, Any] = {
        "machine": machine,
        "unavailable": cases.unavailable(device.kind, args.dtypes),
        "left_out": [],
        "records": measure.load(path)["records"],
    }
    done = 0
    for task in tasks:
        estimate = task.seconds(args.rounds, args.seconds, rates)
        if not clock.fits(estimate):
            document["left_out"].append(f"{task.case.name}, {task.case.mode}")
            continue
        start = time.monotonic()
        record = measure_task(task, device, args)
        used = time.monotonic() - start
        clock.add(estimate, used)
        record["seconds"], done = round(used, 1), done + 1
        print(line(record), file=sys.stderr, flush=True)
        document["records"] = measure.merge(document["records"], record)
        measure.save(path, document)
        device.free()
    measure.save(path, document)
    left = len(document["left_out"])
    print(f"{done} cases in {time.monotonic() - clock.start:.0f} s, {path}" + (f"; {left} left out" if left else ""))
    return document


def line(record: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {timing['median_ms']:.3g}" for name, timing in record["timings"].items())
    reasons = "".join(f"; {name}: {reason}" for name, reason in record["unavailable"].items())
    return f"{record['name']}, {record['mode']}, ms: {times}{reasons}"


def main() -> int:
    args = parse()
    if args.list:
        tasks = tasks_of(args, "cpu" if args.device != "cuda" else "cuda")
        seconds = [task.seconds(args.rounds, args.seconds) for task in tasks]
        for task, estimate in zip(tasks, seconds, strict=True):
            print(f"{estimate:6.0f} s  {task.case.name}, {task.case.mode}: {' '.join(task.contenders)}")
        print(f"{len(tasks)} cases, about {sum(seconds) / 3600:.1f} hours on 4 cores")
        return 0
    measure.use_tuned_allocator()
    try:
        document = run(args)
    except devices.NotAvailable as error:
        print(f"--device {args.device}: {error}", file=sys.stderr)
        return 2
    wrong = [record["name"] for record in document["records"] if record.get("wrong")]
    if wrong:
        print(f"wrong results, not timed: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
