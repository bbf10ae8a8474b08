"""Results must not depend on how many threads form them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same_bits(results: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 3), what: object = None):
    """Calls ``results`` with each number of threads and compares what it returns with the first."""
    before = torch.get_num_threads()
    try:
        first: Sequence[Tensor] | None = None
        for count in threads:
            torch.set_num_threads(count)
            found = results()
            first = first or found
            assert len(found) == len(first)
            assert all(map(torch.equal, found, first)), (what, count)
    finally:
        torch.set_num_threads(before)
