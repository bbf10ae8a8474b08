"""Refines a network's logits by a fully connected CRF, and learns the CRF's weights by gradients through it.

python examples/dense_crf.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deeplab_kernels.nn import DenseCRF


def scene(size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """An image (1, 3, H, W) in 0..255 of two discs, its labels (1, H, W), and logits (1, 3, H, W) that are blurred, as
    a network's are that are computed on a coarse grid."""
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    labels = torch.zeros(size, size, dtype=torch.long)
    labels[(y - 16) ** 2 + (x - 16) ** 2 < 100] = 1
    labels[(y - 32) ** 2 + (x - 32) ** 2 < 120] = 2
    colours = torch.tensor([[70.0, 80.0, 90.0], [200.0, 90.0, 60.0], [60.0, 180.0, 90.0]])
    image = colours[labels].permute(2, 0, 1)[None] + 8 * torch.randn(1, 3, size, size)
    one_hot = F.one_hot(labels, 3).permute(2, 0, 1)[None].float()
    coarse = F.interpolate(F.avg_pool2d(one_hot, 8), (size, size), mode="bilinear")
    return image.clamp(0, 255), labels[None], 4 * coarse


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    image, labels, logits = scene()
    crf = DenseCRF(3, iterations=5, appearance_weight=1.0, appearance_sigma=20.0, color_sigma=20.0,
                   smoothness_weight=1.0, smoothness_sigma=2.0)  # fmt: skip
    print(crf)
    print(
        f"pixels right: network {accuracy(logits, labels):.4f}, with the CRF {accuracy(crf(logits, image), labels):.4f}"
    )

    optimiser = torch.optim.Adam([p for p in crf.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(crf(logits, image), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(
        f"trained: loss {losses[0]:.4f} -> {losses[-1]:.4f}, appearance weight {crf.appearance_weight.item():.2f}, "
        f"pixels right {accuracy(crf(logits, image), labels):.4f}"
    )


if __name__ == "__main__":
    main()
