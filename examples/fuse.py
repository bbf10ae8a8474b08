"""Puts the fused operators into a model that was written without them, and compares results and time.

python examples/fuse.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deeplab_kernels import fuse
from deeplab_kernels.timing import interleaved


class Branch(nn.Module):
    """A branch of atrous spatial pyramid pooling, written the usual way."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, 64, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.depthwise(x)))
        return self.relu(self.norm2(self.pointwise(x)))


def main() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Branch(512, rate=6), nn.Upsample(scale_factor=2), Branch(64, rate=12)).eval()
    fused = copy.deepcopy(plain)
    print(fuse(fused))
    x = torch.randn(1, 512, 33, 33)
    with torch.inference_mode():
        error = (plain(x) - fused(x)).abs().max().item()
        times = interleaved({"plain": lambda: plain(x), "fused": lambda: fused(x)}, rounds=7)
    print(f"\nlargest difference {error:.1e}; " + ", ".join(f"{k} {t.median:.1f} ms" for k, t in times.items()))


if __name__ == "__main__":
    main()
