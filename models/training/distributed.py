"""Several processes that train one network: who they are, sums over all of them, and batch normalisation with the
statistics of all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def summed(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(value)
    return value


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The group that torchrun's environment describes, of nccl for CUDA and gloo otherwise, if there is one and it is
    not set up yet; gives the device of this process."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def synchronised_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within it every ``nn.BatchNorm2d`` of ``model`` takes its statistics over all processes; parameters, buffers and
    state_dict stay the same objects. Nothing changes where there is one process.

    On CUDA that is ``nn.SyncBatchNorm``, which refuses tensors on the CPU; there it is :class:`SyncBatchNorm2d`. Both
    differ from ``nn.BatchNorm2d`` only in what they compute, so that a module changes its class and is not replaced.
    """
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d] if rank_and_size()[1] > 1 else []
    for norm in norms:
        if next(model.parameters()).is_cuda:
            norm.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
            norm.process_group = dist.group.WORLD  # type: ignore[assignment]
        else:
            norm.__class__ = SyncBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d
            norm.__dict__.pop("process_group", None)  # which could not be copied


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose batch is that of all processes of the default group, on any device.

    Raises:
        ValueError: training with one value per channel in all processes together.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        out, mean, var, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                unbiased = var * (count / (count - 1))
                for buffer, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                    assert buffer is not None
                    buffer.lerp_(value.to(buffer.dtype), momentum)
        return out


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over the batches of all processes; also gives mean, biased variance
    and the number of values per channel.

    Each process's mean and sum of squares about it are merged in the order of the processes (Chan, Golub, LeVeque), in
    float64, so that every process gets the same bits and nothing cancels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        values = _at_least_float32(x)
        var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        count = torch.full_like(mean, x.numel() / x.shape[1], dtype=torch.float64)
        own = torch.stack([mean.double(), var.double(), count])
        parts = [torch.empty_like(own) for _ in range(rank_and_size()[1])]
        dist.all_gather(parts, own)
        means, variances, counts = torch.stack(parts, 1)
        total = counts.sum(0)
        if total.numel() and float(total[0]) <= 1:
            raise ValueError(f"training needs more than 1 value per channel in all processes, got {tuple(x.shape)}")
        merged = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - merged) ** 2)).sum(0) / total
        mean, var = merged.to(values.dtype), variance.to(values.dtype)
        out = F.batch_norm(values, mean, var, weight, bias, training=False, eps=eps).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.total = float(total[0]) if total.numel() else 1.0
        ctx.mark_non_differentiable(mean, var, total)
        return out, mean, var, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        grad = _at_least_float32(gradients[0])
        normalised = (_at_least_float32(x) - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        own = torch.stack([grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))])
        of_bias, of_weight = own.clone()
        sums = (summed(own) / ctx.total).view(2, 1, -1, 1, 1)
        factor = scale if weight is None else scale * weight
        grad_x = (grad - sums[0] - normalised * sums[1]) * factor.view(1, -1, 1, 1)
        return grad_x.to(x.dtype), None if weight is None else of_weight, None if weight is None else of_bias, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
