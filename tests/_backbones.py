"""What the tests of the backbones share."""

from __future__ import annotations

import torch
from _models import randomise, relative_error
from torch import Tensor, nn


@torch.no_grad()
def check_dense_features(model: nn.Module) -> None:
    """What atrous convolution is for: at output stride 8 every fourth value is that of output stride 32."""
    model = randomise(model).double().eval()
    x = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    model.set_output_stride(32)
    expected = model.pyramid(x)
    for output_stride in (16, 8):
        model.set_output_stride(output_stride)
        for nominal, dense, strided in zip(model.channels, model.pyramid(x), expected, strict=True):
            step = max(1, nominal // output_stride)
            assert relative_error(dense[:, :, ::step, ::step], strided) < 1e-12


def backward_of_equals(output: Tensor, expected: Tensor) -> None:
    """Two float64 outputs that must be equal; the same gradient goes back from both."""
    assert relative_error(output, expected) < 1e-11
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (output * weight).sum().backward()
