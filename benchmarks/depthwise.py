"""Contenders of a depthwise + batch normalisation + ReLU layer, checked against float64 and timed against each other.

One `Problem` (a convolution's shape with its tensors) is measured at a time: every contender, in both layouts, is
visited in turn (deeplab_kernels.timing), so that a drift of the machine's speed hits all of them alike. A contender of
ours whose result differs from float64 is not timed: `CheckFailed` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from layers import Shape
from torch import Tensor, nn

from deeplab_kernels import ops
from deeplab_kernels.timing import Timing, interleaved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPS = 1e-3


@dataclass(frozen=True)
class Convolution:
    """A depthwise convolution to be measured; kernel, stride, rate and padding hold for both axes."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1
    padding: int = 1
    multiplier: int = 1

    @classmethod
    def of(cls, shape: Shape) -> Convolution:
        layer = shape.layer
        return cls(
            shape.batch,
            layer.channels,
            layer.size,
            layer.size,
            stride=layer.stride,
            rate=layer.rate,
            padding=layer.rate,
        )

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    @property
    def out_size(self) -> tuple[int, int]:
        reach = self.rate * (self.kernel - 1) + 1
        height, width = ((n + 2 * self.padding - reach) // self.stride + 1 for n in (self.height, self.width))
        return height, width

    @property
    def input_elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def output_elements(self) -> int:
        height, width = self.out_size
        return self.batch * self.out_channels * height * width

    def floor_ms(self, gb_per_s: float, mode: str = "inference", element_size: int = 4) -> float:
        """Milliseconds to move what must be moved at ``gb_per_s``.

        Inference reads x and writes out; so does a training forward, and backward reads x and grad_out and writes
        grad_x: 3 x + 2 out. The second look at x that the batch statistics force, in both directions, is not counted:
        channels are independent, and those at work can stay in the caches between the two passes.
        """
        x, out = self.input_elements, self.output_elements
        elements = x + out if mode == "inference" else 3 * x + 2 * out
        return elements * element_size / gb_per_s / 1e6


class Block(nn.Module):
    """What PyTorch users write: depthwise convolution, BatchNorm2d, ReLU."""

    def __init__(self, conv: Convolution) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            conv.channels,
            conv.out_channels,
            conv.kernel,
            conv.stride,
            conv.padding,
            conv.rate,
            conv.channels,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.depthwise(x)), inplace=True)


class Problem:
    """The tensors of one convolution, and functions over them to be timed."""

    def __init__(self, conv: Convolution, mode: str, seed: int = 0) -> None:
        if mode not in ("inference", "training"):
            raise ValueError(f'mode must be "inference" or "training", got {mode!r}')
        self.conv, self.mode = conv, mode
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=generator)
        self.x = randn(conv.batch, conv.channels, conv.height, conv.width)
        self.weight = randn(conv.out_channels, 1, conv.kernel, conv.kernel)
        self.gamma = 1 + 0.2 * randn(conv.out_channels)
        self.beta = 0.2 * randn(conv.out_channels)
        self.mean = 0.2 * randn(conv.out_channels)
        self.var = 1 + 0.5 * torch.rand(conv.out_channels, generator=generator)
        self.grad = randn(conv.batch, conv.out_channels, *conv.out_size) if mode == "training" else None
        # Channels are independent of each other, so a check in float64 needs few of them: both ends, some between.
        middle = torch.randperm(conv.channels, generator=generator)[:8].tolist()
        self.checked = sorted(
            {*range(min(4, conv.channels)), *range(max(0, conv.channels - 4), conv.channels), *middle}
        )
        self._reference: dict[torch.dtype, dict[str, Tensor]] = {}
        self._copies: dict[tuple[str, str], Tensor] = {}
        if mode == "training":
            self._avoid_kinks()

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.conv.stride, "padding": self.conv.padding, "dilation": self.conv.rate}

    def tensor(self, name: str, layout: str, dtype: torch.dtype) -> Tensor:
        """x, weight or grad in a layout and dtype; one copy is shared by all contenders."""
        key = (name, layout, dtype)
        if key not in self._copies:
            tensor = getattr(self, name).to(dtype)
            # A weight of one channel per group has no layout of its own: only x and grad follow it.
            if name != "weight":
                tensor = tensor.contiguous(memory_format=measure.LAYOUTS[layout])
            self._copies[key] = tensor.detach().requires_grad_(self.mode == "training")
        return self._copies[key]

    # Checks.

    def _subset(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int], Convolution]:
        outs = [c * self.conv.multiplier + q for c in self.checked for q in range(self.conv.multiplier)]
        return self.x[:, self.checked].to(dtype), self.weight[outs].to(dtype), outs, self.conv

    def _plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The checked channels by plain torch in ``dtype``."""
        x, weight, outs, conv = self._subset(dtype)
        gamma, beta = self.gamma[outs].to(dtype), self.beta[outs].to(dtype)
        inputs = [t.requires_grad_(self.mode == "training") for t in (x, weight, gamma, beta)]
        with torch.set_grad_enabled(self.mode == "training"):
            y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.rate, len(self.checked))
            if self.mode == "training":
                z = F.batch_norm(y, None, None, gamma, beta, training=True, eps=EPS)
            else:
                z = F.batch_norm(y, self.mean[outs].to(dtype), self.var[outs].to(dtype), gamma, beta, eps=EPS)
            out = F.relu(z)
        result = {"normalised": z.detach(), "out": out.detach()}
        if self.mode == "training":
            grads = torch.autograd.grad(out, [*inputs, y], self.grad[:, outs].to(dtype))
            result.update(zip(("grad_x", "grad_weight", "grad_gamma", "grad_beta", "grad_conv"), grads, strict=True))
        return result

    def _avoid_kinks(self) -> None:
        # Next to ReLU's kink rounding decides whether a gradient passes: no gradient comes from there.
        outs = self._subset(torch.float32)[2]
        near = self._plain(torch.float64)["normalised"].abs() < 1e-4
        self.grad[:, outs] = self.grad[:, outs].masked_fill(near, 0.0)

    def _cancellation(self, reference: Mapping[str, Tensor]) -> float:
        """How much larger than the largest gradient of the weights the terms are that it sums (their Euclidean norm).

        A batch normalisation takes no notice of its input's scale. Where only one tap lies inside the image, the
        weight is such a scale: its gradient is 0 but for eps, and no sum of rounded terms finds it exactly.
        """
        x, weight, _, conv = self._subset(torch.float64)
        squares = torch.nn.grad.conv2d_weight(
            x.square(), weight.shape, reference["grad_conv"].square(), conv.stride, conv.padding, conv.rate, len(x[0])
        )
        return float(squares.max().sqrt() / reference["grad_weight"].abs().max().clamp_min(1e-30))

    def _expected(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
        """float64 results of inputs rounded to ``dtype``, and plain torch's own errors (0 where it is not asked)."""
        if dtype not in self._reference:
            kept = self.x, self.weight, self.grad
            self.x, self.weight = self.x.to(dtype).float(), self.weight.to(dtype).float()
            reference = self._plain(torch.float64)
            errors = dict.fromkeys(reference, 0.0)
            if dtype == torch.float32:
                plain = self._plain(torch.float32)
                errors = {name: measure.relative_error(plain[name], reference[name]) for name in reference}
            self.x, self.weight, self.grad = kept
            self._reference[dtype] = reference, errors
        return self._reference[dtype]

    def check(self, name: str, results: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Largest relative error of ``results``; raises CheckFailed where one exceeds twice plain torch's (rule 9)."""
        reference, plain_errors = self._expected(dtype)
        outs = self._subset(torch.float32)[2]
        worst = 0.0
        for key, result in results.items():
            if not torch.isfinite(result).all():
                raise measure.CheckFailed(f"{name}: {key} of {self.conv} is not finite")
            chosen = result[:, outs] if key == "out" else result[:, self.checked] if key == "grad_x" else result[outs]
            error = measure.relative_error(chosen, reference[key])
            # The floor: rounding once in bfloat16; sums in another order than plain torch's in float32.
            floor = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 16)
            if key == "grad_weight":
                floor *= max(1.0, self._cancellation(reference))
            allowed = max(2 * plain_errors[key], floor)
            if not error <= allowed:
                raise measure.CheckFailed(
                    f"{name}: {key} of {self.conv} has relative error {error:.2e}, allowed {allowed:.2e}"
                )
            worst = max(worst, error)
        return worst

    # Contenders: functions without arguments that return name -> tensor.

    def _step(self, out: Tensor, layout: str, dtype: torch.dtype, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, leaves, self.tensor("grad", layout, dtype).detach())
        names = ("grad_x", "grad_weight", "grad_gamma", "grad_beta")
        return {"out": out, **dict(zip(names, grads, strict=True))}

    def ours(self, layout: str, dtype: torch.dtype, forward_only: bool = False) -> Callable[[], dict[str, Tensor]]:
        training = self.mode == "training"
        x, weight = self.tensor("x", layout, dtype), self.tensor("weight", layout, dtype)
        gamma, beta = (t.clone().requires_grad_(training) for t in (self.gamma, self.beta))
        mean, var = self.mean.clone(), self.var.clone()
        operator = partial(
            ops.atrous_depthwise_bn_act, x, weight, gamma, beta, mean, var, training=training, eps=EPS, **self.geometry
        )
        if not training or forward_only:
            return lambda: {"out": operator()}
        return lambda: self._step(operator(), layout, dtype, (x, weight, gamma, beta))

    def block(self, dtype: torch.dtype = torch.float32) -> Block:
        """PyTorch's modules with this problem's weights."""
        block = Block(self.conv)
        with torch.no_grad():
            block.depthwise.weight.copy_(self.weight)
            block.norm.weight.copy_(self.gamma)
            block.norm.bias.copy_(self.beta)
            block.norm.running_mean.copy_(self.mean)
            block.norm.running_var.copy_(self.var)
        training = self.mode == "training"
        return block.to(dtype).train(training).requires_grad_(training)

    def folded(self, layout: str, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
        """Eager inference with BN folded into the convolution, ReLU in place."""
        conv = self.conv
        x = self.tensor("x", layout, dtype)
        scale = self.gamma * torch.rsqrt(self.var + EPS)
        weight = (self.weight * scale.view(-1, 1, 1, 1)).to(dtype)
        bias = (self.beta - self.mean * scale).to(dtype)
        return lambda: {"out": F.relu_(F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.rate, conv.channels))}

    def eager_step(
        self, layout: str, dtype: torch.dtype, block: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        module = self.block(dtype).to(memory_format=measure.LAYOUTS[layout])
        x = self.tensor("x", layout, dtype)
        leaves = (x, module.depthwise.weight, module.norm.weight, module.norm.bias)
        call = module if block is None else block(module)
        return lambda: self._step(call(x), layout, dtype, leaves)

    def compiled(self, layout: str, dtype: torch.dtype, frozen: bool = False) -> Callable[[], dict[str, Tensor]]:
        """torch.compile of PyTorch's modules; frozen folds BN and prepacks the weights (inference only)."""
        options = {"freezing": True} if frozen else {}
        compile_block = partial(torch.compile, dynamic=False, options=options)
        if self.mode == "training":
            function = self.eager_step(layout, dtype, compile_block)
        else:
            x = self.tensor("x", layout, dtype)
            module = compile_block(self.block(dtype).to(memory_format=measure.LAYOUTS[layout]))

            def function() -> dict[str, Tensor]:
                return {"out": module(x)}

        with torch.set_grad_enabled(self.mode == "training"):
            function()  # compiles, which no timing may see
        return function

    def clone(self, layout: str, dtype: torch.dtype) -> Callable[[], object]:
        x = self.tensor("x", layout, dtype).detach()
        return x.clone

    def kept_for_backward(self, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one training forward of ours keeps for backward, x and parameters included."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.ours(layout, dtype, forward_only=True)()
        return sum(kept.values())


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    layouts: tuple[str, ...] = ("nchw", "nhwc")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compile: bool = True
    compile_training: bool = False  # some seconds a shape, and rarely faster than eager: convolutions are not compiled
    pytorch: bool = True
    rounds: int = 15
    candidate_seconds: float = 1.0
    threads: int | None = None


def contender(kind: str, dtype: str, layout: str) -> str:
    return f"{kind} {dtype} {layout}"


def contenders(problem: Problem, options: Options) -> dict[str, Callable[[], object]]:
    """Name -> function; ours first. A training step is fp32 only, and PyTorch's runs in both layouts whatever is asked,
    since the better one is the yardstick."""
    found: dict[str, Callable[[], object]] = {}
    training = problem.mode == "training"
    dtypes = ("float32",) if training else options.dtypes
    for dtype in dtypes:
        for layout in options.layouts:
            found[contender("ours", dtype, layout)] = problem.ours(layout, DTYPES[dtype])
            if training:
                found[contender("ours forward", dtype, layout)] = problem.ours(layout, DTYPES[dtype], forward_only=True)
            found[contender("clone", dtype, layout)] = problem.clone(layout, DTYPES[dtype])
    if not options.pytorch:
        return found
    for dtype in dtypes:
        for layout in measure.LAYOUTS if training else options.layouts:
            if training:
                found[contender("eager", dtype, layout)] = problem.eager_step(layout, DTYPES[dtype])
            else:
                found[contender("eager", dtype, layout)] = problem.folded(layout, DTYPES[dtype])
            if dtype == "float32" and (options.compile_training if training else options.compile):
                found[contender("compile", dtype, layout)] = problem.compiled(layout, DTYPES[dtype])
                if not training:
                    found[contender("frozen", dtype, layout)] = problem.compiled(layout, DTYPES[dtype], frozen=True)
    return found


def measure_convolution(
    conv: Convolution, mode: str, options: Options, name: str = "", *, samples: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Checks, then times, every contender; returns a JSON-ready record, with every sample if asked."""
    torch._dynamo.reset()  # otherwise a second shape counts as a recompilation of the first
    problem = Problem(conv, mode, seed)
    functions = contenders(problem, options)
    errors: dict[str, float] = {}
    with torch.set_grad_enabled(mode == "training"):
        for key, function in functions.items():
            kind, dtype, _ = key.rsplit(" ", 2)
            if kind == "ours":
                errors[key] = problem.check(key, function(), DTYPES[dtype])
        timings: dict[str, Timing] = interleaved(
            functions, rounds=options.rounds, candidate_seconds=options.candidate_seconds
        )
    record: dict[str, Any] = {
        "name": name,
        "mode": mode,
        "convolution": asdict(conv),
        "input_bytes": 4 * conv.input_elements,
        "output_bytes": 4 * conv.output_elements,
        "allocator": measure.allocator(),
        "threads": torch.get_num_threads(),
        "load_average": round(measure.load_average(), 1),
        **measure.stamp(),
        "relative_error": errors,
        "timings": {key: timing.summary() for key, timing in timings.items()},
    }
    if samples:
        for key, timing in timings.items():
            record["timings"][key]["samples_ms"] = timing.samples
    if mode == "training":
        record["kept_bytes"] = {layout: problem.kept_for_backward(layout) for layout in options.layouts}
    return record
