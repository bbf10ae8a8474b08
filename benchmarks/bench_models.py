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
import contextlib
import copy
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import bars
import measure
import report
import torch
import torch.nn.functional as F
from bench_dense_crf import peak_bytes
from deeplab_kernels.models.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from deeplab_kernels import models
from deeplab_kernels.nn import AtrousSeparableConv2d
from deeplab_kernels.timing import interleaved

FILE = "models.json"
OURS, EAGER, COMPILED = "ours", "eager", "compiled"
CHECK_SIZE = 33
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


@dataclass(frozen=True)
class Case:
    mode: str
    output_stride: int
    batch: int
    model: str = "deeplabv3plus_xception65"
    size: int = 513
    rounds: int = 5
    decoder: bool = True
    separable: bool = True  # convolutions of the ASPP and the decoder; the paper's SC

    @property
    def key(self) -> str:
        return f"{self.mode}{self.output_stride}{self._variant('-', '-')}"

    @property
    def name(self) -> str:
        variant = self._variant(", ", " ")
        return f"{self.model}, output stride {self.output_stride}{variant}, {self.size} x {self.size}, N = {self.batch}"

    def _variant(self, before: str, space: str) -> str:
        lacking = [what for what, has in (("decoder", self.decoder), ("SC", self.separable)) if not has]
        return "".join(f"{before}no{space}{what}" for what in lacking)


CASES = (
    Case("inference", 16, 1),
    Case("inference", 8, 1, rounds=3),
    Case("training", 16, 2, rounds=3),
    Case("training", 8, 2, rounds=2),
)
# The rows of table 5 (arXiv:1802.02611) that are not among the cases.
TABLE_5 = tuple(
    Case("inference", stride, 1, rounds=3, decoder=decoder, separable=False)
    for decoder in (False, True)
    for stride in (16, 8)
)
QUICK = tuple(replace(case, batch=2, model="deeplabv3plus_small", size=65, rounds=2) for case in CASES)


# The plain network.


def plain_block(block: AtrousSeparableConv2d) -> nn.Sequential:
    """The same parameters in PyTorch's own modules."""
    old = block.depthwise
    padding = tuple((k - 1) // 2 * r for k, r in zip(old.kernel_size, old.dilation, strict=True))
    depthwise = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        padding,
        old.dilation,
        groups=old.in_channels,
        bias=old.bias is not None,
    )
    depthwise.weight, depthwise.bias = old.weight, old.bias
    activations = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
    parts = [
        activations[block.pre_activation](),
        depthwise,
        block.depthwise_norm,
        activations[block.depthwise_activation](),
        block.pointwise,
        block.pointwise_norm,
        activations[block.pointwise_activation](),
    ]
    return nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity)))


class PlainConvNormAct(ConvNormAct):
    """The convolution of the heads and shortcuts without our operators."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.activation is None:
            return y
        return F.relu6(y, inplace=True) if self.activation == "relu6" else F.relu(y, inplace=True)


def to_plain(model: nn.Module) -> nn.Module:
    """Replaces every module of ``model`` that has operators of ours, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, AtrousSeparableConv2d):
            setattr(model, name, plain_block(child))
        elif isinstance(child, ConvNormAct):
            child.__class__ = PlainConvNormAct  # parameters, buffers and what asks for them stay
        else:
            to_plain(child)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Batch normalisations into the convolutions before them, in place; evaluation mode only."""
    for name, child in list(model.named_children()):
        if isinstance(child, ConvNormAct):
            child.conv, child.norm = fuse_conv_bn_eval(child.conv, child.norm), nn.Identity()
        elif isinstance(child, nn.Sequential):
            parts: list[nn.Module] = []
            for part in child:
                if isinstance(part, nn.BatchNorm2d) and parts and isinstance(parts[-1], nn.Conv2d):
                    parts[-1] = fuse_conv_bn_eval(parts[-1], part)
                else:
                    parts.append(part)
            setattr(model, name, fold(nn.Sequential(*parts)))
        else:
            fold(child)
    return model


@functools.cache
def weights(name: str, decoder: bool = True, separable: bool = True) -> nn.Module:
    """He-initialised: activations keep their size through all layers, so that an error would show."""
    torch.manual_seed(0)
    model = models.build(name, 21, dropout=0.0, decoder=decoder, separable=separable)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def build(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Ours, or the plain network with the same weights."""
    model = copy.deepcopy(weights(case.model, case.decoder, case.separable)).to(dtype).train(case.mode == "training")
    model.set_output_stride(case.output_stride)
    if kind == OURS:
        return model
    plain = to_plain(model).train(model.training)
    return plain if model.training else fold(plain)


def images(case: Case, size: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, 3, size or case.size, size or case.size, generator=generator).to(dtype)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """One training step without the optimiser; the loss."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def check(case: Case) -> float:
    """Largest relative difference of ours from the plain network in float64 on a small image: logits or all gradients.

    Raises:
        measure.CheckFailed: they are not the same network.
    """
    x = images(case, CHECK_SIZE, torch.float64)
    labels = torch.randint(0, 21, (case.batch, CHECK_SIZE, CHECK_SIZE), generator=torch.Generator().manual_seed(2))
    results = []
    for kind in (OURS, EAGER):
        model = build(case, kind, torch.float64)
        with measure.RefusesOurs() if kind == EAGER else contextlib.nullcontext():
            results.append(_loss_and_gradients(model, x, labels) if case.mode == "training" else _logits(model, x))
    error = measure.relative_error(results[0], results[1])
    if not error < 1e-9:
        raise measure.CheckFailed(f"{case.name}, {case.mode}: ours differs from the plain network by {error:.2g}")
    return error


def _loss_and_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The loss and the sizes of all gradients, sorted: the order of the parameters differs."""
    loss = step(model, x, labels)
    norms = sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    return torch.tensor([loss.item(), *norms], dtype=torch.float64)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


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
