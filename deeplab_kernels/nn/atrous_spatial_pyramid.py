"""The atrous branches of a spatial pyramid and the image's mean, in one pass over their input."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.atrous_spatial_pyramid import serves_in_one_pass
from ._halves import BatchNorm, _needs_grad, fusable, running
from ._separable_blocks import untouched
from .atrous_separable import AtrousDepthwiseConv2d, AtrousSeparableConv2d


def _batch_statistics(norm: BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


class AtrousSpatialPyramid(nn.ModuleList):
    """The branches of atrous spatial pyramid pooling that see the same input, and the image's mean for its pooling
    branch (DeepLab v3, arXiv:1706.05587, section 3.3).

        rates = 6, 12, 18
        pyramid = AtrousSpatialPyramid(AtrousSeparableConv2d(2048, 256, padding="same", dilation=r) for r in rates)
        branches, mean = pyramid(x)

    A list of modules, with a list's state_dict. Where the branches are separable, their depthwise halves and the mean
    run as one operator (:func:`ops.atrous_spatial_pyramid`) wherever that is faster and the same as calling them: all
    :class:`AtrousSeparableConv2d` of one kernel size, with padding "same", stride 1, no bias before the norm, batch
    normalisation of one eps (``nn.SyncBatchNorm`` in inference alone) or none, and one activation. Everything else,
    such as plain convolutions, hooks, or a replaced submodule, runs branch by branch.

    Args:
        branches: modules (N, in_channels, H, W) -> (N, out_channels, H, W); there may be none.
    """

    def __init__(self, branches: Iterable[nn.Module] = ()) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(N, in_channels, H, W) -> (the branches' outputs, mean (N, in_channels, 1, 1))."""
        blocks = self._blocks()
        if not blocks or not self._is_one_pass(blocks, x):
            return [branch(x) for branch in self], x.mean((2, 3), keepdim=True)
        blocks[0].depthwise.check_input(x)
        norms = [block.depthwise_norm for block in blocks if isinstance(block.depthwise_norm, BatchNorm)]
        states = [running(norm) for norm in norms]
        given = [
            ops.BatchNorm(mean, var, norm.weight, norm.bias, norm.eps, momentum)
            for norm, (mean, var, momentum, _) in zip(norms, states, strict=True)
        ]
        y, mean = ops.atrous_spatial_pyramid(
            x,
            [block.depthwise.weight for block in blocks],
            [block.dilation for block in blocks],
            given or None,
            activation=blocks[0].depthwise_activation,
            training=bool(norms) and _batch_statistics(norms[0]),
            save_conv=blocks[0].save_conv,
        )
        for norm, (_, _, _, counted) in zip(norms, states, strict=True):
            if counted:
                norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        assert mean is not None
        return [block.after_depthwise(branch) for block, branch in zip(blocks, y, strict=True)], mean

    def _blocks(self) -> list[AtrousSeparableConv2d]:
        """The branches, if each is a separable convolution whose parts run as they are; otherwise nothing."""
        if _has_any_global_hook() or torch.jit.is_tracing():
            return []
        blocks = []
        for block in self:
            if not (
                isinstance(block, AtrousSeparableConv2d)
                and untouched(block, AtrousSeparableConv2d)
                and untouched(block.depthwise, AtrousDepthwiseConv2d)
                and untouched(block.depthwise_norm, nn.Identity, nn.BatchNorm2d, nn.SyncBatchNorm)
            ):
                return []
            blocks.append(block)
        return blocks

    @staticmethod
    def _is_one_pass(blocks: list[AtrousSeparableConv2d], x: Tensor) -> bool:
        first = blocks[0]
        norms: list[tuple[object, ...]] = []
        for block in blocks:
            conv, norm = block.depthwise, block.depthwise_norm
            if (
                block.pre_activation is not None
                or conv.bias is not None
                or block.channel_multiplier != 1
                or block.in_channels != first.in_channels
                or block.stride != (1, 1)
                or block.padding != "same"
                or block.kernel_size != first.kernel_size
                or block.depthwise_activation != first.depthwise_activation
                or block.save_conv != first.save_conv
            ):
                return False
            if isinstance(norm, nn.Identity):
                norms.append(())
            elif fusable(norm, conv, x):
                norms.append((norm.eps, _batch_statistics(norm)))
            else:
                return False
        if len(set(norms)) != 1:
            return False
        if first.depthwise_norm.training or _needs_grad(x, *(p for block in blocks for p in block.parameters())):
            return serves_in_one_pass(x)
        return serves_in_one_pass(x) and not any(block.is_one_operator(x) for block in blocks)
