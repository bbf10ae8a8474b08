"""Who computes a case: ours and PyTorch in all its ways, each ready to be called, or the reason why it is not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cases import COMPILED, Case
from .devices import TORCH_DTYPES, Function, NotAvailable, first_line
from .workloads import call, inputs, module


class OutOfTime(BaseException):
    """A time limit is over. No Exception: what compiles would take it for a failure of its own and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds, where the system has such a timer; 0: no limit."""
    if not seconds or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def without_libraries() -> Iterator[None]:
    """PyTorch's own kernels: neither oneDNN nor cuDNN."""
    cudnn, onednn = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    torch.backends.cudnn.enabled = False
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns about TF32 where there is none
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch._C._set_mkldnn_enabled(onednn)


def within(context: Callable[[], AbstractContextManager[Any]], function: Function) -> Function:
    def called() -> object:
        with context():
            return function()

    return called


def compiler_options(contender: str, case: Case, device: str) -> dict[str, Any]:
    """Of torch.compile. A graph of the GPU is captured here, not by max-autotune, so that all have one alike. On the
    CPU max-autotune chooses among matrix products only of frozen weights."""
    options: dict[str, Any] = {}
    if contender == "max-autotune":
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    if contender == "frozen" or (contender == "max-autotune" and device == "cpu" and case.mode == "inference"):
        options["freezing"] = True
    return options


def lacking(contender: str, device: str) -> str:
    """Why ``contender`` cannot be here; empty if it can."""
    if contender in COMPILED and device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler; there is no {compiler}"
    return ""


@dataclass(frozen=True)
class Ready:
    """A contender that may be called, or why it may not."""

    function: Function | None = None
    reason: str = ""


def prepare(case: Case, contender: str, layout: str, device: str, compile_limit: float = 0.0) -> Ready:
    """Builds and calls once; whatever goes wrong becomes the reason. compile_limit: seconds for what compiles."""
    if reason := lacking(contender, device):
        return Ready(reason=reason)
    try:
        with time_limit(compile_limit if contender in COMPILED else 0.0):
            function = _function(case, contender, layout, device)
            function()
    except OutOfTime:
        torch._dynamo.reset()
        return Ready(reason=f"not compiled within {compile_limit:.0f} s")
    except Exception as error:
        return Ready(reason=f"{type(error).__name__}: {first_line(error)}"[:300])
    return Ready(function)


def _function(case: Case, contender: str, layout: str, device: str) -> Function:
    given = inputs(case).to(device, TORCH_DTYPES[case.dtype], layout)
    if contender == "copy":
        return given.x.clone
    made = module(case, contender == "ours").to(device)
    made = made.to(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    forward = None
    if contender in COMPILED:
        forward = torch.compile(made, dynamic=False, options=compiler_options(contender, case, device))
    function = call(case, made, given, forward)
    return within(without_libraries, function) if contender == "native" else function


def graph_of(function: Function, capture: Callable[[Function], Function]) -> Ready:
    """``function`` as a CUDA graph."""
    try:
        return Ready(capture(function))
    except NotAvailable as error:
        return Ready(reason=str(error))
    except Exception as error:
        return Ready(reason=f"no CUDA graph: {type(error).__name__}: {first_line(error)}"[:300])
