"""The exact and the short-range Gaussian filter against blocked plain torch, forward and backward, on the CPU.

    python benchmarks/bench_gaussian_filter.py             # writes results/<machine>/gaussian_filter.{json,md}
    python benchmarks/bench_gaussian_filter.py --quick     # 96x128 only
    python benchmarks/bench_gaussian_filter.py --threads 1 --no-write
    pytest benchmarks/bench_gaussian_filter.py --benchmark-only

21 channels; features of a CRF's appearance kernel (d = 5): position / sxy, colour / srgb, of a generated picture.
"Nothing skipped" divides them by 1000, so that every pair counts. Speeds are pairs of points per second, of all N^2
pairs whether skipped or not; `exp` is how many exponentials plain torch computes in a second on data in the L1 cache,
which no method that forms every pair can exceed by much. Notes: NOTES_gaussian_filter.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import measure
import pytest
import tables
import torch
from torch import Tensor

from deeplab_kernels import ops, reference
from deeplab_kernels.timing import Timing, interleaved

SIZES = {"96x128": (96, 128), "200x250": (200, 250)}
SIGMAS = {"nothing skipped": None, "sxy 80, srgb 13": (80, 13), "sxy 49, srgb 5": (49, 5), "sxy 3": (3, None)}
CHANNELS = 21
RADII = (2, 5, 10)
FILE = "gaussian_filter.json"


def picture(height: int, width: int) -> Tensor:
    """(3, height, width) in 0..255: a few flat regions with soft shading, edges and noise, as photographs have."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 6, generator=generator) * 255
    regions = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")[0]
    shading = torch.nn.functional.interpolate(coarse.flip(3), (height, width), mode="bicubic")[0]
    noise = torch.randn(3, height, width, generator=generator) * 4
    return (0.7 * regions + 0.3 * shading + noise).clamp(0, 255)


def problem(height: int, width: int, sigmas: tuple[float, float | None] | None) -> tuple[Tensor, Tensor]:
    """(values, features) of one image: (1, 21, N), (1, d, N)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position, colour = torch.stack((y, x)).float(), picture(height, width)
    sxy, srgb = sigmas or (1000, 1000)
    parts = [position / sxy] + ([] if srgb is None else [colour / srgb])
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, CHANNELS, height * width, generator=generator).softmax(1)
    return values, torch.cat(parts).flatten(1)[None].contiguous()


def plain_torch(values: Tensor, features: Tensor, rows: int = 512) -> Tensor:
    """What one would write: |f_i - f_j|^2 by a matrix product, exp in place, another product, block by block."""
    v, f = values[0].T.contiguous(), features[0].T.contiguous()
    half = f.square().sum(1) / -2
    out = torch.empty_like(v)
    for start in range(0, len(v), rows):
        block = slice(start, start + rows)
        kernel = torch.addmm(half[None], f[block], f.T).add_(half[block, None]).clamp_(max=0).exp_()
        torch.mm(kernel, v, out=out[block])
    return out.T[None]


def plain_torch_backward(grad: Tensor, values: Tensor, features: Tensor, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Gradients of both, block by block, the kernel formed again."""
    g, v, f = (t[0].T.contiguous() for t in (grad, values, features))
    half = f.square().sum(1) / -2
    grad_v, grad_f = torch.empty_like(v), torch.empty_like(f)
    for start in range(0, len(v), rows):
        block = slice(start, start + rows)
        kernel = torch.addmm(half[None], f[block], f.T).add_(half[block, None]).clamp_(max=0).exp_()
        torch.mm(kernel, g, out=grad_v[block])
        kernel.mul_(torch.addmm(g[block] @ v.T, v[block], g.T))
        grad_f[block] = kernel @ f - kernel.sum(1, keepdim=True) * f[block]
    return grad_v.T[None], grad_f.T[None]


def exponentials_per_second() -> float:
    """torch.exp over as much as fits each thread's L1 cache, all threads."""
    count = 1 << 12
    tensors = torch.rand(torch.get_num_threads(), count).neg_()
    out = torch.empty_like(tensors)
    timing = interleaved({"exp": lambda: torch.exp(tensors, out=out)}, rounds=31)["exp"]
    return tensors.numel() / timing.minimum * 1e3


def check(ours: Tensor, exact: Tensor, what: str, tolerance: float = 1e-5) -> None:
    error, scale = (ours.double() - exact).abs().max().item(), exact.abs().max().item()
    if not error <= tolerance * scale:
        raise measure.CheckFailed(f"{what}: error {error:.2e} of {scale:.2e}")


def exact_rows(values: Tensor, features: Tensor, count: int = 200) -> tuple[Tensor, Tensor]:
    """Some points and the filter's results there in float64."""
    v, f = values.double(), features.double()
    at = torch.linspace(0, v.shape[2] - 1, count).long()
    square = (f[:, :, at, None] - f[:, :, None, :]).square().sum(1)
    return at, v @ torch.exp(-square / 2).mT


def measure_exact(name: str, sigmas: str, rounds: int) -> dict:
    """Forward and backward of ours and plain torch, interleaved."""
    values, features = problem(*SIZES[name], SIGMAS[sigmas])
    grad = torch.randn_like(values)
    at, exact = exact_rows(values, features)
    check(ops.gaussian_filter(values, features)[:, :, at], exact, f"{name}, {sigmas}")
    backward = torch.ops.deeplab_kernels.gaussian_filter_backward.default
    candidates: dict[str, Callable[[], object]] = {
        "ours forward": lambda: ops.gaussian_filter(values, features),
        "ours backward": lambda: backward(grad, values, features, True, True),
    }
    if sigmas == "nothing skipped":  # plain torch takes the same time for every picture
        candidates["plain torch forward"] = lambda: plain_torch(values, features)
        candidates["plain torch backward"] = lambda: plain_torch_backward(grad, values, features)
    timings = interleaved(candidates, rounds=rounds, warmup=1, settle=False)
    pairs = values.shape[2] ** 2
    return record(name, sigmas, pairs, timings)


def measure_local(name: str, radius: int, rounds: int) -> dict:
    height, width = SIZES[name]
    values, features = (t.unflatten(2, (height, width)) for t in problem(height, width, SIGMAS["sxy 80, srgb 13"]))
    grad = torch.randn_like(values)
    if radius == RADII[0]:
        exact = reference.local_gaussian_filter(values.double(), features.double(), (radius, radius))
        check(ops.local_gaussian_filter(values, features, radius), exact, f"{name}, radius {radius}")
    backward = torch.ops.deeplab_kernels.local_gaussian_filter_backward.default
    candidates: dict[str, Callable[[], object]] = {
        "ours forward": lambda: ops.local_gaussian_filter(values, features, radius),
        "ours backward": lambda: backward(grad, values, features, [radius] * 2, True, True),
        "plain torch forward": lambda: reference.local_gaussian_filter(values, features, (radius, radius)),
    }
    timings = interleaved(candidates, rounds=rounds, warmup=1, settle=False)
    return record(name, f"window, radius {radius}", height * width * (2 * radius + 1) ** 2, timings)


def record(name: str, what: str, pairs: int, timings: dict[str, Timing]) -> dict:
    return {"size": name, "what": what, "pairs": pairs, "timings": {k: t.summary() for k, t in timings.items()}}


HEAD = ("size", "what", "forward, ms", "G/s", "share of exp", "plain torch, ms", "times faster", "backward, ms",
        "plain torch, ms")  # fmt: skip


def table(records: list[dict], exponentials: float) -> str:
    """Markdown. Plain torch computes every pair, so its time without skipping stands in the rows with."""
    lines = []
    every_pair = {r["size"]: r["timings"] for r in records if "plain torch backward" in r["timings"]}
    for r in records:
        ours, plain = r["timings"], r["timings"]
        if not r["what"].startswith("window"):
            plain = every_pair.get(r["size"], {})
        forward, backward = (ours[f"ours {kind}"]["median_ms"] for kind in ("forward", "backward"))
        torch_forward, torch_backward = (
            plain.get(f"plain torch {kind}", {}).get("median_ms", float("nan")) for kind in ("forward", "backward")
        )
        speed = r["pairs"] / forward * 1e3
        numbers = [f"{forward:.2f}", f"{speed / 1e9:.2f}", f"{speed / exponentials:.2f}", f"{torch_forward:.0f}"]
        numbers += [f"{torch_forward / forward:.1f}", f"{backward:.2f}", f"{torch_backward:.0f}"]
        lines.append([r["size"], r["what"], *(n.replace("nan", "-") for n in numbers)])
    head = f"exp: {exponentials / 1e9:.2f} G/s. G/s: 10^9 pairs per second. Times are medians.\n\n"
    return head + tables.markdown(HEAD, lines) + "\n"


@pytest.mark.parametrize("contender", ["ours", "plain torch"])
def test_exact_forward(benchmark, contender: str) -> None:
    values, features = problem(*SIZES["96x128"], None)
    function = ops.gaussian_filter if contender == "ours" else plain_torch
    at, exact = exact_rows(values, features)
    check(benchmark.pedantic(function, (values, features), rounds=5, warmup_rounds=1)[:, :, at], exact, contender)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="96x128 only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--no-write", action="store_true", help=f"print only; do not write {FILE} and its table")
    options = parser.parse_args(arguments)
    measure.use_tuned_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    exponentials = exponentials_per_second()
    records: list[dict] = []
    file = measure.results_folder() / FILE
    content = {} if options.no_write else {"machine": measure.machine(), **measure.stamp(), "exp_per_s": exponentials}
    for name in list(SIZES)[: 1 if options.quick else None]:
        exact = [partial(measure_exact, name, sigmas) for sigmas in SIGMAS]
        for measured in (*exact, *(partial(measure_local, name, radius) for radius in RADII)):
            records.append(measured(options.rounds))
            if content:
                measure.save(file, {**content, "records": records})
    text = table(records, exponentials)
    print(text)
    if content:
        head = f"# Gaussian filters on {measure.cpu_name()}, {torch.get_num_threads()} threads\n\n"
        head += "Written by `python benchmarks/bench_gaussian_filter.py`, which says what is measured.\n\n"
        file.with_suffix(".md").write_text(head + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
