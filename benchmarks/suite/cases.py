"""What the suite's product of layers, batch sizes, dtypes and modes consists of, the most telling first; no torch here.

A case is one computation at one batch size, in one dtype, forward only or as a training step. Its contenders and
layouts alternate in one process. The whole product takes many hours on a CPU, so it is ordered by importance and cut at
a time limit: what was left out is named in the results.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import layers

SUBJECTS = ("models", "aspp", "separable", "depthwise")
MODES = ("inference", "training")
BATCHES = (1, 8, 16)
DTYPES = ("fp32", "bf16", "tf32", "fp16")
LAYOUTS = ("nhwc", "nchw")
# ours; PyTorch with oneDNN or cuDNN; with both switched off; torch.compile as it is, with frozen weights (the CPU's
# inference), and with max-autotune; x.clone(), which moves as many bytes as can be.
CONTENDERS = ("ours", "eager", "native", "compile", "frozen", "max-autotune", "copy")
COMPILED = ("compile", "frozen", "max-autotune")
ELEMENT_SIZES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}


# FLOP/s of matrix products on 4 cores without instructions for half precision.
RATES = {"fp32": 1.2e11, "tf32": 1.2e11, "bf16": 8e8, "fp16": 8e8}


@dataclass(frozen=True)
class Pyramid:
    """Atrous spatial pyramid pooling on (N, channels, size, size)."""

    channels: int
    size: int
    rates: tuple[int, ...]
    out_channels: int = 256

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.size} rates {','.join(map(str, self.rates))}"


@dataclass(frozen=True)
class Network:
    """DeepLab v3+ on Xception-65, one row of the paper's table 5."""

    output_stride: int
    decoder: bool = True
    separable: bool = True
    size: int = 513

    @property
    def name(self) -> str:
        lacking = [what for what, has in (("decoder", self.decoder), ("SC", self.separable)) if not has]
        variant = "".join(f", no {what}" for what in lacking)
        return f"deeplabv3plus_xception65, output stride {self.output_stride}{variant}"


NETWORKS = tuple(
    Network(stride, decoder, separable)
    for decoder, separable in ((True, True), (True, False), (False, False))
    for stride in (16, 8)
)
PYRAMIDS = (Pyramid(2048, 33, (6, 12, 18)), Pyramid(2048, 65, (12, 24, 36)))


@functools.cache
def computations(subject: str) -> dict[str, Any]:
    """Name -> what is computed, the most telling first."""
    if subject == "models":
        return {network.name: network for network in NETWORKS}
    if subject == "aspp":
        return {pyramid.name: pyramid for pyramid in PYRAMIDS}
    if subject == "separable":
        both = [layers.xception65_blocks(stride) for stride in (16, 8)]
        occurs = {block: max(found[block] for found in both) for block in {*both[0], *both[1]}}
        ordered = sorted(occurs, key=lambda block: (not block.layer.name.startswith("A"), -occurs[block], block))
        return {block.name: block for block in ordered}
    if subject == "depthwise":
        named = list(layers.NAMED.values())
        others = [layer for layer in layers.all_layers() if layer not in named]
        return {layer.name: layer for layer in [*named, *others]}
    raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}, got {subject!r}")


@dataclass(frozen=True)
class Case:
    subject: str
    what: str  # a name of computations(subject)
    mode: str = "inference"
    batch: int = 1
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        """For example A12:2048x33r12/N8 bf16."""
        return f"{self.what}/N{self.batch} {self.dtype}"

    @property
    def computation(self) -> Any:
        return computations(self.subject)[self.what]

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZES[self.dtype]

    @property
    def elements(self) -> tuple[int, int]:
        """Of the input and of the output."""
        c = self.computation
        if self.subject == "models":
            return self.batch * 3 * c.size**2, self.batch * 21 * c.size**2
        if self.subject == "aspp":
            return self.batch * c.channels * c.size**2, self.batch * c.out_channels * c.size**2
        layer = c.layer if self.subject == "separable" else c
        out = c.out_channels if self.subject == "separable" else c.channels
        return self.batch * layer.channels * layer.size**2, self.batch * out * layer.out_size**2

    @property
    def bytes(self) -> int | None:
        """That must be moved: inputs read once, results written once. A step: x, out; x, grad_out, grad_x. Not of
        whole networks, where the memory between the layers decides."""
        x, out = self.elements
        if self.subject == "models":
            return None
        return self.element_size * (x + out if self.mode == "inference" else 3 * x + 2 * out)

    @property
    def layer_madds(self) -> int:
        """Multiply-Adds of a forward pass but for whole networks, of which models.madds knows."""
        c = self.computation
        if self.subject == "depthwise":
            return self.batch * 9 * c.channels * c.out_size**2
        if self.subject == "separable":
            return self.batch * c.layer.out_size**2 * c.layer.channels * (9 + c.out_channels)
        pixels, branches = c.size**2, len(c.rates)
        products = c.channels * c.out_channels * (pixels * (1 + branches) + 1)
        project = pixels * c.out_channels**2 * (2 + branches)
        return self.batch * (products + 9 * branches * pixels * c.channels + project)


@dataclass(frozen=True)
class Task:
    """A case with those of its contenders and layouts that run."""

    case: Case
    contenders: tuple[str, ...] = CONTENDERS
    layouts: tuple[str, ...] = LAYOUTS

    def seconds(self, rounds: int, limit: float, rates: Mapping[str, float] = RATES) -> float:
        """A rough estimate for 4 CPU cores; the pace of the cases before corrects it. limit: of one contender; rates:
        of matrix products, FLOP/s."""
        case = self.case
        madds = case.batch * (1.8e11 if "stride 8" in case.what else 6e10)
        madds = madds if case.subject == "models" else case.layer_madds
        rate = rates.get(case.dtype, RATES[case.dtype]) / 2
        one = (madds / rate + (case.bytes or 0) / 8e9) * (3 if case.mode == "training" else 1)
        slower = {"ours": 1, "copy": 0.3, "native": 10 if case.element_size == 4 else 1}  # than ours
        network = case.subject == "models"
        total = 6.0 if network else 1.5
        for contender in self.contenders:
            time = one * slower.get(contender, 3)
            total += len(self.layouts) * (min(rounds * time, max(limit, time)) + 2 * time)
            if contender in COMPILED:
                total += len(self.layouts) * (60 if network else 5) * (2 if contender == "max-autotune" else 1)
        total += 2 * one * (3 if case.element_size == 2 else 1)  # the check
        return total


@dataclass(frozen=True)
class Selection:
    """What to take of the product; None: everything."""

    subjects: Sequence[str] = SUBJECTS
    what: Sequence[str] | None = None  # names of computations, or parts of them
    modes: Sequence[str] = MODES
    batches: Sequence[int] = BATCHES
    dtypes: Sequence[str] = DTYPES
    contenders: Sequence[str] = CONTENDERS
    layouts: Sequence[str] = LAYOUTS

    def chooses(self, case: Case) -> bool:
        named = self.what is None or any(word in case.what for word in self.what)
        return (
            case.subject in self.subjects
            and case.mode in self.modes
            and case.batch in self.batches
            and case.dtype in self.dtypes
            and named
        )


# Position on each axis is added up: a case is the less important the further it is from the first of all.
ORDER: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "cpu": (("fp32", "bf16", "tf32", "fp16"), (1, 8, 16)),
    "cuda": (("bf16", "fp32", "tf32", "fp16"), (8, 1, 16)),
}


def unavailable(device: str, dtypes: Sequence[str]) -> dict[str, str]:
    """What of the product this kind of device does not have -> why."""
    if device == "cuda":
        return {}
    found = {"CUDA graphs": "need a CUDA device; on the CPU a call has no launch gaps to leave out"}
    if "tf32" in dtypes:
        found["tf32"] = "a mode of CUDA devices' matrix units"
    return found


def product(selection: Selection, device: str) -> list[Task]:
    """Every case that ``selection`` chooses and ``device`` ("cpu", "cuda") can have, the most important first."""
    dtypes, batches = ORDER[device]
    batches = (*batches, *(n for n in selection.batches if n not in batches))
    found: list[tuple[tuple[int, ...], Task]] = []
    for subject_rank, subject in enumerate(SUBJECTS):
        for rank, what in enumerate(computations(subject)):
            for mode, dtype, batch in itertools.product(MODES, dtypes, batches):
                case = Case(subject, what, mode, batch, dtype)
                if dtype in unavailable(device, dtypes) or not selection.chooses(case):
                    continue
                distance = MODES.index(mode) + dtypes.index(dtype) + batches.index(batch)
                # Whole networks take longest: their variants are as far as another dtype.
                further = rank // 2 if subject == "models" else rank // 6
                task = Task(case, contenders_of(case, selection.contenders, device), tuple(selection.layouts))
                found.append(((distance + further, subject_rank, rank), task))
    return [task for _, task in sorted(found, key=lambda entry: entry[0])]


def contenders_of(case: Case, chosen: Sequence[str], device: str) -> tuple[str, ...]:
    """Those that make sense for the case: freezing is for the CPU's inference, a copy for what memory bounds."""
    frozen = device == "cpu" and case.mode == "inference"
    lacking = {*(() if frozen else ("frozen",)), *(() if case.subject == "depthwise" else ("copy",))}
    return tuple(contender for contender in CONTENDERS if contender in chosen and contender not in lacking)


PLAIN = ("ours", "eager", "native", "copy")
_QUICK = (
    (Case("separable", "A12:2048x33r12->relu->256"), PLAIN),
    (Case("aspp", PYRAMIDS[0].name), PLAIN),
    (Case("depthwise", "A12:2048x33r12"), PLAIN),
    (Case("separable", "728x33->728"), PLAIN),
    (Case("models", NETWORKS[0].name), ("ours", "eager")),
    (Case("depthwise", "A12:2048x33r12", "training"), PLAIN),
    (Case("depthwise", "M8:728x65r2"), PLAIN),
    (Case("separable", "A12:2048x33r12->relu->256", "training", 8), ("ours", "eager")),
    (Case("depthwise", "A12:2048x33r12", dtype="bf16"), PLAIN),
    (Case("separable", "A12:2048x33r12->relu->256", batch=8), ("ours", "eager", "frozen")),
    (Case("separable", "256x129->relu->256"), ("ours", "eager", "compile", "max-autotune")),
    (Case("models", NETWORKS[1].name), ("ours", "eager")),
    (Case("aspp", PYRAMIDS[0].name, "training", 8), ("ours", "eager")),
)


def quick(selection: Selection) -> list[Task]:
    """Few cases, something of every axis."""
    return [
        Task(case, contenders_of(case, [c for c in contenders if c in selection.contenders], "cpu"), LAYOUTS)
        for case, contenders in _QUICK
        if selection.chooses(case)
    ]


def gpu_bars() -> list[Task]:
    """One case at least for each bar of GPUs, for the ten minutes that benchmarks/gpu_suite.py has."""
    return list(_gpu_bars())


def _gpu_bars() -> Iterator[Task]:
    compiled = ("ours", "eager", "native", "compile")
    plain = ("ours", "eager", "native", "copy")
    network, pyramid = NETWORKS[0].name, PYRAMIDS[0].name
    for what in ("A12:2048x33r12", "M8:728x65r2", "E128:128x257"):
        yield Task(Case("depthwise", what, "inference", 8, "bf16"), (*compiled, "copy"))
    for what in ("A12:2048x33r12->relu->256", "728x33->728"):
        yield Task(Case("separable", what, "inference", 8, "bf16"), compiled)
    yield Task(Case("aspp", pyramid, "inference", 8, "bf16"), compiled)
    yield Task(Case("models", network, "inference", 8, "bf16"), ("ours", "eager", "max-autotune"), ("nhwc",))
    yield Task(Case("models", network, "training", 8, "bf16"), ("ours", "eager", "compile"), ("nhwc",))
    for layer in ("A24:2048x65r24", "D304:304x129", "X4:1536x65r4", "E128s2:128x257s2", "A6:2048x33r6"):
        yield Task(Case("depthwise", layer, "inference", 8, "bf16"), plain)
    yield Task(Case("aspp", pyramid, "training", 8, "bf16"), ("ours", "eager", "native"))
    for dtype in ("fp32", "tf32", "fp16"):
        yield Task(Case("separable", "A12:2048x33r12->relu->256", "inference", 8, dtype), ("ours", "eager", "native"))
    for block in computations("separable"):
        if block not in ("A12:2048x33r12->relu->256", "728x33->728"):
            yield Task(Case("separable", block, "inference", 8, "bf16"), ("ours", "eager"))


def gpu_rehearsal() -> list[Task]:
    """The first of each kind of layer, one image, with what compiles left out: to be run on a CPU."""
    first = {task.case.subject: task for task in reversed(gpu_bars()) if task.case.subject != "models"}
    return [Task(replace(task.case, batch=1, dtype="fp32"), ("ours", "eager"), ("nhwc",)) for task in first.values()]


def to_dict(case: Case) -> dict[str, Any]:
    return asdict(case)
