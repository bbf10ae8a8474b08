"""How many threads the numpy interface computes with."""

from __future__ import annotations

import operator
import os

from .. import _densecrf

VARIABLE = "DEEPLAB_KERNELS_NUM_THREADS"


def set_num_threads(threads: int) -> None:
    """Sets the number of threads of each computation from now on, the calling one included.

    At first it is the value of the environment variable DEEPLAB_KERNELS_NUM_THREADS, else the number of cores that this
    process may use. Results do not depend on it.

    Raises:
        TypeError, ValueError: ``threads`` is no integer, or not in 1 ... 1024.
    """
    try:
        number = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads must be an integer, got {threads!r}") from None
    if not 1 <= number <= 1024:
        raise ValueError(f"threads must be 1 to 1024, got {number}")
    _densecrf.set_num_threads(number)


def get_num_threads() -> int:
    """The number of threads of each computation; see `set_num_threads`."""
    return _densecrf.num_threads()


def _initial() -> int:
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 1024)
    if not value.isdecimal() or not 1 <= int(value) <= 1024:
        raise ValueError(f"environment variable {VARIABLE} must be 1 to 1024, got {value!r}")
    return int(value)


_densecrf.set_num_threads(_initial())
