"""Depthwise + batch normalisation + ReLU: ours against PyTorch's eager and compiled, shape by shape, with the bars.

    python benchmarks/bench_atrous_depthwise.py                     # all shapes, both modes; writes results/<machine>/
    python benchmarks/bench_atrous_depthwise.py --quick             # the named shapes, few rounds, under 2 minutes
    python benchmarks/bench_atrous_depthwise.py --shapes A6,A12,728x65r2 --mode inference --layout nchw --no-compile
    python benchmarks/bench_atrous_depthwise.py --list
    python benchmarks/bench_atrous_depthwise.py --floors            # bytes that must be moved, and how long that takes
    pytest benchmarks --benchmark-only                              # the named shapes, under pytest-benchmark

PYTHONPATH=<folder> measures another build of the package. Shapes: layers.py; what is timed and how: depthwise.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import bars
import depthwise
import layers
import measure
import pytest
import report
import torch

FILE = "atrous_depthwise.json"


# Under pytest-benchmark.


class Replay:
    """A clock for pytest-benchmark whose rounds last as long as the samples of an interleaved measurement.

    pytest-benchmark times one contender after the other; ours and PyTorch's must alternate to be comparable. So they
    are timed by depthwise.measure_convolution, and pytest-benchmark does the statistics, the table and the JSON.
    """

    __name__ = "interleaved"

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.now, self.inside = 0.0, False

    def __call__(self) -> float:
        if self.inside:
            self.now += self.samples.pop(0)
        self.inside = not self.inside
        return self.now


REPLAY = Replay()
KINDS = {"inference": ("ours", "eager", "clone"), "training": ("ours", "eager")}


@functools.cache
def interleaved_record(mode: str, shape: layers.Shape) -> dict:
    options = depthwise.Options(dtypes=("float32",), compile=False, rounds=7, candidate_seconds=0.3)
    return depthwise.measure_convolution(depthwise.Convolution.of(shape), mode, options, shape.name, samples=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-shapes")
    shapes = layers.shapes() if every else layers.shapes(layers.NAMED.values(), (1,))
    cases = [
        pytest.param(mode, shape, layout, kind, id=f"{mode}-{shape.name}-{layout}-{kind}")
        for mode, kinds in KINDS.items()
        for shape in shapes
        for layout in measure.LAYOUTS
        for kind in kinds
    ]
    metafunc.parametrize(("mode", "shape", "layout", "kind"), cases)


@pytest.mark.benchmark(timer=REPLAY)
def test_depthwise_bn_act(benchmark, mode: str, shape: layers.Shape, layout: str, kind: str) -> None:
    record = interleaved_record(mode, shape)
    timing = record["timings"][depthwise.contender(kind, "float32", layout)]
    benchmark.group = f"{mode} {shape.name} {layout}"
    benchmark.extra_info |= {"allocator": record["allocator"], "threads": record["threads"]}
    if kind == "ours":
        benchmark.extra_info["bars"] = [
            str(bar) for bar in bars.bars(record, measure.cache_bytes()) if bar.layout == layout
        ]
    REPLAY.samples = [ms / 1e3 for ms in timing["samples_ms"]]
    benchmark.pedantic(lambda: None, rounds=len(REPLAY.samples))


# As a command.


def select(names: str | None, batches: list[int], quick: bool) -> list[layers.Shape]:
    """Shapes by alias (A12), by description (2048x33r12), either with /N4; all of them without names."""
    if not names:
        chosen = list(layers.NAMED.values()) if quick else None
        return layers.shapes(chosen, batches)
    by_name = {layer.name.split(":")[-1]: layer for layer in layers.all_layers()} | layers.NAMED
    chosen = []
    for name in names.split(","):
        stem, _, batch = name.partition("/N")
        stem = stem.split(":")[-1]
        if stem not in by_name:
            raise SystemExit(f"--shapes: {name!r} is none of {', '.join(by_name)}")
        chosen += [layers.Shape(by_name[stem], n) for n in ([int(batch)] if batch else batches)]
    return chosen


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", metavar="A6,728x65r2/N4,...", help="default: all (see --list)")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 and 4; with --quick or --shapes 1")
    parser.add_argument("--mode", choices=["inference", "training", "both"], default="both")
    parser.add_argument("--inference", dest="mode", action="store_const", const="inference")
    parser.add_argument("--training", dest="mode", action="store_const", const="training")
    parser.add_argument("--layout", choices=["nchw", "nhwc", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both", help="of inference")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--compile-training", action="store_true", help="torch.compile for training too (slow)")
    parser.add_argument("--no-pytorch", action="store_true", help="time ours and x.clone() only")
    parser.add_argument("--default-allocator", action="store_true", help="do not raise malloc's thresholds")
    parser.add_argument(
        "--quick", action="store_true", help="the named shapes with N = 1, few rounds, no torch.compile"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--min", action="store_true", help="judge by minima (a busy machine); nothing is saved")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--json", type=Path, help="merge the records into this file; a full run has a default")
    parser.add_argument("--floors", action="store_true", help="print what moving the bytes takes and stop")
    parser.add_argument("--list", action="store_true", help="print the shapes and stop")
    args = parser.parse_args(arguments)
    if args.min and args.json:
        parser.error("--min is for looking, not for keeping: leave --json out")
    return args


def options_of(args: argparse.Namespace) -> depthwise.Options:
    return depthwise.Options(
        layouts=tuple(measure.LAYOUTS) if args.layout == "both" else (args.layout,),
        dtypes=tuple(depthwise.DTYPES) if args.dtype == "both" else (args.dtype,),
        compile=not (args.no_compile or args.quick),
        compile_training=args.compile_training,
        pytorch=not args.no_pytorch,
        rounds=args.rounds or (5 if args.quick else 15),
        candidate_seconds=0.3 if args.quick else 1.0,
    )


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def floors(shapes: list[layers.Shape]) -> str:
    """Markdown: the bytes of each shape and the time that moving them takes at the best speed of x.clone()."""
    table = []
    for shape in shapes:
        conv = depthwise.Convolution.of(shape)
        x = torch.randn(conv.batch, conv.channels, conv.height, conv.width)
        clone = measure.interleaved({"clone": x.clone}, rounds=15)["clone"].minimum
        speed = 2 * x.nbytes / clone / 1e6
        table.append(
            {
                "shape": shape.name,
                "x MB": f"{x.nbytes / 1e6:.1f}",
                "out MB": f"{shape.output_bytes() / 1e6:.1f}",
                "clone ms": f"{clone:.3g}",
                "GB/s": f"{speed:.0f}",
                "inference floor ms": f"{conv.floor_ms(speed):.3g}",
                "training floor ms": f"{conv.floor_ms(speed, 'training'):.3g}",
            }
        )
    return report.markdown(table, list(table[0]))


def run(args: argparse.Namespace) -> list[dict]:
    if args.threads:
        torch.set_num_threads(args.threads)
    batches = args.batch or ([1] if args.quick or args.shapes else [1, 4])
    shapes = select(args.shapes, batches, args.quick)
    if args.list:
        print("\n".join(shape.name for shape in shapes))
        return []
    if args.floors:
        print(f"copy of 256 MB: {measure.copy_bandwidth():.1f} GB/s, {torch.get_num_threads()} threads")
        print(floors(shapes))
        return []
    path = args.json
    if path is None and not (args.quick or args.shapes or args.no_pytorch or args.min):
        path = measure.results_folder() / FILE
    document = measure.load(path) if path else {"records": []}
    document["machine"] = measure.machine()
    if (load := measure.load_average()) > 1:
        print(f"{load:.1f} other processes were running on average: figures of a busy machine", file=sys.stderr)
    options, start, done = options_of(args), time.monotonic(), []
    print(f"measuring {Path(depthwise.ops.__file__).parent.parent} ({document['machine']['instruction_set']})")
    for mode in ("inference", "training") if args.mode == "both" else (args.mode,):
        records = []
        for i, shape in enumerate(shapes):
            progress(f"{mode} {i + 1}/{len(shapes)} {shape.name}")
            record = depthwise.measure_convolution(depthwise.Convolution.of(shape), mode, options, shape.name)
            if args.min:
                for timing in record["timings"].values():
                    timing["median_ms"] = timing["min_ms"]
            records.append(record)
            if path:
                document["records"] = measure.merge(document["records"], record)
                measure.save(path, document)
        progress("")
        table = report.rows(records, document["machine"])
        statistic = "minima" if args.min else "medians"
        threads = document["machine"]["threads"]
        print(f"{mode}, ms, {statistic}, {threads} threads, {measure.allocator()} allocator")
        print(report.text(table, report.used_columns(report.COLUMNS[mode], table)))
        print(*report.summary(records, document["machine"]), "", sep="\n")
        done += records
    if path:
        path.with_suffix(".md").write_text(report.document(document))
        print(f"written: {path}, {path.with_suffix('.md')}")
    print(f"copy {document['machine']['copy_gb_per_s']} GB/s; {time.monotonic() - start:.0f} s in all")
    return done


def main() -> None:
    args = parse()
    if not args.default_allocator:
        measure.use_tuned_allocator()
    records = run(args)
    cache = measure.cache_bytes()
    if not all(bar.passed for record in records for bar in bars.bars(record, cache)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
