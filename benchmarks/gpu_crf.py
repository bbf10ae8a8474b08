"""The dense CRF on a GPU: ten iterations with the lattices built on the device, their parts, and the exact filter."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

from gpu_layers import Timer
from gpu_report import Report, step_main

PICTURES = {"375x500x21": (375, 500, 21), "1024x2048x19": (1024, 2048, 19)}  # height, width, labels


class CrfBenchmark:
    """Ten iterations on one picture: appearance (80 pixels, 13 grey levels) and smoothness (3 pixels)."""

    def __init__(self, height: int, width: int, labels: int, device: str) -> None:
        import torch
        from torch.nn.functional import interpolate

        self.torch, self.device, self.labels, self.points = torch, device, labels, height * width
        self.size = height, width
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

    def monai(self) -> tuple[dict[str, Callable[[], Any]], str]:
        """MONAI's CRF on the same picture, where its extension is there; else why not."""
        import crf_inputs

        block, reason = crf_inputs.monai_crf((10.0, 80.0, 13.0), (3.0, 3.0), 10)
        if block is None:
            return {}, reason
        logits, guide = (t.unflatten(2, self.size) for t in (-self.unary, self.features[0][:, 2:] * 13))

        def call() -> Any:
            with self.torch.inference_mode():
                return block(logits, guide)

        try:
            call()
        except Exception as error:  # it is compiled for some numbers of labels and features only
            return {}, f"{type(error).__name__}: {error}"[:300]
        return {"MONAI, 10 iterations": call}, ""

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


def benchmark(report: Report, rehearse: bool) -> None:
    import torch

    import deeplab_kernels.ops  # noqa: F401  # registers the operators

    device = "cpu" if rehearse else "cuda"
    timer = Timer(device, rounds=3 if rehearse else 25)
    report.data["crf"] = []
    for name, (height, width, labels) in PICTURES.items():
        row: dict[str, Any] = {"picture": name}
        try:
            small = CrfBenchmark(40, 60, labels, device)
            row |= small.check()
            case = small if rehearse else CrfBenchmark(height, width, labels, device)
            if not rehearse:
                torch.cuda.reset_peak_memory_stats()
            other, reason = case.monai()
            report.data["monai"] = reason
            row["times"] = timer.compare({**case.candidates(), **other})
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
    report.step("crf", ok=True)


if __name__ == "__main__":
    step_main(__doc__, benchmark)
