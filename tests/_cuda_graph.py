"""Capturing a call in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def captured(call: Callable[[], Any], *, synchronises: bool = True) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of ``call`` and what the call returned in it, after a call on another stream that compiles what is
    compiled once. ``synchronises=False``: from then on a synchronisation with the host is an error."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if synchronises:
        with torch.cuda.graph(graph):
            return graph, call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        with torch.cuda.graph(graph):
            return graph, call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_replays(
    graph: torch.cuda.CUDAGraph, out: Sequence[torch.Tensor], wanted: Callable[[], Sequence[torch.Tensor]]
):
    """A replay of ``graph`` writes into ``out``, to the bit, what ``wanted`` computes anew from the changed inputs."""
    graph.replay()
    torch.cuda.synchronize()
    for replayed, computed in zip(out, wanted(), strict=True):
        assert torch.equal(replayed, computed)
