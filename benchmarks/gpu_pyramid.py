"""The depthwise halves of the ASPP and the image's mean on a GPU: the pyramid's operators, CUDA's and Triton's, beside
our single-rate operators one after the other, and cuDNN's and PyTorch's native kernel; below the modules, which
bench_contenders.py times.

A pyramid whose result differs from float64 is not timed. Times as in gpu_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers import sweep, torch_kernels, with_kernel
from gpu_report import Report, step_main
from suite.cases import PYRAMIDS, Pyramid

EPS = 1e-3
OPERATORS = {
    "inference": "atrous_spatial_pyramid",
    "forward": "atrous_spatial_pyramid_training",
    "backward": "atrous_spatial_pyramid_backward",
}


def flat(results: Any) -> list[Any]:
    """Tensors of a result, those in lists too."""
    return [t for part in results for t in (part if isinstance(part, (list, tuple)) else [part])]


class PyramidBenchmark:
    """Depthwise + BN + ReLU at every rate, and the mean, in one dtype and layout."""

    def __init__(self, pyramid: Pyramid, batch: int, dtype: str, layout: str, device: str) -> None:
        import torch

        self.torch, self.device, self.rates, self.dtype = torch, device, pyramid.rates, getattr(torch, dtype)
        self.format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        torch.manual_seed(0)
        branches, channels = len(self.rates), pyramid.channels
        self.x, *self.grads = (
            torch.randn(batch, channels, pyramid.size, pyramid.size, device=device)
            .to(self.dtype)
            .contiguous(memory_format=self.format)
            for _ in range(1 + branches)
        )
        self.weight = torch.randn(branches, channels, 1, 3, 3, device=device).to(self.dtype)
        self.gamma, self.beta, self.mean = (torch.randn(branches, channels, device=device) for _ in range(3))
        self.var = torch.rand(branches, channels, device=device) + 0.5
        self.grad_pooled = torch.randn(batch, channels, 1, 1, device=device).to(self.dtype)
        images = self.x.nbytes  # what must be moved: x once, every branch once; backward grad_out and y twice
        self.bytes = {
            "inference": (1 + branches) * images,
            "forward": (1 + 3 * branches) * images,
            "backward": (2 + 4 * branches) * images,
        }

    def backends(self) -> dict[str, Callable[[str], Callable[..., Any]]]:
        """Ours: the operators that serve this device, and Triton's kernels beside them."""
        found = {"ours": lambda name: getattr(self.torch.ops.deeplab_kernels, name).default}
        if self.device == "cuda":
            from deeplab_kernels import _library
            from deeplab_kernels.ops import _backends

            found = {f"ours {_backends.cuda_backend()}": found["ours"]}
            if "triton" not in _library.missing() and _backends.cuda_backend() != "triton":
                found["ours triton"] = lambda name: _backends.implementation(name, "triton")
        return found

    def arguments(self, count: int | None = None) -> dict[str, tuple[Any, ...]]:
        """Of the first ``count`` channels, or of all."""
        few = slice(count)
        x, grads = self.x[:, few].contiguous(memory_format=self.format), [g[:, few] for g in self.grads]
        vectors = [v[:, few].contiguous() for v in (self.gamma, self.beta, self.mean, self.var)]
        weight, pooled = self.weight[:, few].contiguous(), self.grad_pooled[:, few]
        dilation = [rate for rate in self.rates for _ in range(2)]
        operators = next(iter(self.backends().values()))
        forward = (x, weight, *vectors[:2], EPS, 1, dilation, True, True)
        _, conv, mean, var, _ = operators(OPERATORS["forward"])(*forward)
        return {
            "inference": (x, weight, *vectors, EPS, 1, dilation, True),
            "forward": forward,
            "backward": (grads, pooled, x, weight, conv, *vectors[:2], mean, var, EPS, 1, True, dilation, True, True),
        }

    def check(self) -> dict[str, float]:
        """Largest relative error of each backend on a few channels; raises where it is too large."""
        from deeplab_kernels import reference

        def wide(value: Any) -> Any:
            if isinstance(value, list):
                return [wide(v) for v in value]
            return value.double().cpu() if isinstance(value, self.torch.Tensor) else value

        errors: dict[str, float] = {}
        limit = 0.02 if self.dtype.itemsize == 2 else 1e-3  # elements at ReLU's kink may switch
        for mode, arguments in self.arguments(16).items():
            wanted = flat(getattr(reference, OPERATORS[mode])(*map(wide, arguments)))
            for backend, operators in self.backends().items():
                worst = 0.0
                for ours, exact in zip(flat(operators(OPERATORS[mode])(*arguments)), wanted, strict=True):
                    worst = max(worst, float((ours.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30)))
                if not worst < limit:
                    raise AssertionError(f"{backend} {mode}: relative error {worst:.2e}, allowed {limit:.0e}")
                errors[f"{backend} {mode}"] = worst
        return errors

    def rate_by_rate(self, mode: str, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """The single-rate operators, the mean, and in backward the sum of the gradients of x."""
        ops, torch = self.torch.ops.deeplab_kernels, self.torch
        geometries = [([1, 1], [rate] * 4, [rate] * 2) for rate in self.rates]

        def run() -> Any:
            if mode == "backward":
                grads, pooled, x, weight, conv, *vectors = arguments[:9]
                parts = [
                    ops.atrous_depthwise_bn_act_backward(
                        grads[r], x, weight[r], conv[r], *(v[r] for v in vectors), EPS, 1, True, *geometry, True, True
                    )
                    for r, geometry in enumerate(geometries)
                ]
                grad_x = sum(part[0] for part in parts) + pooled / (x.shape[2] * x.shape[3])
                return grad_x, *(torch.stack([part[k] for part in parts]) for k in (1, 2, 3))
            x, weight = arguments[:2]
            operator = (
                ops.atrous_depthwise_bn_act_training if mode == "forward" else ops.atrous_depthwise_bn_act_inference
            )
            vectors = arguments[2:4] if mode == "forward" else arguments[2:6]
            keep = (True,) if mode == "forward" else ()
            outputs = [
                operator(x, weight[r], *(v[r] for v in vectors), EPS, 1, *geometry, *keep)
                for r, geometry in enumerate(geometries)
            ]
            return outputs, x.mean((2, 3), keepdim=True)

        return run

    def of_torch(self, mode: str) -> Callable[..., Callable[[], Any]]:
        """(a wrapper of the function that is called) -> what is timed."""
        torch, functional = self.torch, self.torch.nn.functional
        scale = self.gamma * torch.rsqrt(self.var + EPS)
        folded = (self.weight * scale[..., None, None, None]).to(self.dtype)
        shift = (self.beta - self.mean * scale).to(self.dtype)

        def inference(x: Any) -> list[Any]:
            outputs = [
                functional.conv2d(x, folded[r], shift[r], 1, rate, rate, x.shape[1]).relu_()
                for r, rate in enumerate(self.rates)
            ]
            return [*outputs, x.mean((2, 3), keepdim=True)]

        def training(x: Any, weight: Any, gamma: Any, beta: Any) -> list[Any]:
            outputs = []
            for r, rate in enumerate(self.rates):
                y = functional.conv2d(x, weight[r], None, 1, rate, rate, x.shape[1])
                outputs.append(functional.batch_norm(y, None, None, gamma[r], beta[r], True, 0.1, EPS).relu())
            return [*outputs, x.mean((2, 3), keepdim=True)]

        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.weight, self.gamma, self.beta)]

        def timed(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], Any]:
            if mode == "inference":
                return wrap(lambda: inference(self.x))
            if mode == "forward":
                return wrap(lambda: training(*leaves))
            outputs = wrap(lambda: training(*leaves))()  # the graph is kept: only the backward is timed
            grads = [*self.grads, self.grad_pooled]
            return wrap(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))

        return timed

    def candidates(self, mode: str) -> dict[str, Callable[[], Any]]:
        arguments = self.arguments()[mode]
        found: dict[str, Callable[[], Any]] = {}
        for name, operators in self.backends().items():
            call = operators(OPERATORS[mode])
            found[name] = lambda call=call: call(*arguments)
        found["ours, rate by rate"] = self.rate_by_rate(mode, arguments)
        timed = self.of_torch(mode)
        if self.device != "cuda":
            return {**found, "torch eager": timed(lambda function: function)}
        for kernel in torch_kernels():
            found[f"torch eager {kernel}"] = timed(lambda function, kernel=kernel: with_kernel(function, kernel))
        return found


def benchmark(report: Report, rehearse: bool) -> None:
    cases = {pyramid.name: pyramid for pyramid in PYRAMIDS}
    if rehearse:
        cases = {name: Pyramid(16, 13, tuple(r // 6 for r in pyramid.rates)) for name, pyramid in cases.items()}
    sweep(report, "pyramid", cases, PyramidBenchmark, rehearse)


if __name__ == "__main__":
    step_main(__doc__, benchmark)
