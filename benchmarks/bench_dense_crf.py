"""Dense CRF on the CPU: deeplab_kernels.densecrf against pydensecrf, building the lattice included, with the bars.

    python benchmarks/bench_dense_crf.py            # all cases; writes results/<machine>/dense_crf.json and .md
    python benchmarks/bench_dense_crf.py --quick    # the three small cases, few rounds; writes nothing
    python benchmarks/bench_dense_crf.py --large    # also 4096 x 4096 with 21 labels (ours alone; needs 16 GB)

Before a case is timed, ours must agree with pydensecrf: the same labels on 99.9 % of the pixels, |dQ| <= 1e-3. Ours
with all threads, ours with one, and pydensecrf (which has one) then alternate in one process. Peak memory is that of a
process of its own each, above what it had with its inputs loaded. pydensecrf: requirements/bench.txt.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import crf_inputs
import numpy as np
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf

FILE = "dense_crf.json"


@dataclass(frozen=True)
class Case:
    """An image, its labels, and the kernels: appearance (weight, sxy, srgb), smoothness (weight, sxy)."""

    height: int
    width: int
    labels: int
    appearance: tuple[float, float, float]
    smoothness: tuple[float, float] | None = None
    iterations: int = 10
    photograph: str = "coffee"
    # Bars: times faster than pydensecrf with all threads and with one, and share of its memory.
    faster: float | None = None
    faster_with_one: float | None = None
    memory_share: float | None = None

    @property
    def name(self) -> str:
        _, sxy, srgb = self.appearance
        smooth = f" + {self.smoothness[1]:g}" if self.smoothness else ""
        return f"{self.height}x{self.width}x{self.labels} {sxy:g}/{srgb:g}{smooth}"

    def inputs(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        image = crf_inputs.photograph(self.photograph, self.height, self.width)
        return image, crf_inputs.unary(self.labels, self.height, self.width)

    def infer(self, module: ModuleType, image: NDArray[np.uint8], energies: NDArray[np.float32]) -> Any:
        return crf_inputs.model(module, image, energies, self.appearance, self.smoothness).inference(self.iterations)


SMALL = [
    Case(375, 500, 21, (10, 80, 13), (3, 3), faster=10, faster_with_one=4),
    Case(375, 500, 21, (4, 49, 5), (3, 3), faster=10, faster_with_one=4),
    Case(512, 512, 21, (4, 67, 3), photograph="astronaut"),
]
CASES = [*SMALL, Case(1024, 2048, 19, (10, 80, 13), faster=10, memory_share=0.5)]
LARGE = Case(4096, 4096, 21, (10, 80, 13), (3, 3), photograph="astronaut")
LARGE_LIMIT_GB = 16


class CheckFailed(AssertionError):
    """The two results differ; they must not be timed."""


def check(name: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> dict[str, float]:
    """The promise of deeplab_kernels.densecrf."""
    difference = float(np.abs(ours - theirs).max())
    other_labels = float((ours.argmax(0) != theirs.argmax(0)).mean())
    if not (difference <= 1e-3 and other_labels <= 1e-3):
        raise CheckFailed(
            f"{name}: Q differs from pydensecrf's by {difference:.1e}, "
            f"the labels on {100 * other_labels:.2f} % of the pixels"
        )
    return {"largest_difference": difference, "other_labels": other_labels}


def with_threads(threads: int, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        dcrf.set_num_threads(threads)
        return function()

    return call


def measure(case: Case, threads: int, rounds: int, seconds: float, memory: bool = True) -> dict[str, Any]:
    """Checks, then times, a case; a JSON-ready record. Without pydensecrf ours alone."""
    from measure import load_average, stamp

    from deeplab_kernels.timing import interleaved

    image, energies = case.inputs()
    theirs = crf_inputs.pydensecrf()
    contenders = {
        f"ours, {n} thread{'s' * (n > 1)}": with_threads(n, lambda: case.infer(dcrf, image, energies))
        for n in sorted({threads, 1}, reverse=True)
    }
    checked = {}
    if theirs is not None:
        module = theirs
        contenders["pydensecrf"] = lambda: case.infer(module, image, energies)
        ours = [np.array(function()) for name, function in contenders.items() if name != "pydensecrf"]
        expected = np.array(contenders["pydensecrf"]())
        checked = check(case.name, ours[0], expected)
        if any(not np.array_equal(q, ours[0]) for q in ours[1:]):
            raise CheckFailed(f"{case.name}: the result depends on the number of threads")
        del ours, expected
    other, monai = monai_contender(case, image, energies)
    if other is not None:
        contenders["MONAI"] = other
    timings = interleaved(contenders, rounds=rounds, warmup=1, candidate_seconds=seconds)
    d = None

    def build() -> None:
        nonlocal d
        d = crf_inputs.model(dcrf, image, energies, case.appearance, case.smoothness)

    built = interleaved({"build": with_threads(threads, build)}, rounds=min(rounds, 5), warmup=1)["build"]
    del d
    record = {
        "name": case.name,
        "case": asdict(case),
        "threads": threads,
        "load_average": round(load_average(), 1),
        **stamp(),
        "check": checked,
        "monai": monai,
        "timings": {name: timing.summary() for name, timing in timings.items()},
        "ours_build": built.summary(),
    }
    if memory:
        record["memory"] = memory_of(case, ["ours", *(["pydensecrf"] if theirs else [])], threads)
    return record


# Memory: a process for each.


def memory_of(case: Case, contenders: list[str], threads: int) -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        image, energies = case.inputs()
        np.save(Path(folder, "image.npy"), image)
        np.save(Path(folder, "unary.npy"), energies)
        del image, energies
        for contender in contenders:
            arguments = json.dumps({"contender": contender, "folder": folder, "threads": threads, "case": asdict(case)})
            command = [sys.executable, __file__, "--memory", arguments]
            found[contender] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE).group(1)) * 1024
    except (OSError, AttributeError):
        import resource  # on Linux it would begin with what the parent process had

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report_memory(arguments: Mapping[str, Any]) -> None:
    case = Case(**arguments["case"])
    image, energies = (np.load(Path(arguments["folder"], f"{name}.npy")) for name in ("image", "unary"))
    module = dcrf if arguments["contender"] == "ours" else crf_inputs.pydensecrf()
    assert module is not None
    dcrf.set_num_threads(arguments["threads"])
    before, start = peak_bytes(), time.perf_counter()
    q = case.infer(module, image, energies)
    seconds = time.perf_counter() - start
    np.asarray(q)
    print(json.dumps({"above_inputs_bytes": peak_bytes() - before, "peak_bytes": peak_bytes(), "seconds": seconds}))


# MONAI.


def monai_contender(
    case: Case, image: NDArray[np.uint8], energies: NDArray[np.float32]
) -> tuple[Callable[[], Any] | None, str]:
    """(MONAI's CRF on the case, ""), or (None, why it cannot be timed)."""
    block, reason = crf_inputs.monai_crf(case.appearance, case.smoothness, case.iterations)
    if block is None:
        return None, reason
    import torch

    logits = -torch.from_numpy(energies).reshape(1, case.labels, case.height, case.width)
    guide = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]

    def call() -> Any:
        with torch.inference_mode():
            return block(logits, guide)

    try:
        call()
    except Exception as error:  # it is compiled for some numbers of labels and features only
        return None, f"fails on {case.name}: {type(error).__name__}: {error}"[:300]
    return call, ""


# Bars and tables.


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    """pydensecrf's time over ours, and our memory over its."""
    times = {name: timing["median_ms"] for name, timing in record["timings"].items()}
    found = {}
    theirs = times.get("pydensecrf")
    if theirs is not None:
        ours = [time for name, time in times.items() if name.startswith("ours")]  # all threads, one thread
        found["faster"], found["faster_with_one"] = theirs / ours[0], theirs / ours[-1]
    memory = record.get("memory", {})
    if "pydensecrf" in memory:
        found["memory_share"] = memory["ours"]["above_inputs_bytes"] / memory["pydensecrf"]["above_inputs_bytes"]
    return found


def failures(record: Mapping[str, Any]) -> list[str]:
    found = ratios(record)
    wrong = []
    for key, better in (("faster", 1), ("faster_with_one", 1), ("memory_share", -1)):
        bar = record["case"][key]
        if bar is not None and key in found and better * found[key] < better * bar:
            wrong.append(f"{key.replace('_', ' ')} {found[key]:.2f}, bar {bar:g}")
    if "large" in record and record["memory"]["ours"]["peak_bytes"] >= LARGE_LIMIT_GB * 1e9:
        wrong.append(f"peak {record['memory']['ours']['peak_bytes'] / 1e9:.1f} GB, bar {LARGE_LIMIT_GB} GB")
    return wrong


def rows(records: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    table = []
    for record in records:
        row = {"case": record["name"]}
        found = ratios(record)
        for key, timing in record["timings"].items():
            ours = "one thread" if "1 thread" in key else "all threads"
            threads = ours if key.startswith("ours") else key
            row[threads] = f"{timing['median_ms']:.0f}"
            row[f"{threads}: spread"] = f"{100 * timing['iqr_ms'] / timing['median_ms']:.0f} %"
        if "ours_build" in record:
            row["of it build"] = f"{record['ours_build']['median_ms']:.0f}"
        for key, name in (("faster", "x, all"), ("faster_with_one", "x, one")):
            if key in found:
                row[name] = f"{found[key]:.1f}"
        for contender, name in (("ours", "MB"), ("pydensecrf", "pydensecrf MB")):
            if contender in record.get("memory", {}):
                row[name] = f"{record['memory'][contender]['above_inputs_bytes'] / 1e6:.0f}"
        if "large" in record:
            row["all threads"] = f"{1e3 * record['memory']['ours']['seconds']:.0f}"
        row["bars"] = "; ".join(failures(record)) or ("met" if any(_has_bar(record)) else "")
        table.append(row)
    return table


def _has_bar(record: Mapping[str, Any]) -> list[bool]:
    return [record["case"][key] is not None for key in ("faster", "faster_with_one", "memory_share")] + [
        "large" in record
    ]


COLUMNS = [
    "case",
    "all threads",
    "all threads: spread",
    "of it build",
    "one thread",
    "one thread: spread",
    "pydensecrf",
    "pydensecrf: spread",
    "MONAI",
    "MONAI: spread",
    "x, all",
    "x, one",
    "MB",
    "pydensecrf MB",
    "bars",
]


def document(results: Mapping[str, Any]) -> str:
    """The Markdown page of a results file."""
    import report

    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["machine"].items())
    table = rows(results["records"])
    commits = sorted({f"{r['commit']} ({r['date']}), {r['threads']} threads" for r in results["records"]})
    return "\n".join(
        [
            "# Dense CRF on the CPU",
            "",
            f"Machine: {facts}. Commit {', '.join(commits)}.",
            "",
            "`deeplab_kernels.densecrf` and pydensecrf, same inputs and parameters, 10 iterations, building the",
            "lattice included. Milliseconds, medians of alternating rounds; spread: interquartile range over median.",
            "Case: height x width x labels, sxy/srgb of the appearance kernel, + sxy of the smoothness kernel. x:",
            "pydensecrf's time over ours. MB: peak of a process of its own, above its inputs. The results were",
            "compared before: labels equal on 99.9 % of the pixels, |dQ| <= 1e-3.",
            "",
            report.markdown(table, report.used_columns(COLUMNS, table)),
            "",
            *([f"MONAI: {results['monai']}."] if results["monai"] else []),
            "",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small cases, few rounds; nothing is written")
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096 x 21: peak memory and time of ours")
    parser.add_argument("--cases", metavar="TEXT", help="only those whose name contains this (375x500, 80/13 ...)")
    parser.add_argument("--threads", type=int, help="default: all cores that the process may use")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write here; a full run has a default")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    import measure as shared
    import report

    threads = args.threads or dcrf.get_num_threads()
    cases = [case for case in (SMALL if args.quick else CASES) if not args.cases or args.cases in case.name]
    path = args.json or (None if args.quick or args.cases else shared.results_folder() / FILE)
    results: dict[str, Any] = {"machine": shared.machine(), "monai": "", "records": []}
    results["machine"].pop("threads")
    if crf_inputs.pydensecrf() is None:
        print("pydensecrf is not installed (requirements/bench.txt): ours alone", file=sys.stderr)
    if (load := shared.load_average()) > 1:
        print(f"{load:.1f} other processes were running on average: figures of a busy machine", file=sys.stderr)
    for case in cases:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        rounds = args.rounds or (3 if args.quick else 9)
        record = measure(case, threads, rounds, 10 if args.quick else 60, not args.no_memory)
        results["records"].append(record)
        results["monai"] = record["monai"]
        if path:
            shared.save(path, results)
    if args.large:
        memory = memory_of(LARGE, ["ours"], threads)
        record = {"name": LARGE.name, "case": asdict(LARGE), "threads": threads, "large": True, **shared.stamp()}
        results["records"].append({**record, "timings": {}, "memory": memory})
    table = rows(results["records"])
    print(report.text(table, report.used_columns(COLUMNS, table)))
    if results["monai"]:
        print(f"MONAI: {results['monai']}")
    if path:
        shared.save(path, results)
        path.with_suffix(".md").write_text(document(results))
        print(f"written: {path}, {path.with_suffix('.md')}")
    return results["records"]


def main() -> None:
    args = parse()
    if args.memory:
        report_memory(json.loads(args.memory))
        return
    if any(failures(record) for record in run(args)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
