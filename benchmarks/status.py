"""What README says about GPUs, from the files under results/<gpu>/ and nothing else.

benchmarks/gpu_suite.py writes them. A row of README's status table is held to the test files and measurements named
here; while there are none it says "not measured on a GPU".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bars
import tables
from suite import stored

UNMEASURED = "not measured on a GPU"
# Start of a row of README's status table -> test files that show it on a GPU, subjects of bench_contenders that time
# it there.
EVIDENCE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "`ops.atrous_depthwise_conv2d`": (("test_atrous_depthwise",), ("depthwise",)),
    "`ops.atrous_separable_conv2d`": (("test_atrous_separable",), ("separable",)),
    "`ops.atrous_spatial_pyramid`": (("test_atrous_spatial_pyramid",), ("aspp",)),
    "`AtrousSeparableConv2d`": ((), ("separable",)),
    "DeepLab v3 and v3+": ((), ("models",)),
    "`ops.permutohedral_filter`": (("test_permutohedral", "test_dense_crf"), ()),
    "`ops.gaussian_filter`": (("test_gaussian_filter",), ()),
}


@dataclass(frozen=True)
class Run:
    """One folder of results of a GPU."""

    gpu: str
    date: str
    suite: Mapping[str, Any]
    contenders: Mapping[str, Any]

    def tests(self, stem: str) -> dict[str, int]:
        """passed, failed: of one test file, over all steps."""
        found = {"passed": 0, "failed": 0}
        for step in self.suite.get("steps", []):
            for file, counts in (step.get("files") or {}).items():
                if Path(file).stem == stem:
                    for key in found:
                        found[key] += counts.get(key, 0)
        return found

    def timed(self, subject: str) -> int:
        """Cases of a subject in which ours was timed on the device."""
        return sum(
            (record["subject"], record["device"]) == (subject, "cuda")
            and any(name.startswith("ours") for name in record["timings"])
            for record in self.contenders.get("records", [])
        )


def runs(root: Path) -> list[Run]:
    """Of every folder under ``root`` that gpu_suite.py wrote on a GPU, the latest first; rehearsals do not count."""
    found = []
    for file in sorted(root.glob("*/gpu_suite.json")):
        suite = json.loads(file.read_text())
        gpu = suite.get("machine", {}).get("gpu")
        if not gpu or suite.get("rehearsal"):
            continue
        beside = file.with_name("contenders.json")
        contenders = json.loads(beside.read_text()) if beside.exists() else {}
        when = f"{suite.get('date', 'no date')}, commit {suite.get('commit', 'unknown')}"
        found.append(Run(gpu, when, suite, contenders))
    return sorted(found, key=lambda run: run.date, reverse=True)


def evidence(tests: Sequence[str], subjects: Sequence[str], measured: Sequence[Run]) -> str:
    """What the latest run that has any says about these tests and subjects."""
    for run in measured:
        counts = [run.tests(stem) for stem in tests]
        passed, failed = (sum(c[key] for c in counts) for key in ("passed", "failed"))
        timed = sum(run.timed(subject) for subject in subjects)
        parts = [f"{passed} tests passed" if passed else "", f"**{failed} failed**" if failed else ""]
        parts.append(f"{timed} cases timed" if timed else "")
        if any(parts):
            return f"{', '.join(part for part in parts if part)} on an {run.gpu} ({run.date})"
    return UNMEASURED


def update_rows(text: str, measured: Sequence[Run]) -> str:
    """README's ``text`` with what stands behind "GPU:" in the status table."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("| ") and re.search(r"GPU: [^|]*", line):
            key = next((key for key in EVIDENCE if line.startswith(f"| {key}")), None)
            words = evidence(*EVIDENCE[key], measured) if key else UNMEASURED
            line = re.sub(r"GPU: [^|]*", lambda _, words=words: f"GPU: {words} ", line)
        lines.append(line)
    return "\n".join(lines)


def bars_table(root: Path, measured: Sequence[Run]) -> str:
    """Markdown: the demands on GPUs and what became of them in each run."""
    if not measured:
        return f"Demands on GPUs (`benchmarks/bars.py`): {UNMEASURED}. `python benchmarks/gpu_suite.py` measures them."
    folders = {file.parent for file in root.glob("*/gpu_suite.json")}
    lines = []
    for folder in sorted(folders):
        results = stored.read(folder)
        gpu = results.machine.get("gpu")
        if gpu not in {run.gpu for run in measured}:
            continue
        for verdict in results.verdicts:
            if verdict.demand.device == "GPU":
                lines.append(_cells(gpu, verdict))
    return tables.markdown(("GPU", "demand", "bar", "cases met", "furthest from it", ""), lines)


def _cells(gpu: str, verdict: bars.Verdict) -> list[str]:
    demand = verdict.demand
    relation = ">=" if demand.at_least else "<="
    met = f"{verdict.met} of {verdict.measured}" if verdict.measured else ""
    worst = "" if verdict.worst is None else f"{verdict.worst:.2f}"
    return [gpu, f"{demand.what} ({demand.source})", f"{relation} {demand.limit:g}", met, worst, verdict.text]
