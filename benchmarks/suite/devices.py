"""What differs between timing on a CPU and on a GPU: the clock, CUDA graphs, ceilings and memory."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import measure
import torch

from deeplab_kernels.timing import Timing, interleaved

Function = Callable[[], object]
TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotAvailable(RuntimeError):
    """Something that this device or this installation cannot do; the message says why."""


class Device(Protocol):
    kind: str  # what it can: "cpu" or "cuda"
    place: str  # where its tensors are, for torch.device
    name: str  # what the results call it

    def time(self, functions: Mapping[str, Function], rounds: int, seconds: float) -> dict[str, Timing]:
        """Interleaved timings; ``seconds``: about the most for one function."""

    def capture(self, function: Function) -> Function:
        """A function that repeats what ``function`` does on the device without the gaps of launching it.

        Raises:
            NotAvailable: there is no such thing here, or ``function`` cannot be repeated so.
        """

    def peak_bytes(self, function: Function) -> int:
        """Memory that one call needs beyond what is there before it.

        Raises:
            NotAvailable: it cannot be told in this process.
        """

    def machine(self, dtypes: Sequence[str]) -> dict[str, Any]:
        """Names, versions, and the ceilings measured now: copy bandwidth, and matrix products in each of ``dtypes``."""

    def free(self) -> None:
        """Gives back what the last case held."""


def use_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


class Cpu:
    kind = place = name = "cpu"
    HALF_SHAPES = (
        (512, 512, 512),
    )  # without instructions of its own a CPU is a hundred times slower in half precision

    def time(self, functions: Mapping[str, Function], rounds: int, seconds: float) -> dict[str, Timing]:
        return interleaved(functions, rounds=rounds, warmup=1, candidate_seconds=seconds)

    def capture(self, function: Function) -> Function:
        raise NotAvailable("CUDA graphs need a CUDA device")

    def peak_bytes(self, function: Function) -> int:
        raise NotAvailable("measured in a process of its own")

    def machine(self, dtypes: Sequence[str]) -> dict[str, Any]:
        found = measure.machine()
        found["matrix_gflop_per_s_of"] = {"fp32": found["matrix_gflop_per_s"]} | {
            dtype: round(2e-9 * measure.matrix_rate(TORCH_DTYPES[dtype], 2, self.HALF_SHAPES), 2)
            for dtype in dtypes
            if dtype not in ("fp32", "tf32")
        }
        return found

    def free(self) -> None:
        gc.collect()


class Cuda:
    """One NVIDIA GPU. cuda: torch.cuda, or what stands for it."""

    kind = place = name = "cuda"
    COPY_ELEMENTS, MATRIX_SIZE = 1 << 28, 8192
    FLUSH_BYTES = 256 << 20  # more than any second-level cache

    def __init__(self, cuda: Any = torch.cuda, flush: Function | None = None) -> None:
        self.cuda = cuda
        if flush is None:
            if not cuda.is_available():
                raise NotAvailable("no CUDA device")
            torch.backends.cudnn.benchmark = True
            flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_
        self.flush = flush

    def clock(self, function: Function, count: int) -> float:
        """Seconds between two events around the calls, each with cold caches."""
        milliseconds = 0.0
        for _ in range(count):
            self.flush()
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3

    def time(self, functions: Mapping[str, Function], rounds: int, seconds: float) -> dict[str, Timing]:
        return interleaved(
            functions, rounds=rounds, warmup=3, settle=False, visit_seconds=0, candidate_seconds=seconds,
            clock=self.clock,
        )  # fmt: skip

    def capture(self, function: Function) -> Function:
        # Work that a graph must not hold (choices of algorithms, workspaces) is done by calls on the side before it.
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(3):
                function()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                kept = function()
        except RuntimeError as error:
            self.cuda.synchronize()
            raise NotAvailable(f"no CUDA graph: {first_line(error)}") from error

        def replay(kept: object = kept) -> None:  # the results' memory belongs to the graph as long as they live
            graph.replay()

        return replay

    def peak_bytes(self, function: Function) -> int:
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        function()
        self.cuda.synchronize()
        return int(self.cuda.max_memory_allocated() - before)

    def machine(self, dtypes: Sequence[str]) -> dict[str, Any]:
        properties = self.cuda.get_device_properties(0)
        source = torch.ones(self.COPY_ELEMENTS, device=self.place)
        target = torch.empty_like(source)
        copy = self.time({"copy": lambda: target.copy_(source)}, 9, 5.0)["copy"]
        matrix = {dtype: self._matrix_rate(dtype) for dtype in dtypes}
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "copy_gb_per_s": round(2 * source.nbytes / copy.median / 1e6, 1),
            "matrix_gflop_per_s": max(matrix.values()),
            "matrix_gflop_per_s_of": matrix,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }

    def _matrix_rate(self, dtype: str) -> float:
        size = self.MATRIX_SIZE
        a, b = (torch.randn(size, size, device=self.place).to(TORCH_DTYPES[dtype]) for _ in range(2))
        use_tf32(dtype == "tf32")
        timing = self.time({"mm": lambda: a @ b}, 7, 5.0)["mm"]
        use_tf32(False)
        return round(2 * size**3 / timing.minimum / 1e6, 1)

    def free(self) -> None:
        gc.collect()
        self.cuda.empty_cache()


class Twin:
    """Stands for torch.cuda on a machine without a GPU: events read the wall clock, a graph only counts its replays."""

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Twin.Event) -> float:
            return 1e3 * (end.at - self.at)

    class Stream:
        def wait_stream(self, stream: object) -> None:
            pass

    class CUDAGraph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    def __init__(self) -> None:
        self.stream = self.graph = contextlib.nullcontext
        self.current_stream = self.Stream

    def synchronize(self) -> None:
        pass

    empty_cache = reset_peak_memory_stats = synchronize

    def memory_allocated(self) -> int:
        return 0

    max_memory_allocated = memory_allocated

    def get_device_properties(self, device: int) -> Any:
        return types.SimpleNamespace(name="rehearsal on the CPU", multi_processor_count=0)


class Rehearsal(Cuda):
    """The way that a GPU is measured, on the CPU: to find mistakes before a GPU is at hand, not to measure."""

    place, name = "cpu", "rehearsal"
    COPY_ELEMENTS, MATRIX_SIZE = 1 << 20, 128

    def __init__(self) -> None:
        super().__init__(Twin(), flush=lambda: None)


def open_device(name: str) -> Device:
    """ "cpu", "cuda", "rehearsal", or "auto": a GPU where there is one.

    Raises:
        NotAvailable: "cuda" without a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return {"cuda": Cuda, "rehearsal": Rehearsal, "cpu": Cpu}[name]()


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
