"""Registers, shared memory, spills, widest global access and theoretical occupancy of every CUDA kernel, compiled
without a GPU.

    python benchmarks/cuda_resources.py          # sm_80, 90, 100, 120; writes results/compile/cuda_resources.*
    python benchmarks/cuda_resources.py --arch 90 --kernels nhwc --no-write
    python benchmarks/cuda_resources.py --sources 'permutohedral|dense_crf'

nvcc's ptxas reports the resources; the widths and the largest block come from the machine code, through cuobjdump
(nvcc's own or the one that ships with Triton). Shared memory is dynamic, chosen at the launch and at most 48 KB: here
it shows as 0, and the occupancy is that of the registers and threads, and beside it with all 48 KB. Exit code 1 if a
kernel spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import tables
from occupancy import occupancy

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).parent / "results" / "compile" / "cuda_resources.json"
ARCHITECTURES = (80, 90, 100, 120)
SHORT = {"float": "fp32", "double": "fp64", "__half": "fp16", "__nv_bfloat16": "bf16"}


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture."""

    kernel: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    widest_load_bits: int | None  # None where there is no cuobjdump
    widest_store_bits: int | None
    threads: int | None  # of the largest block that the kernel is compiled for
    occupancy_percent: int | None
    occupancy_percent_with_48_kb: int | None


def find_tool(name: str) -> str | None:
    """A CUDA tool: in CUDA_HOME, on PATH, in the usual place, or Triton's copy."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    home = os.environ.get("CUDA_HOME")
    candidates = [
        Path(home) / "bin" / name if home else None,
        shutil.which(name),
        f"/usr/local/cuda/bin/{name}",
        bundled,
    ]
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Mangled -> kernel<arguments>, with the storage types as fp32, fp64, fp16, bf16."""
    mangled = sorted(set(names))
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {m: shorten(d) for m, d in zip(mangled, text.splitlines(), strict=True)}


def shorten(demangled: str) -> str:
    """Of a demangled kernel its name and template arguments."""
    name = re.sub(r"^void ", "", demangled).replace("deeplab_kernels::cuda::", "")
    depth = 0
    for end, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"\b(float|double|__half|__nv_bfloat16)\b", lambda m: SHORT[m.group()], name)


def access_widths(cubin: Path, cuobjdump: str) -> dict[str, tuple[int, int]]:
    """Mangled kernel -> bits of its widest load from and store to global memory."""
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    widths: dict[str, tuple[int, int]] = {}
    for section in sass.split("Function : ")[1:]:
        name, body = section.split("\n", 1)
        widest = {"LDG": 0, "STG": 0}
        for op, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", body):
            bits = next((int(m) for m in re.findall(r"\.(?:[US]?)(8|16|64|128|256)\b", modifiers)), 32)
            widest[op] = max(widest[op], bits)
        widths[name.strip()] = (widest["LDG"], widest["STG"])
    return widths


def block_sizes(cubin: Path, cuobjdump: str) -> dict[str, int]:
    """Mangled kernel -> threads of the largest block that __launch_bounds__ allows."""
    elf = subprocess.run([cuobjdump, "-elf", str(cubin)], capture_output=True, text=True, check=True).stdout
    sizes: dict[str, int] = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", section)
        if bounds:
            sizes[section.split("\n", 1)[0].strip()] = math.prod(int(size, 16) for size in bounds.groups())
    return sizes


def compile_source(source: Path, arch: int, nvcc: str, cuobjdump: str | None) -> list[Resources]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            nvcc,
            "-std=c++20",
            "-O3",
            "-DNDEBUG",
            f"-arch=sm_{arch}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            str(cubin),
        ]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source.name} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
        widths = access_widths(cubin, cuobjdump) if cuobjdump else {}
        sizes = block_sizes(cubin, cuobjdump) if cuobjdump else {}
    found: list[Resources] = []
    names = demangle(re.findall(r"Compiling entry function '(\S+)'", done.stderr))
    for entry in done.stderr.split("Compiling entry function '")[1:]:
        mangled = entry.split("'", 1)[0]
        if "cub::" in names[mangled]:  # the radix sort's
            continue

        def number(pattern: str, text: str = entry) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        load, store = widths.get(mangled, (None, None))
        registers, shared, threads = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), sizes.get(mangled)

        def share(bytes_: int, registers: int = registers, threads: int | None = threads) -> int | None:
            return None if threads is None else occupancy(arch, -(-threads // 32), registers, bytes_)

        found.append(
            Resources(
                names[mangled],
                arch,
                registers,
                shared,
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores"),
                number(r"(\d+) bytes spill loads"),
                load,
                store,
                threads,
                share(shared),
                share(48 << 10),
            )
        )
    return found


def measure(architectures: Sequence[int], jobs: int = 2, sources: str = "") -> list[Resources]:
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None:
        raise SystemExit("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    files = [s for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) if re.search(sources, s.stem)]
    work = [(s, a) for s in files for a in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda item: compile_source(*item, nvcc, cuobjdump), work)
    # A kernel that several files instantiate (those of the accumulation type) is listed once.
    unique = {(r.kernel, r.arch): r for found in results for r in found}
    return [unique[key] for key in sorted(unique)]


def table(resources: Sequence[Resources]) -> str:
    """One row a kernel, registers of every architecture side by side."""
    rows: dict[str, dict[int, Resources]] = defaultdict(dict)
    for r in resources:
        rows[r.kernel][r.arch] = r
    architectures = sorted({r.arch for r in resources})
    head = [
        "kernel",
        *(f"registers sm_{a}" for a in architectures),
        "static shared B",
        "spill stores / loads B",
        "load / store bits",
        "threads",
        "occupancy, %",
        "with 48 KB, %",
    ]
    lines = []
    for kernel, by_arch in rows.items():
        some = by_arch.get(90) or next(iter(by_arch.values()))
        stores, loads = (max(getattr(r, f"spill_{k}_bytes") for r in by_arch.values()) for k in ("store", "load"))
        width = "-" if some.widest_load_bits is None else f"{some.widest_load_bits} / {some.widest_store_bits}"
        registers = [str(by_arch[a].registers) if a in by_arch else "-" for a in architectures]
        lines.append(
            [
                f"`{kernel}`",
                *registers,
                str(max(r.shared_bytes for r in by_arch.values())),
                f"{stores} / {loads}",
                width,
                str(some.threads or "-"),
                *(
                    " / ".join(str(getattr(by_arch[a], field) or "-") for a in architectures if a in by_arch)
                    for field in ("occupancy_percent", "occupancy_percent_with_48_kb")
                ),
            ]
        )
    return tables.markdown(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="for example 90")
    parser.add_argument("--kernels", default="", help="only those whose name matches this regular expression")
    parser.add_argument("--sources", default="", help="compile only files that match; other kernels' figures are kept")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    measured = measure(arguments.arch, arguments.jobs, arguments.sources)
    if arguments.sources and FILE.exists():
        kept = [Resources(**r) for r in json.loads(FILE.read_text())["kernels"]]
        both = {(r.kernel, r.arch): r for r in [*kept, *measured]}
        measured = [both[key] for key in sorted(both)]
    resources = [r for r in measured if re.search(arguments.kernels, r.kernel)]
    if not resources:
        raise SystemExit(f"no kernel's name matches {arguments.kernels!r}")
    text = table(resources)
    print(text)
    spilling = sorted({r.kernel for r in resources if r.spill_store_bytes or r.spill_load_bytes})
    print(f"\n{len({r.kernel for r in resources})} kernels; spilling: {', '.join(spilling) or 'none'}")
    if not arguments.no_write:
        nvcc = find_tool("nvcc")
        assert nvcc is not None
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        compiler = f"nvcc {release.group(1) if release else 'unknown'}"
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps({"compiler": compiler, "kernels": [asdict(r) for r in resources]}, indent=1) + "\n")
        note = (
            "Shared memory is dynamic, at most 48 KB a block. Spills: the worst architecture. "
            "Widths: of global accesses in the machine code for sm_90. Theoretical occupancy of the largest block that "
            "a kernel is compiled for, by registers and threads, and with all 48 KB of shared memory; for each "
            "architecture.\n"
        )
        architectures = ", ".join(f"sm_{a}" for a in arguments.arch)
        FILE.with_suffix(".md").write_text(
            f"# CUDA kernels, compiled by {compiler} for {architectures} (not run)\n\n{note}\n{text}\n"
        )
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
