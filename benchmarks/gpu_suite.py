"""Everything that needs a GPU, in one call: builds the CUDA library, runs its tests, then times the dense CRF, and the
depthwise layers of DeepLab v3+ against cuDNN, PyTorch's native kernel and torch.compile.

    python benchmarks/gpu_suite.py --output results.json      # on a machine with a GPU and nvcc; no network needed
    python benchmarks/gpu_suite.py --rehearse                 # without a GPU: the same steps, tiny and on the CPU

The most important comes first and every finished step is written to the output file, so that a run that is cut short
still counts. The library is built in a temporary copy; the source tree is not touched. A layer whose result differs
from float64 is not timed. Times are medians of CUDA-event timings, alternatives interleaved, caches flushed between
calls; `floor_us` is what the tensors take at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Middle flow, ASPP, decoder, exit and entry flow; output stride 16 and 8.
ORDER = ("M8", "A12", "A24", "D304", "E128", "A6", "A18", "X4", "E128s2")
OPERATORS = {
    "inference": "atrous_depthwise_bn_act_inference",
    "forward": "atrous_depthwise_bn_act_training",
    "backward": "atrous_depthwise_bn_act_backward",
}


class Report:
    """Results so far, on disk after every step."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.data: dict[str, Any] = {"steps": [], "layers": []}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def flush(self) -> None:
        self.data["elapsed_s"] = round(time.monotonic() - self.start, 1)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)

    def step(self, name: str, **result: Any) -> None:
        self.data["steps"].append({"step": name, **result})
        print(f"[{time.monotonic() - self.start:6.1f} s] {name}: {json.dumps(result)[:400]}", flush=True)
        self.flush()


def run(command: list[str], timeout: float, **environment: str) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(timeout, 1),
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        parts = [o.decode(errors="replace") if isinstance(o, bytes) else o or "" for o in (error.stdout, error.stderr)]
        output, code = "".join(parts), "timed out"
    return {"ok": code == 0, "exit": code, "seconds": round(time.monotonic() - start, 1), "tail": output[-4000:]}


def build(report: Report, folder: Path, rehearse: bool) -> str:
    """Builds a copy of the package for this machine's GPU; returns the path to import it from."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "*.egg-info", "demo")
    shutil.copytree(ROOT, tree, ignore=ignore)
    if rehearse:
        report.step("build", ok=True, skipped="rehearsal: the installed package serves")
        return str(ROOT)
    import torch

    major, minor = torch.cuda.get_device_capability()
    environment = {
        "DEEPLAB_KERNELS_CUDA": "1",
        "DEEPLAB_KERNELS_CUDA_ARCHITECTURES": f"{major}{minor}",
        "MAX_JOBS": str(os.cpu_count() or 2),
    }
    # Only what torch, ninja and a compiler need: no package is fetched.
    command = ["bash", "-c", f"cd {tree} && {sys.executable} setup.py build_ext --inplace"]
    result = run(command, report.left, **environment)
    report.step("build", **result)
    if not result["ok"]:
        raise SystemExit("the build failed; see the report")
    return str(tree)


def tests(report: Report, tree: str, name: str, selection: str, limit: float, rehearse: bool) -> None:
    if importlib.util.find_spec("pytest") is None:
        report.step(f"test {name}", ok=False, skipped="pytest is not installed")
        return
    command = f"cd {tree} && {sys.executable} -m pytest -q -p no:cacheprovider {name} -k '{selection}'"
    if not rehearse and importlib.util.find_spec("xdist"):
        command += " -n 8"  # most of the time goes into the float64 reference, which runs on the CPU
    environment = {"DEEPLAB_KERNELS_REHEARSE": "1"} if rehearse else {"PYTHONPATH": tree, "OMP_NUM_THREADS": "2"}
    report.step(
        f"test {name} ({selection})", **run(["bash", "-c", command], min(report.left - 30, limit), **environment)
    )


def machine() -> dict[str, Any]:
    import torch

    info: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


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

    def candidates(self, mode: str, compile_too: bool) -> dict[str, Callable[[], Any]]:
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
        kernels = ("cudnn", "native") if hasattr(torch.backends.cudnn, "depthwise_kernel") else ("auto",)
        for kernel in kernels:
            function = step(self._with_kernel(theirs, kernel))
            found[f"torch eager {kernel}"] = self._with_kernel(function, kernel)
        if compile_too:
            found["torch.compile"] = step(torch.compile(theirs, dynamic=False))
        return found

    def _with_kernel(self, function: Callable[..., Any], kernel: str) -> Callable[..., Any]:
        if kernel == "auto":
            return function
        backend = self.torch.backends.cudnn

        def call(*arguments: Any) -> Any:
            before, backend.depthwise_kernel = backend.depthwise_kernel, kernel
            try:
                return function(*arguments)
            finally:
                backend.depthwise_kernel = before

        return call


def benchmark(report: Report, rehearse: bool, compile_too: bool) -> None:
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from layers import NAMED, Layer

    import deeplab_kernels.ops  # noqa: F401  # registers the operators

    device = "cpu" if rehearse else "cuda"
    timer = Timer(device, rounds=3 if rehearse else 25)
    bandwidth = timer.copy_bandwidth()
    report.data["copy_gb_per_s"] = round(bandwidth, 1)
    torch.backends.cudnn.benchmark = True
    batches = (1,) if rehearse else (8, 1)
    for batch in batches:
        for dtype in ("bfloat16", "float32"):
            for name in ORDER:
                layer = Layer(16, 17, NAMED[name].stride, min(NAMED[name].rate, 4)) if rehearse else NAMED[name]
                for layout in ("nhwc", "nchw"):
                    if report.left < 90:
                        report.step("benchmarks", ok=False, skipped="out of time")
                        return
                    row: dict[str, Any] = {"layer": name, "batch": batch, "dtype": dtype, "layout": layout}
                    try:
                        case = LayerBenchmark(layer, batch, dtype, layout, device)
                        row["errors"] = case.check()
                        for mode, size in case.bytes.items():
                            row[mode] = timer.compare(case.candidates(mode, compile_too and name in ORDER[:2]))
                            row[mode]["floor_us"] = round(size / bandwidth / 1e3, 2)
                    except Exception as error:  # one layer must not cost the others
                        row["failed"] = f"{type(error).__name__}: {error}"
                        row["traceback"] = traceback.format_exc()[-2000:]
                    report.data["layers"].append(row)
                    report.flush()
                    summary = {m: {k: v["median_us"] for k, v in row[m].items() if k != "floor_us"}
                               for m in ("inference", "forward", "backward") if m in row}  # fmt: skip
                    print(name, batch, dtype, layout, row.get("failed", ""), json.dumps(summary), flush=True)
    report.step("benchmarks", ok=True)


# Height, width, labels; the bars of ten iterations in milliseconds, lattices built on the device.
PICTURES = {"375x500x21": (375, 500, 21, 2.0), "1024x2048x19": (1024, 2048, 19, 15.0)}


class CrfBenchmark:
    """Ten iterations on one picture: appearance (80 pixels, 13 grey levels) and smoothness (3 pixels)."""

    def __init__(self, height: int, width: int, labels: int, device: str) -> None:
        import torch
        from torch.nn.functional import interpolate

        self.torch, self.device, self.labels, self.points = torch, device, labels, height * width
        g = torch.Generator().manual_seed(0)
        coarse = (max(height // 24, 2), max(width // 24, 2))
        # Smooth regions with a photograph's noise: the number of vertices is what a lattice costs.
        colours = interpolate(torch.rand(1, 3, *coarse, generator=g) * 255, (height, width), mode="bicubic")[0]
        colours = colours + 4 * torch.randn(colours.shape, generator=g)
        y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
        position = torch.stack([x, y])
        features = [torch.cat([position / 80, colours / 13]), position / 3]
        unary = interpolate(torch.randn(1, labels, *coarse, generator=g), (height, width), mode="bilinear") * 3
        matrices = [-weight * torch.eye(labels) for weight in (10.0, 3.0)]
        self.unary = unary.reshape(1, labels, -1).to(device)
        self.features = [f.reshape(1, f.shape[0], -1).to(device) for f in features]
        self.matrices = [m.to(device) for m in matrices]
        self.ops = torch.ops.deeplab_kernels

    def arguments(self, lattices: list[Any] | None = None) -> tuple[Any, ...]:
        return (self.unary, self.features, lattices or [], self.matrices, None, [3, 3], 10)

    def check(self) -> dict[str, float]:
        """Labels that differ from the definition's in float64 on the CPU, as a share; raises where there are many."""
        from deeplab_kernels import reference

        arguments = self.arguments()
        wide = [[t.double().cpu() for t in a] if isinstance(a, list) and a and a is not arguments[5] else a
                for a in arguments]  # fmt: skip
        wide[0] = self.unary.double().cpu()
        wanted, _ = reference.dense_crf_mean_field(*wide, False)
        energy, _ = self.ops.dense_crf_mean_field(*arguments, False)
        differ = float((energy.cpu().argmax(1) != wanted.argmax(1)).float().mean())
        if not differ < 0.005:
            raise AssertionError(f"{differ:.2%} of the labels differ from the definition's")
        return {"labels that differ": differ}

    def candidates(self) -> dict[str, Callable[[], Any]]:
        torch, ops = self.torch, self.ops
        lattices = [ops.permutohedral_lattice(f) for f in self.features]
        _, saved = ops.dense_crf_mean_field(*self.arguments(lattices), True)
        grad = torch.ones_like(self.unary)
        found: dict[str, Callable[[], Any]] = {
            "10 iterations, lattices built": lambda: ops.dense_crf_mean_field(*self.arguments(), False),
            "10 iterations, lattices given": lambda: ops.dense_crf_mean_field(*self.arguments(lattices), False),
            "backward, unary and matrices": lambda: ops.dense_crf_mean_field_backward(
                grad, saved, *self.arguments(lattices), False, True
            ),
            "backward, features too": lambda: ops.dense_crf_mean_field_backward(
                grad, saved, *self.arguments(lattices), True, True
            ),
            "lattices": lambda: [ops.permutohedral_lattice(f) for f in self.features],
            "appearance filter": lambda: ops.permutohedral_filter(self.unary, self.features[0], lattices[0], 3, False),
            "smoothness filter": lambda: ops.permutohedral_filter(self.unary, self.features[1], lattices[1], 3, False),
        }
        if self.device == "cuda":
            graph = self.graph()
            if graph is not None:
                found["10 iterations, CUDA graph"] = graph
        return found

    def graph(self) -> Callable[[], Any] | None:
        """The whole inference as one CUDA graph; None where a backend waits for the device."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.ops.dense_crf_mean_field(*self.arguments(), False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.ops.dense_crf_mean_field(*self.arguments(), False)
        except RuntimeError:
            return None
        return graph.replay

    def exact(self) -> dict[str, Callable[[], Any]]:
        from deeplab_kernels import ops

        return {"exact appearance filter": lambda: ops.gaussian_filter(self.unary, self.features[0])}


def crf_benchmark(report: Report, rehearse: bool) -> None:
    import torch

    import deeplab_kernels.ops  # noqa: F401  # registers the operators

    device = "cpu" if rehearse else "cuda"
    timer = Timer(device, rounds=3 if rehearse else 25)
    report.data["crf"] = []
    for name, (height, width, labels, bar) in PICTURES.items():
        row: dict[str, Any] = {"picture": name, "bar_ms": bar}
        try:
            small = CrfBenchmark(40, 60, labels, device)
            row |= small.check()
            case = small if rehearse else CrfBenchmark(height, width, labels, device)
            if not rehearse:
                torch.cuda.reset_peak_memory_stats()
            row["times"] = timer.compare(case.candidates())
            if not rehearse:
                row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if name == "375x500x21":
                row["times"] |= Timer(device, rounds=3).compare(case.exact())
        except Exception as error:  # one picture must not cost the other
            row["failed"] = f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc()[-2000:]
        report.data["crf"].append(row)
        report.flush()
        summary = {k: v["median_us"] for k, v in row.get("times", {}).items()}
        print(name, row.get("failed", ""), json.dumps(summary), flush=True)
    report.step("crf benchmarks", ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_suite.json"))
    parser.add_argument("--seconds", type=float, default=570, help="stop in good order before this many (default: 570)")
    parser.add_argument("--rehearse", action="store_true", help="everything but the GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    report = Report(arguments.output, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        report.data["machine"] = machine()
        import torch

        if not arguments.rehearse and not torch.cuda.is_available():
            raise SystemExit("no CUDA device: use --rehearse")
        tree = build(report, Path(folder), arguments.rehearse)
        sys.path.insert(0, tree)
        if arguments.rehearse:
            tests(report, tree, "tests/gpu", "one or kernel or opcheck or views or empty or trains", 240, True)
            crf_benchmark(report, rehearse=True)
            benchmark(report, rehearse=True, compile_too=False)
        else:
            tests(report, tree, "tests/gpu", "not triton", 150, False)
            crf_benchmark(report, rehearse=False)
            benchmark(report, rehearse=False, compile_too=not arguments.no_compile)
            tests(report, tree, "tests/gpu", "triton", 240, False)
            tests(report, tree, "tests/test_triton_atrous_depthwise.py", "gpu", 240, False)
            tests(report, tree, "tests/test_triton_atrous_separable.py", "gpu", 120, False)
    failed = [s["step"] for s in report.data["steps"] if not s.get("ok")]
    failed += [f"{r['layer']} {r['dtype']} {r['layout']}" for r in report.data["layers"] if "failed" in r]
    failed += [r["picture"] for r in report.data.get("crf", []) if "failed" in r]
    print("failed: " + (", ".join(failed) or "nothing"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
