"""Peak memory of one call on the CPU: the growth of a process that does nothing else.

The processes are forked from a server that has imported everything and called nothing, so that one takes as long as
the call and not as long as the imports.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cases import Case

_SERVER = "forkserver"


def available() -> bool:
    return sys.platform == "linux" and _SERVER in multiprocessing.get_all_start_methods()


def peak_of_call(case: Case, contender: str, layout: str, threads: int, limit: float = 60.0) -> int | None:
    """Bytes; None where it cannot be measured (no Linux, the call fails, or ``limit`` seconds are over)."""
    if not available():
        return None
    context = multiprocessing.get_context(_SERVER)
    context.set_forkserver_preload(["suite.contenders"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, case, contender, layout, threads), daemon=True)
    process.start()
    sender.close()
    try:
        return int(receiver.recv()) if receiver.poll(limit) else None
    except EOFError:
        return None
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def _report(sender: Connection, case: Case, contender: str, layout: str, threads: int) -> None:
    import torch

    from .contenders import _function

    torch.set_num_threads(threads)
    torch.ones(2, requires_grad=True).mul(2).backward(torch.ones(2))  # loads what the first backward pass loads
    sender.send(growth(_function(case, contender, layout, "cpu")))


def growth(function: Callable[[], Any]) -> int:
    """By how much the resident set exceeds, during the call, what it is before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    kept = function()
    after = _status("VmHWM")
    del kept
    return max(after - before, 0)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024
