"""The whole separable convolution in inference against PyTorch, at each of DeepLab v3+ Xception-65's, on the CPU.

    python benchmarks/bench_atrous_separable.py                 # writes results/<machine>/atrous_separable.{json,md}
    python benchmarks/bench_atrous_separable.py --quick             # three blocks
    python benchmarks/bench_atrous_separable.py --threads 1 --cpu-time --no-write # on a busy machine
    pytest benchmarks/bench_atrous_separable.py --benchmark-only

Contenders, float32, in both layouts: ours as one kernel and as two; PyTorch eager with both batch norms folded into the
convolutions' weights; torch.compile of the modules with frozen weights (--compile). All are interleaved in one process.
"Gain" is PyTorch's best over ours of the same layout, and over our best. Notes: NOTES_atrous_separable.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import layers
import measure
import pytest
import tables
import timing_options
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_kernels import AtrousSeparableConv2d
from deeplab_kernels.nn.init import truncated_normal_
from deeplab_kernels.timing import interleaved, thread_clock

FILE = "atrous_separable.json"
QUICK = ("728x33->728", "A12:2048x33r12->relu->256", "256x129->256", "256x129->relu->256")
LAYOUTS = measure.LAYOUTS


class PlainBlock(nn.Module):
    """What PyTorch users write, with batch norms folded into the convolutions where ``fold``."""

    def __init__(self, ours: AtrousSeparableConv2d, fold: bool) -> None:
        super().__init__()
        depthwise = nn.Conv2d(
            ours.in_channels,
            ours.in_channels,
            3,
            ours.stride,
            ours.dilation,
            ours.dilation,
            ours.in_channels,
            bias=False,
        )
        depthwise.weight = ours.depthwise.weight
        pointwise = nn.Conv2d(ours.in_channels, ours.out_channels, 1, bias=False)
        pointwise.weight = ours.pointwise.weight
        halves = [(depthwise, ours.depthwise_norm), (pointwise, ours.pointwise_norm)]
        if fold:
            fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
            halves = [(fuse(conv.eval(), norm), nn.Identity()) for conv, norm in halves]
        (self.depthwise, self.depthwise_norm), (self.pointwise, self.pointwise_norm) = halves
        self.before = ours.pre_activation is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.pointwise_norm(self.pointwise(self.depthwise_norm(self.depthwise(F.relu(x)))))
        y = F.relu(self.depthwise_norm(self.depthwise(x)), inplace=True)
        return F.relu(self.pointwise_norm(self.pointwise(y)), inplace=True)


def build(block: layers.Block) -> AtrousSeparableConv2d:
    """Ours, with weights and statistics as a trained block could have them."""
    torch.manual_seed(0)
    layer, inner = block.layer, "relu" if block.inner_activation else None
    module = AtrousSeparableConv2d(
        layer.channels, block.out_channels, 3, layer.stride, layer.rate, layer.rate, depthwise_norm=True,
        pointwise_norm=True, pre_activation=None if inner else "relu", depthwise_activation=inner,
        pointwise_activation=inner,
    )  # fmt: skip
    for conv in (module.depthwise, module.pointwise):
        truncated_normal_(conv.weight, conv.weight[0].numel() ** -0.5)
    for norm in (module.depthwise_norm, module.pointwise_norm):
        for value, low, high in ((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 1.5), (norm.bias, -0.2, 0.2)):
            value.detach().uniform_(low, high)
    return module.eval().requires_grad_(False)


def check(block: layers.Block, module: AtrousSeparableConv2d, x: Tensor, outputs: dict[str, Tensor]) -> None:
    """Ours against float64 on some pixels: at most twice plain torch's error."""
    exact = PlainBlock(module, fold=False).double()(x.double())
    module.float()
    plain = measure.relative_error(PlainBlock(module, fold=False)(x), exact)
    for name, out in outputs.items():
        error = measure.relative_error(out, exact)
        if not error <= max(2 * plain, 16 * torch.finfo(torch.float32).eps):
            raise measure.CheckFailed(f"{name} at {block.name}: error {error:.2e}, plain torch {plain:.2e}")


def candidates(block: layers.Block, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    module = build(block)
    x = torch.randn(1, block.layer.channels, block.layer.size, block.layer.size)
    found: dict[str, Callable[[], Tensor]] = {}

    def run(execution: str, image: Tensor) -> Tensor:
        module.execution = execution
        return module(image)

    folded = PlainBlock(module, fold=True).eval()
    for layout, memory_format in LAYOUTS.items():
        image = x.contiguous(memory_format=memory_format)
        for execution in ("whole", "two_kernels"):
            found[f"{execution} {layout}"] = partial(run, execution, image)
        plain = build_copy(folded, memory_format)
        found[f"eager {layout}"] = partial(plain, image)
        if compiled:
            found[f"compile {layout}"] = partial(torch.compile(plain, dynamic=False, options={"freezing": True}), image)
    check(block, module, x, {name: found[name]() for name in found if name.split()[0] in ("whole", "two_kernels")})
    return found


def build_copy(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    for name in ("depthwise", "pointwise"):
        conv = getattr(module, name)
        twin = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        twin.load_state_dict(conv.state_dict())
        setattr(copy, name, twin.to(memory_format=memory_format).requires_grad_(False))
    return copy.eval()


def measure_block(block: layers.Block, args: argparse.Namespace) -> dict:
    functions = candidates(block, args.compile)
    with torch.no_grad():
        clock = thread_clock if args.cpu_time else None
        timings = interleaved(functions, rounds=args.rounds, candidate_seconds=args.seconds, clock=clock)
    layer = block.layer
    madds = layer.out_size**2 * layer.channels * (9 + block.out_channels)
    return {
        "name": block.name,
        "madds": madds,
        "bytes": 4 * (layer.channels * layer.size**2 + block.out_channels * layer.out_size**2),
        "threads": torch.get_num_threads(),
        "load_average": round(measure.load_average(), 1),
        "timings": {name: timing.summary() for name, timing in timings.items()},
    }


HEAD = ("block", "GMAdd", "whole, NCHW / NHWC, ms", "GFLOP/s", "two kernels", "eager", "compiled", "gain NCHW / NHWC",
        "gain, best against best")  # fmt: skip


def table(records: list[dict], statistic: str) -> str:
    return tables.markdown(HEAD, (row(record, statistic) for record in records)) + "\n"


def row(record: dict, statistic: str) -> list[str]:
    whole, two, eager, compiled = (
        tables.milliseconds(record, kind, statistic) for kind in ("whole", "two_kernels", "eager", "compile")
    )
    best = [min(pair) for pair in zip(eager, compiled or eager, strict=True)]
    rates = [2e-6 * record["madds"] / t for t in whole]
    return [
        record["name"],
        f"{record['madds'] / 1e9:.2f}",
        tables.pair(whole),
        tables.pair(rates, 0),
        *map(tables.pair, (two, eager, compiled, [b / w for b, w in zip(best, whole, strict=True)])),
        f"{min(best) / min(whole):.2f}",
    ]


def chosen(args: argparse.Namespace) -> list[layers.Block]:
    distinct = sorted({*layers.xception65_blocks(16), *(layers.xception65_blocks(8) if args.output_stride_8 else ())})
    wanted = QUICK if args.quick else args.blocks.split(",") if args.blocks else None
    if wanted is None:
        return distinct
    known = {name for block in distinct for name in block.names}
    if unknown := set(wanted) - known:
        raise SystemExit(f"--blocks: {', '.join(sorted(unknown))}: none of {', '.join(b.name for b in distinct)}")
    return [block for block in distinct if block.names & set(wanted)]


@pytest.mark.parametrize("contender", ["whole nhwc", "two_kernels nhwc", "eager nhwc"])
def test_middle_flow(benchmark, contender: str) -> None:
    block = next(block for block in layers.xception65_blocks(16) if block.name == QUICK[0])
    with torch.no_grad():
        benchmark.pedantic(candidates(block, compiled=False)[contender], rounds=5, warmup_rounds=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--blocks", help="names of blocks, with commas between")
    parser.add_argument("--output-stride-8", action="store_true", help="the blocks of output stride 8 too")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: some seconds a block and layout")
    return timing_options.parse(parser, arguments, FILE, seconds=1.0)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    timing_options.apply(args)
    records: list[dict] = []
    statistic = "min_ms" if args.cpu_time else "median_ms"
    file = measure.results_folder() / FILE
    content = {} if args.no_write else {"machine": measure.machine(), **measure.stamp(), "records": records}
    for block in chosen(args):
        torch._dynamo.reset()
        records.append(measure_block(block, args))
        print(table(records[-1:], statistic).splitlines()[-1], file=sys.stderr, flush=True)
        if content:
            head = f"{measure.cpu_name()}, {torch.get_num_threads()} threads.\n\n"
            measure.save(file, content, head + table(records, statistic))
    print(table(records, statistic))
    return 0


if __name__ == "__main__":
    sys.exit(main())
