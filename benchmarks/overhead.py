"""What one call costs before any arithmetic: microseconds on a tensor so small that nothing else counts.

python benchmarks/overhead.py [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F

from deeplab_kernels import ops

SIDE, CHANNELS = 4, 8


def candidates() -> dict[str, tuple[Callable[[], object], bool]]:
    """Name -> (function, whether it runs with gradients)."""
    x = torch.randn(1, CHANNELS, SIDE, SIDE)
    weight = torch.randn(CHANNELS, 1, 3, 3)
    gamma, beta, mean = torch.ones(CHANNELS), torch.zeros(CHANNELS), torch.zeros(CHANNELS)
    var = torch.ones(CHANNELS)
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    leaf_gamma, leaf_beta = gamma.clone().requires_grad_(), beta.clone().requires_grad_()
    conv = torch.ops.deeplab_kernels.atrous_depthwise_conv2d.default
    inference = torch.ops.deeplab_kernels.atrous_depthwise_bn_act_inference.default
    one, sides = (1, 1), (1, 1, 1, 1)

    def below_autograd(operator: Callable[..., object], *args: Any) -> Callable[[], object]:
        def call() -> object:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        return call

    def fused(training: bool, *tensors: torch.Tensor) -> torch.Tensor:
        return ops.atrous_depthwise_bn_act(*tensors, mean, var, training=training, padding=1)

    def plain(training: bool, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.relu_(F.batch_norm(F.conv2d(x, w, None, 1, 1, 1, CHANNELS), mean, var, g, b, training))

    tensors, leaves = (x, weight, gamma, beta), (leaf, leaf_weight, leaf_gamma, leaf_beta)
    return {
        "F.conv2d": (lambda: F.conv2d(x, weight, None, 1, 1, 1, CHANNELS), False),
        "raw operator": (lambda: conv(x, weight, one, sides, one), False),
        "raw operator, below autograd": (below_autograd(conv, x, weight, one, sides, one), False),
        "ops.atrous_depthwise_conv2d": (lambda: ops.atrous_depthwise_conv2d(x, weight, padding=1), False),
        "F.conv2d, with grad": (lambda: F.conv2d(leaf, leaf_weight, None, 1, 1, 1, CHANNELS), True),
        "ops.atrous_depthwise_conv2d, with grad": (
            lambda: ops.atrous_depthwise_conv2d(leaf, leaf_weight, padding=1),
            True,
        ),
        "F.conv2d + relu_ (BN folded)": (lambda: F.relu_(F.conv2d(x, weight, gamma, 1, 1, 1, CHANNELS)), False),
        "F.conv2d + batch_norm + relu_": (lambda: plain(False, *tensors), False),
        "raw fused operator, below autograd": (
            below_autograd(inference, x, weight, gamma, beta, mean, var, 1e-5, 1, one, sides, one),
            False,
        ),
        "ops.atrous_depthwise_bn_act": (lambda: fused(False, *tensors), False),
        "training forward, PyTorch": (lambda: plain(True, *leaves), True),
        "training forward, ops.atrous_depthwise_bn_act": (lambda: fused(True, *leaves), True),
        "training step, PyTorch": (lambda: torch.autograd.grad(plain(True, *leaves).sum(), leaves), True),
        "training step, ops.atrous_depthwise_bn_act": (
            lambda: torch.autograd.grad(fused(True, *leaves).sum(), leaves),
            True,
        ),
    }


def microseconds(rounds: int = 201) -> dict[str, float]:
    functions = candidates()

    def graded(function: Callable[[], object], grad: bool) -> Callable[[], object]:
        # Ten calls a sample, so that switching the mode costs a tenth of its time.
        def call() -> None:
            with torch.set_grad_enabled(grad):
                for _ in range(10):
                    function()

        return call

    timings = measure.interleaved({name: graded(f, grad) for name, (f, grad) in functions.items()}, rounds=rounds)
    return {name: timing.median * 1e3 / 10 for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = microseconds()
    table = [{"call": name, "us": f"{us:.1f}"} for name, us in found.items()]
    print(f"x (1, {CHANNELS}, {SIDE}, {SIDE}), weight 3 x 3, {measure.cpu_name()}, 1 thread")
    print(report.markdown(table, ["call", "us"]))
    if args.json:
        measure.save(args.json, {"machine": measure.machine(), **measure.stamp(), "microseconds": found})


if __name__ == "__main__":
    main()
