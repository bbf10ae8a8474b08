"""nn.DenseCRF on the CPU: inference, forward and backward of a training step, and the memory each takes.

    python benchmarks/bench_dense_crf_layer.py            # writes results/<machine>/dense_crf_layer.json and .md
    python benchmarks/bench_dense_crf_layer.py --quick    # few rounds; writes nothing

375 x 500, 21 labels, 10 iterations, appearance and smoothness kernels. The bar: backward takes at most three times the
forward. What is trained decides what backward computes: the unary energies and weights need one transposed filter an
iteration; the sigmas (and the guide image) need the filtered values of the forward pass again. With `recompute` the
backward contains the whole forward once more, as checkpointing does, and has no bar. Each case runs in a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "dense_crf_layer.json"
BAR = 3.0
SIGMAS = {"sxy 80, srgb 13": (10.0, 80.0, 13.0), "sxy 49, srgb 5": (4.0, 49.0, 5.0)}
TRAINED = {
    "logits, weights, compatibility": ("appearance_weight", "smoothness_weight", "compatibility"),
    "and the three sigmas": True,
}
COLUMNS = [
    "sigmas",
    "trained",
    "recompute",
    "inference",
    "forward",
    "backward",
    "/ forward",
    "MB kept",
    "MB peak",
    "bars",
]


def run_case(sigmas: str, trained: str, recompute: bool, rounds: int, height: int = 375, width: int = 500) -> None:
    """One case, printed as JSON. Its clocks are those of a process that does nothing else."""
    import crf_inputs
    import torch
    from bench_dense_crf import peak_bytes

    from deeplab_kernels import nn

    weight, sxy, srgb = SIGMAS[sigmas]
    crf = nn.DenseCRF(
        21,
        appearance_weight=weight,
        appearance_sigma=sxy,
        color_sigma=srgb,
        trainable=TRAINED[trained],
        recompute=recompute,
    )
    image = torch.from_numpy(crf_inputs.photograph("coffee", height, width).copy()).permute(2, 0, 1)[None]
    unary = torch.from_numpy(crf_inputs.unary(21, height, width).reshape(1, 21, height, width).copy())
    logits = (-unary).requires_grad_()
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    torch.ones(2, requires_grad=True).mul(2).backward(torch.ones(2))  # loads what the first backward pass loads
    start = peak_bytes()
    times: dict[str, list[float]] = {"inference": [], "forward": [], "backward": []}
    kept = 0
    for _ in range(rounds + 1):
        with torch.no_grad():
            t = [time.perf_counter()]
            crf(logits, image)
            t.append(time.perf_counter())
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            t.append(time.perf_counter())
            out = crf(logits, image)
            t.append(time.perf_counter())
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        kept = sum(size for pointer, size in storages.items() if pointer != logits.untyped_storage().data_ptr())
        leaves = [logits, *(p for p in crf.parameters() if p.requires_grad)]
        t.append(time.perf_counter())
        torch.autograd.grad(out, leaves, gradient)
        t.append(time.perf_counter())
        for name, begin in (("inference", 0), ("forward", 2), ("backward", 4)):
            times[name].append(t[begin + 1] - t[begin])
    medians = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
    print(json.dumps({**medians, "kept_bytes": kept, "peak_bytes": peak_bytes() - start}))


def failures(record: Mapping[str, Any]) -> list[str]:
    ratio = record["backward"] / record["forward"]
    return [] if record["recompute"] or ratio <= BAR else [f"backward / forward {ratio:.1f}, bar {BAR:g}"]


def rows(records: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "sigmas": r["sigmas"],
            "trained": r["trained"],
            "recompute": "yes" if r["recompute"] else "",
            **{name: f"{r[name]:.0f}" for name in ("inference", "forward", "backward")},
            "/ forward": f"{r['backward'] / r['forward']:.1f}",
            "MB kept": f"{r['kept_bytes'] / 1e6:.0f}",
            "MB peak": f"{r['peak_bytes'] / 1e6:.0f}",
            "bars": "" if r["recompute"] else "; ".join(failures(r)) or "met",
        }
        for r in records
    ]


def document(results: Mapping[str, Any]) -> str:
    """The Markdown page of a results file."""
    import report

    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["machine"].items())
    return "\n".join(
        [
            "# nn.DenseCRF on the CPU",
            "",
            f"Machine: {facts}. Commit {results['commit']} ({results['date']}).",
            "",
            "375 x 500, 21 labels, 10 iterations, lattices built in each call; milliseconds, medians. MB kept: what",
            "autograd holds between forward and backward besides the logits; MB peak: growth of the process's peak.",
            "",
            report.markdown(rows(results["records"]), COLUMNS),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(**json.loads(args.case))
        return 0
    import measure
    import report

    records = []
    for sigmas in SIGMAS:
        for trained in TRAINED:
            for recompute in (False, True):
                case = {"sigmas": sigmas, "trained": trained, "recompute": recompute}
                command = [sys.executable, __file__, "--case", json.dumps({**case, "rounds": 2 if args.quick else 7})]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                records.append({**case, **json.loads(output)})
    print(report.markdown(rows(records), COLUMNS))
    if not args.quick:
        results = {"machine": measure.machine(), **measure.stamp(), "records": records}
        path = measure.results_folder() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        Path(path).with_suffix(".md").write_text(document(results))
        print(path)
    return int(any(failures(r) for r in records))


if __name__ == "__main__":
    sys.exit(main())
