"""The product of layers and contenders: what runs, what is refused, what is left out and why; no speed is tested."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_contenders  # noqa: E402
import measure  # noqa: E402
from suite import cases, contenders, devices, memory, workloads  # noqa: E402

from deeplab_kernels.nn import AtrousSeparableConv2d  # noqa: E402

SMALL = cases.Case("depthwise", "728x33")
BLOCK = cases.Case("separable", "728x33->728")


# What runs.


def test_product_is_whole_and_ordered() -> None:
    whole = cases.product(cases.Selection(), "cuda")
    layers = sum(len(cases.computations(subject)) for subject in cases.SUBJECTS)
    assert len(whole) == len({(t.case, t.case.mode) for t in whole}) == layers * 2 * 3 * 4
    assert (whole[0].case.dtype, whole[0].case.batch, whole[0].case.mode) == ("bf16", 8, "inference")
    on_cpu = cases.product(cases.Selection(), "cpu")
    assert {task.case.dtype for task in on_cpu} == {"fp32", "bf16", "fp16"}
    assert "tf32" in cases.unavailable("cpu", cases.DTYPES)
    assert cases.unavailable("cuda", cases.DTYPES) == {}
    assert (on_cpu[0].case.dtype, on_cpu[0].case.batch) == ("fp32", 1)
    assert all("frozen" not in t.contenders for t in whole)
    training = [task for task in on_cpu if task.case.mode == "training"]
    assert all("frozen" not in task.contenders and "max-autotune" in task.contenders for task in training)


def test_selection_narrows_every_axis() -> None:
    chosen = cases.Selection(
        ["separable", "aspp"], ["A12"], ["training"], [2, 8], ["fp32"], ["ours", "compile"], ["nchw"]
    )
    tasks = cases.product(chosen, "cpu")
    assert [task.case.name for task in tasks] == [
        "A12:2048x33r12->relu->256/N8 fp32",
        "A12:2048x33r12->relu->256/N2 fp32",
    ]
    assert all(task.contenders == ("ours", "compile") and task.layouts == ("nchw",) for task in tasks)
    assert not cases.product(cases.Selection(what=["weather"]), "cpu")


def test_quick_and_gpu_plans_have_something_of_everything() -> None:
    quick = cases.quick(cases.Selection())
    assert {task.case.subject for task in quick} == set(cases.SUBJECTS)
    assert {contender for task in quick for contender in task.contenders} == set(cases.CONTENDERS)
    assert {task.case.mode for task in quick} == set(cases.MODES)
    gpu = cases.gpu_bars()
    network = next(t for t in gpu if t.case.subject == "models" and t.case.mode == "inference")
    assert (network.case.batch, network.case.dtype, network.layouts) == (8, "bf16", ("nhwc",))
    assert "max-autotune" in network.contenders
    assert {(t.case.subject, t.case.mode) for t in gpu} >= {("models", "training"), ("aspp", "inference")}
    assert {task.case.what for task in gpu if task.case.subject == "separable"} == set(cases.computations("separable"))
    assert all(t.case.what in cases.computations(t.case.subject) for t in [*quick, *gpu, *cases.gpu_rehearsal()])


def test_multiply_adds_and_bytes() -> None:
    pyramid = cases.Pyramid(4, 5, (6, 12))
    case = cases.Case("aspp", cases.PYRAMIDS[0].name, "training", 2, "bf16")
    c = case.computation
    from deeplab_kernels.models.heads.aspp import ASPP

    counted = 0
    with torch.device("meta"):
        stage = ASPP(c.channels, c.out_channels, c.rates).eval()

    def count(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        nonlocal counted
        counted += module.weight[0].numel() * out.numel()

    plain = workloads._plain(stage)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    plain(torch.empty(2, c.channels, c.size, c.size, device="meta"))
    assert workloads.madds(case) == 3 * counted
    assert case.bytes == 2 * 2 * 33 * 33 * (3 * 2048 + 2 * 256)
    assert pyramid.name == "4x5 rates 6,12"
    assert BLOCK.layer_madds == 33 * 33 * 728 * (9 + 728)
    assert cases.Case("models", cases.NETWORKS[0].name).bytes is None


def test_estimates_grow_with_the_work() -> None:
    def seconds(case: cases.Case, contenders: tuple[str, ...] = ("ours",)) -> float:
        return cases.Task(case, contenders).seconds(9, 1.0)

    assert (
        seconds(BLOCK) < seconds(cases.replace(BLOCK, batch=16)) < seconds(cases.replace(BLOCK, dtype="bf16", batch=16))
    )
    assert seconds(BLOCK) < seconds(BLOCK, ("ours", "compile")) < seconds(BLOCK, ("ours", "max-autotune"))


# Checks.


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("case", [SMALL, BLOCK], ids=["depthwise", "separable"])
def test_ours_is_compared_with_float64(case: cases.Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.replace(case, mode=mode)
    assert workloads.check(case, "cpu") < 1e-4
    right = workloads.module

    def wrong(case: cases.Case, ours: bool, dtype: Any = None) -> nn.Module:
        made = right(case, ours, dtype)
        if ours:
            next(made.parameters()).data *= 1.01
        return made

    monkeypatch.setattr(workloads, "module", wrong)
    with pytest.raises(measure.CheckFailed, match="result 0"):
        workloads.check(case, "cpu")


def test_half_precision_is_compared_with_pytorchs() -> None:
    assert 1e-4 < workloads.check(cases.replace(SMALL, dtype="bf16"), "cpu") < 2e-2


def test_what_is_compared_with_must_not_call_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    right = workloads.module
    monkeypatch.setattr(workloads, "module", lambda case, ours, dtype=None: right(case, True, dtype))
    with pytest.raises(measure.CheckFailed, match=r"plain PyTorch calls deeplab_kernels\."):
        workloads.check(SMALL, "cpu")


def test_plain_modules_are_folded_for_inference() -> None:
    plain = workloads.module(BLOCK, ours=False)
    kinds = {type(module) for module in plain.modules()}
    assert AtrousSeparableConv2d not in kinds
    assert nn.BatchNorm2d not in kinds
    training = workloads.module(cases.replace(BLOCK, mode="training", dtype="bf16"), ours=False)
    norms = [module for module in training.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.weight.dtype for norm in norms] == [torch.float32] * 2
    assert {p.dtype for p in training.parameters() if p.dim() == 4} == {torch.bfloat16}


# Contenders that fail.


def test_a_contender_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no backend\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    made = contenders.prepare(SMALL, "compile", "nchw", "cpu")
    assert (made.function, made.reason) == (None, "RuntimeError: no backend")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in contenders.prepare(SMALL, "frozen", "nchw", "cpu").reason
    # Batch statistics of one image after global pooling.
    alone = cases.Case("aspp", cases.PYRAMIDS[0].name, "training", 1)
    assert contenders.prepare(alone, "ours", "nchw", "cpu").reason.startswith("ValueError")


def test_compiling_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        try:
            time.sleep(60)
        except Exception:  # as a compiler would, which takes everything for its own failure
            return args[0]

    monkeypatch.setattr(torch, "compile", slow)
    start = time.monotonic()
    assert contenders.prepare(SMALL, "compile", "nchw", "cpu", 0.2).reason == "not compiled within 0 s"
    assert time.monotonic() - start < 30
    with contenders.time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing rings afterwards


def test_native_switches_the_libraries_off_and_on_again() -> None:
    seen = []
    function = contenders.within(
        contenders.without_libraries,
        lambda: seen.append((torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled())),
    )
    before = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    function()
    assert seen == [(False, False)]
    assert (torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()) == before


def test_compiler_options() -> None:
    cpu = contenders.compiler_options("max-autotune", SMALL, "cpu")
    assert cpu["max_autotune"] is True
    assert cpu["freezing"] is True
    gpu = contenders.compiler_options("max-autotune", SMALL, "cuda")
    assert "freezing" not in gpu
    assert not gpu.get("triton.cudagraphs")  # a graph is captured for all alike
    assert contenders.compiler_options("compile", SMALL, "cpu") == {}
    step = cases.replace(SMALL, mode="training")
    assert "freezing" not in contenders.compiler_options("max-autotune", step, "cpu")


# Devices.


class Failing(devices.Twin):
    """A device on which nothing can be captured."""

    def __init__(self) -> None:
        super().__init__()

        def graph(graph: object) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nlong")

        self.graph = graph


def test_graphs_are_timed_beside_ordinary_calls() -> None:
    calls: list[int] = []
    args = bench_contenders.parse(["--rounds", "3"])
    found = bench_contenders.timings_of({"ours nhwc": lambda: calls.append(1)}, devices.Rehearsal(), args, SMALL)
    assert found["timings"].keys() == found["with_gaps"].keys() == {"ours nhwc"}
    assert found["timings"]["ours nhwc"] != found["with_gaps"]["ours nhwc"]
    assert found["no_graph"] == {}
    # Three calls before the capture and one in it; three to warm up and three timed; the graph's replays call nothing.
    assert len(calls) == 10


def test_what_cannot_be_captured_is_timed_with_its_gaps() -> None:
    device = devices.Cuda(Failing(), flush=lambda: None)
    args = bench_contenders.parse(["--rounds", "2"])
    found = bench_contenders.timings_of({"ours nhwc": lambda: None}, device, args, SMALL)
    assert found["timings"] == found["with_gaps"]
    assert found["no_graph"] == {"ours nhwc graph": "no CUDA graph: operation not permitted when stream is capturing"}


def test_every_call_on_a_gpu_finds_cold_caches() -> None:
    flushed: list[int] = []
    device = devices.Cuda(devices.Twin(), flush=lambda: flushed.append(1))
    assert device.clock(lambda: time.sleep(0.002), 3) >= 0.006
    assert len(flushed) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.open_device("auto").kind == "cpu"
    with pytest.raises(devices.NotAvailable, match="no CUDA device"):
        devices.open_device("cuda")
    with pytest.raises(devices.NotAvailable, match="CUDA device"):
        devices.Cpu().capture(lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench_contenders.py", "--device", "cuda"])
    monkeypatch.setattr(measure, "use_tuned_allocator", lambda: None)
    assert bench_contenders.main() == 2
    assert "--device cuda: no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not memory.available(), reason="needs Linux")
def test_peak_memory_of_a_call() -> None:
    size = 64 << 20
    assert size <= memory.growth(lambda: torch.ones(size // 4)) < 1.2 * size
    case = cases.Case("depthwise", "E128:128x257", batch=2)
    out = case.elements[1] * 4
    found = memory.peak_of_call(case, "ours", "nchw", threads=1)
    assert found is not None
    assert out <= found < 1.5 * out
    assert memory.peak_of_call(case, "weather", "no layout", threads=1) is None


# Runs.


def test_clock_keeps_pace() -> None:
    clock = bench_contenders.Clock(minutes=1)
    assert clock.fits(50)
    assert not clock.fits(70)
    clock.add(estimated=10, used=50)  # slower than thought
    assert clock.pace == 3
    assert not clock.fits(30)
    assert bench_contenders.Clock(minutes=0).fits(1e9)


@pytest.fixture
def two_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tasks = [cases.Task(cases.replace(SMALL, batch=n), ("ours", "eager", "native"), ("nhwc",)) for n in (1, 2)]
    monkeypatch.setattr(bench_contenders, "tasks_of", lambda args, device: tasks)
    monkeypatch.setenv("DEEPLAB_KERNELS_RESULTS", str(tmp_path))
    machine = {"copy_gb_per_s": 10.0, "matrix_gflop_per_s": 100.0, "matrix_gflop_per_s_of": {"fp32": 100.0}}
    monkeypatch.setattr(devices.Cpu, "machine", lambda self, dtypes: machine)
    return tmp_path / bench_contenders.FILE


def test_a_run_writes_after_every_case(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = bench_contenders.parse(["--device", "cpu", "--rounds", "2", "--no-memory"])
    written: list[int] = []
    save = measure.save
    monkeypatch.setattr(measure, "save", lambda path, d: (written.append(len(d["records"])), save(path, d)))
    document = bench_contenders.run(args)
    assert written == [1, 2, 2]
    stored = json.loads(two_cases.read_text())
    assert [record["name"] for record in stored["records"]] == ["728x33/N1 fp32", "728x33/N2 fp32"]
    assert stored["records"][0]["timings"].keys() == {"ours nhwc", "eager nhwc", "native nhwc"}
    assert stored["records"][0]["relative_error"] < 1e-5
    assert stored["unavailable"].keys() >= {"CUDA graphs"}
    assert document["left_out"] == []
    bench_contenders.run(args)  # again: replaced, not added
    assert len(json.loads(two_cases.read_text())["records"]) == 2


def test_what_does_not_fit_is_named(two_cases: Path) -> None:
    document = bench_contenders.run(bench_contenders.parse(["--device", "cpu", "--minutes", "0.0001"]))
    assert document["records"] == []
    assert json.loads(two_cases.read_text())["left_out"] == ["728x33/N1 fp32, inference", "728x33/N2 fp32, inference"]


def test_wrong_results_are_not_timed(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: cases.Case, device: str) -> float:
        raise measure.CheckFailed("ours is wrong")

    monkeypatch.setattr(workloads, "check", refuse)
    document = bench_contenders.run(bench_contenders.parse(["--device", "cpu", "--rounds", "1", "--no-memory"]))
    for record in document["records"]:
        assert record["wrong"]
        assert record["timings"].keys() == {"eager nhwc", "native nhwc"}
        assert record["unavailable"] == {"ours": "ours is wrong"}
