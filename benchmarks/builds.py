"""How long it takes to import the package and to build each network, against their bars.

    python benchmarks/builds.py            # writes results/<machine>/builds.json
    python benchmarks/builds.py --quick    # the small networks, one import; writes nothing

Seconds. An import is timed in a process of its own that has imported torch, the fastest of some. A build draws all
weights; it is the first of its process's but for what the networks share.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import measure
import report

from deeplab_kernels import models

FILE = "builds.json"
BUILD_BAR, IMPORT_BAR = 3.0, 0.3
IMPORTS = {"deeplab_kernels": IMPORT_BAR, "deeplab_kernels.models": None}


def import_seconds(module: str, rounds: int) -> float:
    code = f"import torch, time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(rounds))


def build_seconds(name: str) -> float:
    start = time.perf_counter()
    models.build(name)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little, and nothing is written")
    options = parser.parse_args()
    names = [name for name in models.list_models() if name.endswith("_small") or not options.quick]
    rows = []
    for module, bar in IMPORTS.items():
        rows.append((f"import {module}", import_seconds(module, 1 if options.quick else 5), bar))
    rows += [(f"build {name}", build_seconds(name), BUILD_BAR) for name in names]
    cells = [
        {"what": what, "seconds": f"{seconds:.2f}", "bar": "" if bar is None else f"< {bar:g}"}
        for what, seconds, bar in rows
    ]
    print(report.markdown(cells, ["what", "seconds", "bar"]))
    if not options.quick:
        path = measure.results_folder() / FILE
        results = {"machine": measure.machine(), **measure.stamp(), "seconds": {what: s for what, s, _ in rows}}
        measure.save(path, results)
        print(path)
    return int(any(bar is not None and seconds >= bar for _, seconds, bar in rows))


if __name__ == "__main__":
    sys.exit(main())
