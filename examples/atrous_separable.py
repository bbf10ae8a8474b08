"""Replaces the separable convolutions of a plain PyTorch model by fused ones, and compares results and time.

python examples/atrous_separable.py
"""

from __future__ import annotations

import torch
from torch import nn

from deeplab_kernels import AtrousSeparableConv2d
from deeplab_kernels.timing import interleaved


def aspp_branch(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    """A branch of atrous spatial pyramid pooling as it is usually written."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def main() -> None:
    torch.manual_seed(0)
    branches = nn.ModuleList(aspp_branch(256, 64, rate) for rate in (6, 12, 18)).eval()
    fused = nn.ModuleList(AtrousSeparableConv2d.from_modules(*branch) for branch in branches)
    x = torch.randn(1, 256, 33, 33)
    print(fused[0])
    with torch.inference_mode():
        for rate, plain, ours in zip((6, 12, 18), branches, fused, strict=True):
            error = (plain(x) - ours(x)).abs().max().item()
            times = interleaved({"plain": lambda m=plain: m(x), "fused": lambda m=ours: m(x)}, rounds=7)
            print(
                f"rate {rate:2}: largest difference {error:.1e}; "
                + ", ".join(f"{name} {timing.median:.1f} ms" for name, timing in times.items())
            )


if __name__ == "__main__":
    main()
