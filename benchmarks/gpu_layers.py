"""The depthwise operators layer by layer on a GPU, forward and backward apart, each backend of ours beside cuDNN's and
PyTorch's native kernel; below the modules, which bench_contenders.py times.

A layer whose result differs from float64 is not timed. Times are medians of CUDA-event timings in microseconds,
alternatives interleaved, caches flushed between calls; `floor_us` is what the tensors take at the copy bandwidth
measured in the same run.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from gpu_report import Report, step_main
from layers import NAMED, Layer

# Middle flow, ASPP, decoder, exit and entry flow; output stride 16 and 8.
ORDER = ("M8", "A12", "A24", "D304", "E128", "A6", "A18", "X4", "E128s2")
OPERATORS = {
    "inference": "atrous_depthwise_bn_act_inference",
    "forward": "atrous_depthwise_bn_act_training",
    "backward": "atrous_depthwise_bn_act_backward",
}


class Timer:
    """Medians in microseconds; alternatives visited in a new order every round, with cold caches."""

    def __init__(self, device: str, rounds: int) -> None:
        import torch

        self.torch, self.device, self.rounds = torch, device, rounds
        size = (256 if device == "cuda" else 1) << 20
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, function: Callable[[], Any]) -> float:
        self.flush.zero_()
        if self.device != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def compare(self, candidates: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
        for function in candidates.values():
            for _ in range(2):
                function()
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        order, shuffle = list(candidates), random.Random(0)
        for _ in range(self.rounds):
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(self.once(candidates[name]))
        return {
            name: {"median_us": round(statistics.median(s), 2), "min_us": round(min(s), 2)}
            for name, s in samples.items()
        }

    def copy_bandwidth(self) -> float:
        """GB/s of copying a large tensor, bytes read plus bytes written."""
        source = self.torch.ones((1 << 28) if self.device == "cuda" else 1 << 20, device=self.device)
        target = self.torch.empty_like(source)
        microseconds = self.compare({"copy": lambda: target.copy_(source)})["copy"]["median_us"]
        return 2 * source.nbytes / microseconds / 1e3


def with_kernel(function: Callable[..., Any], kernel: str) -> Callable[..., Any]:
    """``function`` with torch's depthwise convolutions on ``kernel``: "cudnn", "native", or "auto" for its choice."""
    import torch

    if kernel == "auto":
        return function
    backend = torch.backends.cudnn

    def call(*arguments: Any) -> Any:
        before, backend.depthwise_kernel = backend.depthwise_kernel, kernel
        try:
            return function(*arguments)
        finally:
            backend.depthwise_kernel = before

    return call


def torch_kernels() -> tuple[str, ...]:
    """Those of torch's kernels for depthwise convolutions on CUDA that can be asked for."""
    import torch

    return ("cudnn", "native") if hasattr(torch.backends.cudnn, "depthwise_kernel") else ("auto",)


class LayerBenchmark:
    """Depthwise + BN + ReLU of one layer, in one dtype and layout."""

    def __init__(self, layer: Any, batch: int, dtype: str, layout: str, device: str) -> None:
        import torch

        self.torch, self.layer, self.device, self.dtype = torch, layer, device, getattr(torch, dtype)
        self.format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        torch.manual_seed(0)
        self.x = torch.randn(batch, layer.channels, layer.size, layer.size, device=device).to(self.dtype)
        self.x = self.x.contiguous(memory_format=self.format)
        self.weight = torch.randn(layer.channels, 1, 3, 3, device=device).to(self.dtype)
        self.gamma, self.beta, self.mean = (torch.randn(layer.channels, device=device) for _ in range(3))
        self.var = torch.rand(layer.channels, device=device) + 0.5
        shape = (batch, layer.channels, layer.out_size, layer.out_size)
        self.grad = torch.randn(shape, device=device).to(self.dtype).contiguous(memory_format=self.format)
        self.geometry = ([layer.stride] * 2, [layer.rate] * 4, [layer.rate] * 2)
        self.bytes = {
            "inference": self.x.nbytes + self.grad.nbytes,
            "forward": self.x.nbytes + 3 * self.grad.nbytes,
            "backward": 2 * self.x.nbytes + 4 * self.grad.nbytes,
        }

    def backends(self) -> dict[str, Callable[[str], Callable[..., Any]]]:
        """Ours: the operators that serve this device, and Triton's kernels beside them."""
        found = {"ours": lambda name: getattr(self.torch.ops.deeplab_kernels, name).default}
        if self.device == "cuda":
            from deeplab_kernels import _library
            from deeplab_kernels.ops import _backends

            found = {f"ours {_backends.cuda_backend()}": found["ours"]}
            if "triton" not in _library.missing() and _backends.cuda_backend() != "triton":
                from deeplab_kernels.triton import atrous_depthwise as kernels

                found["ours triton"] = lambda name: getattr(kernels, name)
        return found

    def arguments(self) -> dict[str, tuple[Any, ...]]:
        norm = (self.gamma, self.beta)
        inference = (self.x, self.weight, *norm, self.mean, self.var, 1e-3, 1, *self.geometry)
        forward = (self.x, self.weight, *norm, 1e-3, 1, *self.geometry, True)
        backend = next(iter(self.backends().values()))
        _, y, mean, var = backend("atrous_depthwise_bn_act_training")(*forward)
        backward = (self.grad, self.x, self.weight, y, *norm, mean, var, 1e-3, 1, True, *self.geometry, True, True)
        return {"inference": inference, "forward": forward, "backward": backward}

    def check(self) -> dict[str, float]:
        """Largest relative error of each backend on a few channels; raises where it is too large."""
        from deeplab_kernels import reference

        count = min(16, self.layer.channels)
        errors: dict[str, float] = {}
        for mode, arguments in self.arguments().items():
            some = [self._channels(a, count) for a in arguments]
            wide = [a.double().cpu() if isinstance(a, self.torch.Tensor) else a for a in some]
            wanted = getattr(reference, OPERATORS[mode])(*wide)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for backend, operator in self.backends().items():
                result = operator(OPERATORS[mode])(*arguments)
                result = result if isinstance(result, tuple) else (result,)
                worst = 0.0
                for ours, exact in zip(result, wanted, strict=True):
                    chosen = self._channels(ours, count).double().cpu()
                    worst = max(worst, float((chosen - exact).norm() / exact.norm().clamp_min(1e-30)))
                limit = 0.02 if self.dtype.itemsize == 2 else 1e-3  # elements at ReLU's kink may switch
                if not worst < limit:
                    raise AssertionError(f"{backend} {mode}: relative error {worst:.2e}, allowed {limit:.0e}")
                errors[f"{backend} {mode}"] = worst
        return errors

    def _channels(self, value: Any, count: int) -> Any:
        """The first channels of an argument or result."""
        if not isinstance(value, self.torch.Tensor):
            return value
        per_channel = value.dim() == 1 or value.shape[1] == 1
        return value[:count] if per_channel else value[:, :count]

    def candidates(self, mode: str) -> dict[str, Callable[[], Any]]:
        torch, functional = self.torch, self.torch.nn.functional
        arguments = self.arguments()[mode]
        found: dict[str, Callable[[], Any]] = {}
        for name, operator in self.backends().items():
            call = operator(OPERATORS[mode])
            found[name] = lambda call=call: call(*arguments)
        scale = self.gamma * torch.rsqrt(self.var + 1e-3)
        folded = (self.weight * scale.view(-1, 1, 1, 1)).to(self.dtype)
        shift = (self.beta - self.mean * scale).to(self.dtype)
        stride, padding, rate = self.layer.stride, self.layer.rate, self.layer.rate

        def folded_block(x: Any) -> Any:
            return functional.conv2d(x, folded, shift, stride, padding, rate, self.layer.channels).relu_()

        def block(x: Any, weight: Any, gamma: Any, beta: Any) -> Any:
            y = functional.conv2d(x, weight, None, stride, padding, rate, self.layer.channels)
            return functional.batch_norm(y, None, None, gamma, beta, True, 0.1, 1e-3).relu()

        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.weight, self.gamma, self.beta)]
        leaves[0] = self.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

        def step(function: Callable[..., Any]) -> Callable[[], Any]:
            if mode == "inference":
                return lambda: function(self.x)
            if mode == "forward":
                return lambda: function(*leaves)
            out = function(*leaves)  # the graph is kept: only the backward is timed
            return lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True)

        theirs = folded_block if mode == "inference" else block
        if self.device != "cuda":
            return {**found, "torch eager": step(theirs)}
        for kernel in torch_kernels():
            found[f"torch eager {kernel}"] = with_kernel(step(with_kernel(theirs, kernel)), kernel)
        return found


def measured(row: dict[str, Any], make: Callable[[], Any], timer: Timer, bandwidth: float) -> dict[str, Any]:
    """``row`` with the errors, times and floors of the case that ``make`` gives, or with why there are none: one case
    must not cost the others."""
    try:
        case = make()
        row["errors"] = case.check()
        for mode, size in case.bytes.items():
            row[mode] = timer.compare(case.candidates(mode))
            row[mode]["floor_us"] = round(size / bandwidth / 1e3, 2)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
        row["traceback"] = traceback.format_exc()[-2000:]
    return row


def publish(report: Report, key: str, row: dict[str, Any]) -> None:
    """Adds ``row`` to the list ``key`` of the report, writes that, and prints the row's medians."""
    report.data[key].append(row)
    report.flush()
    medians = {
        mode: {k: v["median_us"] for k, v in times.items() if k != "floor_us"}
        for mode, times in row.items()
        if isinstance(times, dict) and "floor_us" in times
    }
    named = [str(value) for value in row.values() if isinstance(value, (str, int))][:4]
    print(*named, row.get("failed", ""), json.dumps(medians), flush=True)


def sweep(report: Report, what: str, cases: Mapping[str, Any], make: Callable[..., Any], rehearse: bool) -> None:
    """Measures ``make(case, batch, dtype, layout, device)`` of every case, most important first, while time is left."""
    import torch

    import deeplab_kernels.ops  # noqa: F401  # registers the operators

    device = "cpu" if rehearse else "cuda"
    timer = Timer(device, rounds=3 if rehearse else 25)
    report.data[f"{what}s"] = []
    bandwidth = timer.copy_bandwidth()
    report.data["copy_gb_per_s"] = round(bandwidth, 1)
    torch.backends.cudnn.benchmark = True
    axes = ((1,) if rehearse else (8, 1), ("bfloat16", "float32"), cases.items(), ("nhwc", "nchw"))
    for batch, dtype, (name, case), layout in itertools.product(*axes):
        if report.left < 15:
            report.step(f"{what}s", ok=True, cut="out of time")
            return
        row = {what: name, "batch": batch, "dtype": dtype, "layout": layout}
        build = functools.partial(make, case, batch, dtype, layout, device)
        publish(report, f"{what}s", measured(row, build, timer, bandwidth))
    report.step(f"{what}s", ok=True)


def benchmark(report: Report, rehearse: bool) -> None:
    cases = {name: NAMED[name] for name in ORDER}
    if rehearse:
        cases = {name: Layer(16, 17, layer.stride, min(layer.rate, 4)) for name, layer in cases.items()}
    sweep(report, "layer", cases, LayerBenchmark, rehearse)


if __name__ == "__main__":
    step_main(__doc__, benchmark)
