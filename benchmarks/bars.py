"""What the operators and networks are held to: every demand in one table, and records judged by them; no torch here.

A demand names its source, the issue of the project that asks for it; two issues may ask for different figures of the
same thing, and both stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAYOUTS = ("nchw", "nhwc")
LARGE = 64e6  # bytes of x from which a run is bound by memory


@dataclass(frozen=True)
class Demand:
    """device: where it is measured; at_least: the value must not be below ``limit``, else not above."""

    source: str
    device: str
    what: str
    limit: float
    at_least: bool = True


_FASTER = "PyTorch's best over ours"
DEMANDS: dict[str, Demand] = {
    "depthwise": Demand("issue 2", "CPU", f"depthwise layer, inference, each layout: {_FASTER}", 1),
    "depthwise, rate >= 6": Demand("issue 2", "CPU", f"depthwise layer, inference, rates >= 6: {_FASTER}", 8),
    "depthwise step": Demand("issue 2", "CPU", f"depthwise layer, training step: {_FASTER}", 2),
    "depthwise step, rate >= 2": Demand("issue 2", "CPU", f"depthwise layer, training step, rates >= 2: {_FASTER}", 10),
    "large over clone": Demand("issue 2", "CPU", "depthwise layer over 64 MB: time over x.clone()'s", 1.5, False),
    "cached over clone": Demand("issue 2", "CPU", "depthwise layer in the caches: time over x.clone()'s", 3, False),
    "bf16": Demand("issue 2", "CPU", "depthwise layer: time in bf16 over fp32", 2, False),
    "kept": Demand("issue 2", "CPU", "depthwise layer, training: bytes kept over x and one more", 1, False),
    "crf": Demand("issue 3", "CPU", "dense CRF, all threads: pydensecrf's time over ours", 10),
    "crf, one thread": Demand("issue 3", "CPU", "dense CRF, one thread: pydensecrf's time over ours", 4),
    "crf memory": Demand("issue 3", "CPU", "dense CRF: peak memory over pydensecrf's", 0.5, False),
    "crf large": Demand("issue 3", "CPU", "dense CRF, 4096 x 4096, 21 labels: peak memory, GB", 16, False),
    "crf backward": Demand("issue 3", "CPU", "dense CRF as a layer: backward over forward", 3, False),
    "network 16": Demand("issue 4", "CPU", f"DeepLab v3+ Xception-65, inference, output stride 16: {_FASTER}", 1.5),
    "network 8": Demand("issue 4", "CPU", f"DeepLab v3+ Xception-65, inference, output stride 8: {_FASTER}", 2),
    "network step": Demand("issue 4", "CPU", f"DeepLab v3+ Xception-65, training step: {_FASTER}", 1.5),
    "network memory": Demand("issue 4", "CPU", "DeepLab v3+ Xception-65: peak memory over PyTorch's", 1, False),
    "block": Demand("issue 5", "CPU", f"whole separable block, inference, every layer of v3+: {_FASTER}", 1.3),
    "block, ASPP": Demand("issue 5", "CPU", f"whole separable block, inference, ASPP's layers: {_FASTER}", 3),
    "aspp": Demand("issue 5", "CPU", f"ASPP stage: {_FASTER}", 3),
    "network 16, fused": Demand("issue 5", "CPU", f"DeepLab v3+ Xception-65, output stride 16: {_FASTER}", 1.7),
    "network 8, fused": Demand("issue 5", "CPU", f"DeepLab v3+ Xception-65, output stride 8: {_FASTER}", 2.5),
    "network step, fused": Demand("issue 5", "CPU", f"DeepLab v3+ Xception-65, training step: {_FASTER}", 2),
    "gpu crf 375x500x21": Demand("issue 3", "GPU", "dense CRF, 375 x 500, 21 labels, 10 iterations: ms", 2, False),
    "gpu crf 1024x2048x19": Demand("issue 3", "GPU", "dense CRF, 1024 x 2048, 19 labels, 10 iterations: ms", 15, False),
    "gpu exact filter": Demand("issue 3", "GPU", "exact Gaussian filter, 375 x 500, 21 labels: ms", 25, False),
    "gpu bandwidth": Demand("issue 5", "GPU", "depthwise layer over 64 MB: share of the copy bandwidth", 0.85),
    "gpu depthwise, rate >= 2": Demand("issue 5", "GPU", f"depthwise layer, rates of 2 and more: {_FASTER}", 2),
    "gpu depthwise": Demand("issue 5", "GPU", f"depthwise layer: {_FASTER}", 1),
    "gpu block": Demand("issue 5", "GPU", f"whole separable block, inference: {_FASTER}", 1.5),
    "gpu aspp": Demand("issue 5", "GPU", f"ASPP stage: {_FASTER}", 3),
    "gpu network": Demand(
        "issue 5", "GPU", "DeepLab v3+ Xception-65, inference, bf16, N = 8: max-autotune's time (NHWC) over ours", 1.4
    ),
    "gpu network step": Demand("issue 5", "GPU", f"DeepLab v3+ Xception-65, training step: {_FASTER}", 1.4),
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One demand on one record: ``value`` must be at least (or at most) ``limit``."""

    name: str
    layout: str
    value: float
    limit: float
    at_least: bool
    demand: str = ""  # key of DEMANDS

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def shortfall(self) -> str:
        return f"{self.name} {self.value:.2f} {'<' if self.at_least else '>'} {self.limit:g}"

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict} {self.layout} {self.name}: {self.value:.2f} {relation} {self.limit:g}"


def bar(demand: str, value: float, name: str = "speed-up", layout: str = "best layout") -> Bar:
    asked = DEMANDS[demand]
    return Bar(name, layout, value, asked.limit, asked.at_least, demand)


def median(record: Mapping[str, Any], kind: str, dtype: str, layout: str) -> float | None:
    timing = record["timings"].get(f"{kind} {dtype} {layout}")
    return None if timing is None else timing["median_ms"]


def best_pytorch(record: Mapping[str, Any], dtype: str, layouts: Iterable[str]) -> tuple[float, str] | None:
    """(milliseconds, contender) of PyTorch's fastest."""
    found = [
        (ms, f"{kind} {layout}")
        for kind in ("eager", "compile", "frozen")
        for layout in layouts
        if (ms := median(record, kind, dtype, layout)) is not None
    ]
    return min(found, default=None)


def layouts_of(record: Mapping[str, Any]) -> list[str]:
    return [
        layout
        for layout in LAYOUTS
        if any(key.startswith("ours") and key.endswith(layout) for key in record["timings"])
    ]


def yardstick(record: Mapping[str, Any], dtype: str, layout: str) -> tuple[float, str] | None:
    """PyTorch's fastest that ours is compared with: of the same layout in inference, of both in training."""
    return best_pytorch(record, dtype, [layout] if record["mode"] == "inference" else LAYOUTS)


def bars(record: Mapping[str, Any], last_level_cache_bytes: int = 32 << 20) -> list[Bar]:
    """The demands on one record of depthwise.measure_convolution, for those contenders that were measured."""
    found = []
    for layout in layouts_of(record):
        ours = median(record, "ours", "float32", layout)
        rival = yardstick(record, "float32", layout)
        clone = median(record, "clone", "float32", layout)
        ratio = rival[0] / ours if ours is not None and rival is not None else None
        found += _depthwise(record["mode"], record["convolution"]["rate"], layout, ratio)
        if record["mode"] == "training":
            if "kept_bytes" in record:
                # Vectors of one number per channel are not of the activation's size: a hundredth is left for them.
                allowed = 1.01 * (record["input_bytes"] + record["output_bytes"])
                found.append(bar("kept", record["kept_bytes"][layout] / allowed, "bytes kept / (x + out)", layout))
            continue
        if ours is not None and clone is not None:
            if record["input_bytes"] > LARGE:
                found.append(bar("large over clone", ours / clone, "time / clone", layout))
            elif record["input_bytes"] <= last_level_cache_bytes:
                found.append(bar("cached over clone", ours / clone, "time / clone", layout))
        half = median(record, "ours", "bfloat16", layout)
        if ours is not None and half is not None:
            found.append(bar("bf16", half / ours, "bf16 / fp32", layout))
    return found


def _depthwise(mode: str, rate: int, layout: str, ratio: float | None) -> list[Bar]:
    if ratio is None:
        return []
    if mode == "training":
        demand = "depthwise step, rate >= 2" if rate >= 2 else "depthwise step"
        return [bar(demand, ratio, "training speed-up", layout)]
    return [bar("depthwise, rate >= 6" if rate >= 6 else "depthwise", ratio, layout=layout)]


def separable(record: Mapping[str, Any]) -> list[Bar]:
    """The demand on a record of bench_atrous_separable: one kernel against PyTorch's best, in the better layouts."""
    return [bar(_block_demand(record["name"]), ratio) for ratio in _best_ratio(record, "whole")]


def pyramid(record: Mapping[str, Any]) -> list[Bar]:
    """The demand on a record of bench_atrous_spatial_pyramid; only the whole stage has one."""
    return [bar("aspp", ratio) for ratio in _best_ratio(record, "ours") if record["what"] == "stage"]


def _best_ratio(record: Mapping[str, Any], contender: str) -> list[float]:
    """PyTorch's best time over that of ``contender``, each in its better layout; none if one was not measured."""
    times = {name: timing["median_ms"] for name, timing in record["timings"].items()}
    ours = [ms for name, ms in times.items() if name.startswith(contender)]
    theirs = [ms for name, ms in times.items() if name.startswith(("eager", "compile"))]
    return [min(theirs) / min(ours)] if ours and theirs else []


def _block_demand(name: str) -> str:
    return "block, ASPP" if name.startswith("A") else "block"  # the layers of the ASPP have names of their own


def network(mode: str, output_stride: int, ratio: float) -> list[Bar]:
    """Both issues' demands on DeepLab v3+ on Xception-65."""
    stem = "network step" if mode == "training" else f"network {output_stride}"
    return [bar(demand, ratio, "ratio") for demand in (stem, f"{stem}, fused")]


# Records of bench_contenders.


def contenders(record: Mapping[str, Any], machine: Mapping[str, Any]) -> list[Bar]:
    """The demands on one record of the product; none where ours or PyTorch was not measured."""
    times: dict[str, dict[str, float]] = {"ours": {}, "theirs": {}, "copy": {}}
    for name, timing in record["timings"].items():
        contender, layout = name.rsplit(" ", 1)
        who = times[contender if contender in times else "theirs"]
        who[layout] = min(who.get(layout, timing["median_ms"]), timing["median_ms"])
    if not times["ours"] or not times["theirs"]:
        return []
    judge = _gpu if record["device"] == "cuda" else _cpu
    return judge(record, times, machine)


Times = Mapping[str, Mapping[str, float]]


def _ratio(times: Times) -> float:
    return min(times["theirs"].values()) / min(times["ours"].values())


def _cpu(record: Mapping[str, Any], times: Times, machine: Mapping[str, Any]) -> list[Bar]:
    case, mode, ratio = record["case"], record["mode"], _ratio(times)
    if case["dtype"] != "fp32":
        return []
    if record["subject"] == "aspp":
        return [bar("aspp", ratio)]
    if record["subject"] == "separable":
        return [bar(_block_demand(case["what"]), ratio)] if mode == "inference" else []
    if record["subject"] == "models":
        whole = "no decoder" not in case["what"] and "no SC" not in case["what"]
        return network(mode, 8 if "stride 8" in case["what"] else 16, ratio) if whole else []
    found = []
    for layout, ours in times["ours"].items():
        rival = times["theirs"].get(layout) if mode == "inference" else min(times["theirs"].values())
        found += _depthwise(mode, _rate(case["what"]), layout, None if rival is None else rival / ours)
    return found


def _gpu(record: Mapping[str, Any], times: Times, machine: Mapping[str, Any]) -> list[Bar]:
    case, mode, ratio = record["case"], record["mode"], _ratio(times)
    if record["subject"] == "aspp":
        return [bar("gpu aspp", ratio)]
    if record["subject"] == "separable":
        return [bar("gpu block", ratio)] if mode == "inference" else []
    if record["subject"] == "models":
        if mode == "training":
            return [bar("gpu network step", ratio)]
        rival = record["timings"].get("max-autotune nhwc")
        asked = rival and case["dtype"] == "bf16" and case["batch"] == 8
        return [bar("gpu network", rival["median_ms"] / min(times["ours"].values()))] if asked else []
    found = [bar("gpu depthwise, rate >= 2" if _rate(case["what"]) >= 2 else "gpu depthwise", ratio)]
    # x and out; a step moves five such tensors.
    large = record["bytes"] / (2 if mode == "inference" else 5) > LARGE
    if large and mode == "inference" and machine.get("copy_gb_per_s"):
        share = record["bytes"] / min(times["ours"].values()) / 1e6 / machine["copy_gb_per_s"]
        found.append(bar("gpu bandwidth", share, "share of copy bandwidth"))
    return found


def _rate(name: str) -> int:
    """Of a layer's name, such as A12:2048x33r12."""
    _, _, rate = name.split(":")[-1].partition("r")
    return int(rate or 1)


# All of them together.


@dataclass(frozen=True)
class Verdict:
    """What became of one demand. worst: the value furthest from it, and where."""

    demand: Demand
    measured: int
    met: int
    worst: float | None = None
    where: str = ""

    @property
    def text(self) -> str:
        if not self.measured:
            return "not measured"
        return "met" if self.met == self.measured else "missed"


def verdicts(judged: Sequence[tuple[str, Bar]]) -> list[Verdict]:
    """Every demand, in the table's order, over ``judged``: (where, bar) of everything that was measured."""
    found = []
    for key, demand in DEMANDS.items():
        its = [(where, bar) for where, bar in judged if bar.demand == key]
        if not its:
            found.append(Verdict(demand, 0, 0))
            continue
        where, worst = min(its, key=lambda entry: entry[1].value if demand.at_least else -entry[1].value)
        found.append(Verdict(demand, len(its), sum(bar.passed for _, bar in its), worst.value, where))
    return found
