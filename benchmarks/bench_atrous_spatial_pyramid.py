"""The spatial pyramid of DeepLab v3+: its operator, and the whole ASPP stage, against PyTorch, on the CPU.

    python benchmarks/bench_atrous_spatial_pyramid.py        # results/<machine>/atrous_spatial_pyramid.{json,md}
    python benchmarks/bench_atrous_spatial_pyramid.py --quick                        # one shape
    python benchmarks/bench_atrous_spatial_pyramid.py --table             # measures nothing: the table of what is there
    python benchmarks/bench_atrous_spatial_pyramid.py --threads 1 --cpu-time --no-write       # on a busy machine
    pytest benchmarks/bench_atrous_spatial_pyramid.py --benchmark-only

Contenders, float32, both layouts, inference and training step (forward and backward), interleaved in one process:
- operator: depthwise convolutions with batch norm and ReLU at all rates, and the image's mean: ours in one pass, ours
  rate by rate, PyTorch eager (batch norms folded in inference);
- stage: the ASPP with its 1x1 branch, pooling and projection to 256 channels: ours, PyTorch eager likewise,
  torch.compile with frozen weights (--compile, inference).
Merges into the results case by case, so that a run that is cut keeps what it measured.
"Floor" is the stage's arithmetic at the rate of the fastest matrix product of the same run (three times that in
training). Notes: NOTES_atrous_spatial_pyramid.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import pytest
import tables
import timing_options
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_kernels import ops
from deeplab_kernels.models.heads.aspp import ASPP
from deeplab_kernels.timing import interleaved, thread_clock

FILE = "atrous_spatial_pyramid.json"
LAYOUTS = measure.LAYOUTS
RESULTS = 256
MODES = ("inference", "training")


@dataclass(frozen=True)
class Shape:
    channels: int
    size: int
    rates: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.size}r{'/'.join(map(str, self.rates))} N{self.batch}"

    @property
    def madds(self) -> int:
        """Of the stage."""
        branches = len(self.rates)
        pixel = self.channels * (9 * branches + RESULTS * (branches + 1)) + RESULTS * RESULTS * (branches + 2)
        return self.batch * (self.size**2 * pixel + self.channels * RESULTS)

    def image(self, layout: str) -> Tensor:
        return torch.randn(self.batch, self.channels, self.size, self.size).contiguous(memory_format=LAYOUTS[layout])


SHAPES = [
    Shape(channels, size, rates, batch)
    for channels, size, rates in ((2048, 33, (6, 12, 18)), (2048, 65, (12, 24, 36)), (320, 33, (6, 12, 18)))
    for batch in (1, 4)
]


class PlainASPP(nn.Module):
    """What PyTorch users write, of the parameters of ours; batch norms folded into the convolutions where ``fold``."""

    def __init__(self, ours: ASPP, fold: bool) -> None:
        super().__init__()

        def block(*pairs: tuple[nn.Conv2d, nn.Module]) -> nn.Sequential:
            layers: list[nn.Module] = []
            for conv, norm in pairs:
                plain = nn.Conv2d(
                    conv.in_channels, conv.out_channels, conv.kernel_size, padding="same", dilation=conv.dilation,
                    groups=conv.groups, bias=False,
                )  # fmt: skip
                plain.weight = conv.weight
                layers += [torch.nn.utils.fusion.fuse_conv_bn_eval(plain.eval(), norm)] if fold else [plain, norm]
                layers.append(nn.ReLU(inplace=True))
            return nn.Sequential(*layers)

        self.pooling, self.pointwise, self.project = (
            block((part.conv, part.norm)) for part in (ours.pooling, ours.pointwise, ours.project)
        )
        self.atrous = nn.ModuleList(
            block((branch.depthwise, branch.depthwise_norm), (branch.pointwise, branch.pointwise_norm))
            for branch in ours.atrous
        )

    def forward(self, x: Tensor) -> Tensor:
        image = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([image, self.pointwise(x), *(branch(x) for branch in self.atrous)], 1))


def build(shape: Shape) -> ASPP:
    torch.manual_seed(0)
    head = ASPP(shape.channels, RESULTS, shape.rates, dropout=0.0)
    for norm in head.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value, low, high in ((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 1.5), (norm.bias, -1, 1)):
                value.detach().uniform_(low, high)
    return head


def check(shape: Shape) -> None:
    """Ours against float64: at most twice plain torch's error, in both modes and layouts."""
    small = Shape(shape.channels, shape.size, shape.rates, min(shape.batch, 2))
    for training in (False, True):
        head = build(small).train(training and small.batch > 1)
        x = small.image("nchw")
        with torch.no_grad():
            exact = PlainASPP(head, fold=False).train(head.training).double()(x.double())
            head.float()
            plain = measure.relative_error(PlainASPP(head, fold=False).train(head.training)(x), exact)
            for layout, memory_format in LAYOUTS.items():
                error = measure.relative_error(head(x.contiguous(memory_format=memory_format)), exact)
                if not error <= max(2 * plain, 16 * torch.finfo(torch.float32).eps):
                    raise measure.CheckFailed(f"{shape.name} {layout}: error {error:.2e}, plain torch {plain:.2e}")


Step = Callable[[], object]


def inference(function: Callable[[Tensor], object], x: Tensor) -> Step:
    def step() -> object:
        with torch.inference_mode():
            return function(x)

    return step


def training(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, parameters: Sequence[Tensor]) -> Step:
    leaves = [x.requires_grad_(), *parameters]
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in function(x)]
    return lambda: torch.autograd.grad(function(x), leaves, grads)


def stage(shape: Shape, mode: str, compiled: bool) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for layout, memory_format in LAYOUTS.items():
        head = build(shape).train(mode == "training").to(memory_format=memory_format)
        if mode == "training":
            for name, module in (("ours", head), ("eager", PlainASPP(head, fold=False))):
                run = partial(lambda module, x: [module(x)], module)
                found[f"{name} {layout}"] = training(run, shape.image(layout), [*module.parameters()])
            continue
        plain = PlainASPP(head, fold=True).eval().requires_grad_(False)
        found[f"ours {layout}"] = inference(head, shape.image(layout))
        found[f"eager {layout}"] = inference(plain, shape.image(layout))
        if compiled:
            frozen = torch.compile(plain, dynamic=False, options={"freezing": True})
            found[f"compile {layout}"] = inference(frozen, shape.image(layout))
    return found


def operator(shape: Shape, mode: str) -> dict[str, Step]:
    blocks = list(build(shape).atrous)
    norms = [block.depthwise_norm for block in blocks]
    weights = [block.depthwise.weight for block in blocks]
    states = [ops.BatchNorm(n.running_mean, n.running_var, n.weight, n.bias, n.eps) for n in norms]
    parameters = [*weights, *(p for norm in norms for p in norm.parameters())]
    is_training = mode == "training"

    def one_pass(x: Tensor) -> list[Tensor]:
        y, mean = ops.atrous_spatial_pyramid(x, weights, shape.rates, states, activation="relu", training=is_training)
        return [*y, mean]

    def rate_by_rate(x: Tensor) -> list[Tensor]:
        y = [
            ops.atrous_depthwise_bn_act(
                x, w, n.gamma, n.beta, n.mean, n.var, training=is_training, eps=n.eps, padding="same", dilation=r
            )
            for w, n, r in zip(weights, states, shape.rates, strict=True)
        ]
        return [*y, x.mean((2, 3), keepdim=True)]

    fold = torch.nn.utils.fusion.fuse_conv_bn_weights
    folded = [
        fold(w, None, n.mean, n.var, n.eps, n.gamma, n.beta) for w, n in zip(weights, states, strict=True)
    ]  # fmt: skip

    def eager(x: Tensor) -> list[Tensor]:
        def branch(r: int) -> Tensor:
            rate = shape.rates[r]
            if not is_training:
                return F.relu(F.conv2d(x, *folded[r], 1, rate, rate, shape.channels), inplace=True)
            y, n = F.conv2d(x, weights[r], None, 1, rate, rate, shape.channels), states[r]
            return F.relu(F.batch_norm(y, n.mean, n.var, n.gamma, n.beta, True, n.momentum, n.eps), inplace=True)

        return [*map(branch, range(len(shape.rates))), x.mean((2, 3), keepdim=True)]

    return {
        f"{name} {layout}": training(function, shape.image(layout), parameters)
        if is_training
        else inference(function, shape.image(layout))
        for layout in LAYOUTS
        for name, function in (("one pass", one_pass), ("rate by rate", rate_by_rate), ("eager", eager))
    }


def measure_case(shape: Shape, what: str, mode: str, args: argparse.Namespace, matrix_rate: float) -> dict:
    """matrix_rate: Multiply-Adds per second of the fastest matrix product."""
    functions = stage(shape, mode, args.compile) if what == "stage" else operator(shape, mode)
    clock = thread_clock if args.cpu_time else None
    timings = interleaved(functions, rounds=args.rounds, candidate_seconds=args.seconds, clock=clock)
    return {
        "name": shape.name,
        "what": what,
        "mode": mode,
        "madds": shape.madds * (3 if mode == "training" else 1) if what == "stage" else 0,
        "gemm_madds_per_s": matrix_rate,
        "allocator": measure.allocator(),
        "threads": torch.get_num_threads(),
        "load_average": round(measure.load_average(), 1),
        **measure.stamp(),
        "timings": {name: timing.summary() for name, timing in timings.items()},
    }


HEAD = ("shape", "what", "mode", "ours, NCHW / NHWC, ms", "rate by rate", "PyTorch", "compiled", "gain, same layout",
        "gain, best against best", "floor, ms")  # fmt: skip


def table(records: Sequence[dict], statistic: str) -> str:
    return tables.markdown(HEAD, (row(record, statistic) for record in records)) + "\n"


def row(record: dict, statistic: str) -> list[str]:
    whole, one_pass, single, eager, compiled = (
        tables.milliseconds(record, kind, statistic)
        for kind in ("ours", "one pass", "rate by rate", "eager", "compile")
    )
    ours = whole or one_pass
    best = [min(pair) for pair in zip(eager, compiled or eager, strict=True)]
    return [
        record["name"],
        record["what"],
        record["mode"],
        *map(tables.pair, (ours, single, eager, compiled, [b / o for b, o in zip(best, ours, strict=True)])),
        f"{min(best) / min(ours):.2f}",
        f"{1e3 * record['madds'] / record['gemm_madds_per_s']:.1f}" if record["madds"] else "-",
    ]


def document(results: Mapping[str, Any]) -> str:
    """The Markdown of a results file, in the order of the shapes."""
    order = [shape.name for shape in SHAPES]
    records = sorted(results["records"], key=lambda record: (order.index(record["name"]), record["what"]))
    machine, dates = results["machine"], sorted({record["date"] for record in records})
    head = f"{machine['cpu']}, {machine['threads']} threads, fp32, medians; {', '.join(dates)}."
    return f"{head}\n\n{table(records, 'median_ms')}"


def chosen(args: argparse.Namespace) -> list[Shape]:
    if args.quick or not args.shapes:
        return SHAPES[:1] if args.quick else SHAPES
    known = {shape.name: shape for shape in SHAPES}
    if unknown := set(args.shapes.split(",")) - known.keys():
        raise SystemExit(f"--shapes: {', '.join(sorted(unknown))}: none of {', '.join(known)}")
    return [known[name] for name in args.shapes.split(",")]


@pytest.mark.parametrize("contender", ["one pass nhwc", "rate by rate nhwc", "eager nchw"])
def test_operator(benchmark, contender: str) -> None:
    benchmark.pedantic(operator(SHAPES[0], "inference")[contender], rounds=5, warmup_rounds=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {SHAPES[0].name}")
    parser.add_argument("--shapes", help="names of shapes, with commas between")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the Markdown of the results again")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, of the stage in inference")
    return timing_options.parse(parser, arguments, FILE, seconds=2.0)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    timing_options.apply(args)
    file = measure.results_folder() / FILE
    results = measure.load(file)
    if args.table:
        measure.save(file, results, text := document(results))
        print(text)
        return 0
    records: list[dict] = []
    rate = measure.matrix_rate(rounds=5, clock=thread_clock if args.cpu_time else None)
    statistic = "min_ms" if args.cpu_time else "median_ms"
    if not args.no_write:
        results["machine"] = measure.machine()
    for shape in chosen(args):
        check(shape)
        for what in ("operator", "stage"):
            for mode in MODES:
                if what == "stage" and mode == "training" and shape.batch < 2:
                    continue  # the pooling branch would normalise one value per channel
                torch._dynamo.reset()
                records.append(measure_case(shape, what, mode, args, rate))
                print(table(records[-1:], statistic).splitlines()[-1], file=sys.stderr, flush=True)
                if not args.no_write:
                    results["records"] = measure.merge(results["records"], records[-1])
                    measure.save(file, results, document(results))
    print(table(records, statistic))
    return 0


if __name__ == "__main__":
    sys.exit(main())
