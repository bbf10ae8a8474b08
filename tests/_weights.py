"""What the tests of weights from other libraries share."""

from __future__ import annotations

import torch
from _models import randomise, relative_error
from torch import Tensor, nn


def random_twin(build_theirs, build_ours) -> tuple[nn.Module, nn.Module]:
    """Their model with random weights and statistics, and ours without any, both in evaluation mode."""
    with torch.device("meta"):  # no time for weights that are not used
        theirs, ours = build_theirs(), build_ours()
    theirs, ours = theirs.to_empty(device="cpu"), ours.to_empty(device="cpu")
    for name, buffer in theirs.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    for tensor in ours.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)  # what is not loaded shows
    return randomise(theirs).eval(), ours.eval()


def assert_same_function(ours, theirs, size: tuple[int, int], tolerance: float = 1e-4) -> None:
    """Outputs (or the first of several) agree on an image of ``size``."""
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    if isinstance(expected, dict):
        expected = expected["out"]
    assert isinstance(expected, Tensor)
    assert relative_error(actual, expected) < tolerance
