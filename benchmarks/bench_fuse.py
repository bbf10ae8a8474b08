"""Where a fused convolution beats what it replaces on a CPU, against the rule of deeplab_kernels/fusion/scope.py.

    python benchmarks/bench_fuse.py --threads 1 --cpu-time     # what the rule was set by, on a busy machine, too
    python benchmarks/bench_fuse.py --kernels 3 --rates 2 --layouts nhwc --modes inference
    python benchmarks/bench_fuse.py --quick                    # few channels and maps

A depthwise convolution with batch norm and ReLU, or alone, as a user's model has it, and the same under
``fuse(model, always=True)``; float32, N = 1, interleaved. One line for each kernel, stride, rate, layout and mode: the
time as it was over the fused one's, geometric mean over the channels, for each size of the output; in brackets where
the rule leaves the convolution as it was. Below: where the rule takes the slower way by over 10 %. Prints only.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import measure
import tables
import timing_options
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deeplab_kernels import fuse
from deeplab_kernels.fusion.scope import covers
from deeplab_kernels.timing import interleaved, thread_clock

LAYOUTS = measure.LAYOUTS
MODES = ("inference", "training")
KERNELS, GEOMETRIES = (3, 5, 7), ((1, 1), (2, 1), (1, 2), (1, 3), (1, 4), (1, 6))  # stride, rate
CHANNELS, MAPS = (32, 96, 384, 960), (7, 10, 14, 20, 28, 56, 112)
LARGEST = 3_000_000  # elements of the input
TOLERANCE = 1.1


@dataclass(frozen=True)
class Case:
    kernel: int
    stride: int
    rate: int
    alone: bool  # without norm and activation
    layout: str
    mode: str
    channels: int
    size: int  # of the output

    @property
    def line(self) -> tuple[str, ...]:
        kind = "alone" if self.alone else "+ norm, ReLU"
        return f"{self.kernel}x{self.kernel}", str(self.stride), str(self.rate), kind, self.layout, self.mode

    def model(self) -> nn.Sequential:
        padding = self.rate * (self.kernel // 2)
        conv = nn.Conv2d(
            self.channels, self.channels, self.kernel, self.stride, padding, self.rate, self.channels, bias=False
        )
        model = nn.Sequential(conv) if self.alone else nn.Sequential(conv, nn.BatchNorm2d(self.channels), nn.ReLU())
        return model.train(self.mode == "training").to(memory_format=LAYOUTS[self.layout])

    def input(self) -> Tensor:
        size = self.stride * self.size
        return torch.randn(1, self.channels, size, size).contiguous(memory_format=LAYOUTS[self.layout])


@dataclass(frozen=True)
class Result:
    case: Case
    ratio: float  # time as it was over the fused one's
    fused: bool  # what the rule takes

    @property
    def loss(self) -> float:
        """The time of what the rule takes over that of the other way."""
        return 1 / self.ratio if self.fused else self.ratio


def cases(args: argparse.Namespace) -> Iterator[Case]:
    channels, maps = (CHANNELS[1::2], MAPS[1::3]) if args.quick else (CHANNELS, MAPS)
    geometries = [g for g in GEOMETRIES if g[1] in args.rates]
    for kernel, (stride, rate), alone, layout, mode, c, size in itertools.product(
        args.kernels, geometries, (False, True), args.layouts, args.modes, channels, maps
    ):
        if c * (stride * size) ** 2 <= LARGEST:
            yield Case(kernel, stride, rate, alone, layout, mode, c, size)


def measure_case(case: Case, args: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    plain, x = case.model(), case.input()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    if case.mode == "training":
        x.requires_grad_()
        leaves = {"plain": [x, *plain.parameters()], "fused": [x, *fused.parameters()]}
        grad = torch.randn_like(plain(x))
        _check(plain(x), fused(x))
        steps = {
            name: lambda model=model, name=name: torch.autograd.grad(model(x), leaves[name], grad)
            for name, model in (("plain", plain), ("fused", fused))
        }
        taken = covers(fused[0], x, True, case.alone)
    else:
        with torch.inference_mode():
            _check(plain(x), fused(x))
            taken = covers(fused[0], x, True, case.alone)
        steps = {"plain": torch.inference_mode()(lambda: plain(x)), "fused": torch.inference_mode()(lambda: fused(x))}
    clock = thread_clock if args.cpu_time else None
    timings = interleaved(steps, rounds=args.rounds, candidate_seconds=args.seconds, clock=clock)
    times = {name: timing.quartiles[0] if args.cpu_time else timing.median for name, timing in timings.items()}
    return Result(case, times["plain"] / times["fused"], taken)


def _check(plain: Tensor, fused: Tensor) -> None:
    if not (error := measure.relative_error(fused.detach(), plain.detach())) < 1e-5:
        raise measure.CheckFailed(f"fused differs from plain by {error:.1e}")


def table(results: Sequence[Result]) -> str:
    sizes = sorted({result.case.size for result in results})
    lines: dict[tuple[str, ...], dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        lines[result.case.line][result.case.size].append(result)

    def cell(found: list[Result]) -> str:
        if not found:
            return "-"
        text = f"{geometric_mean(r.ratio for r in found):.2f}"
        return text if all(r.fused for r in found) else f"({text})" if not any(r.fused for r in found) else f"({text}"

    head = ("kernel", "stride", "rate", "", "layout", "mode", *map(str, sizes))
    return tables.markdown(head, ([*line, *(cell(found[size]) for size in sizes)] for line, found in lines.items()))


def summary(results: Sequence[Result]) -> str:
    slower = sorted((r for r in results if r.loss > TOLERANCE), key=lambda r: -r.loss)
    lost = geometric_mean([max(r.loss, 1.0) for r in results] or [1.0])
    lines = [f"{len(slower)} of {len(results)} cases slower than the other way by over 10 %; on average x {lost:.3f}"]
    for r in slower[:40]:
        taken = "fused" if r.fused else "as it was"
        lines.append(f"{' '.join(r.case.line)}, {r.case.channels} channels, {r.case.size}: {taken}, x {r.loss:.2f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few channels and maps")
    parser.add_argument("--kernels", type=int, nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--rates", type=int, nargs="+", choices=sorted({r for _, r in GEOMETRIES}), default=(1, 2, 3))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    return timing_options.parse(parser, arguments, None, seconds=0.15)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    timing_options.apply(args)
    results: list[Result] = []
    try:
        for case in tqdm(list(cases(args)), unit="case", dynamic_ncols=True):
            results.append(measure_case(case, args))
    finally:  # interrupted, too
        print(table(results), summary(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
