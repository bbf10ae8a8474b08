"""Depthwise convolution, batch normalisation and activation with random tensors: ours, and torch's three operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _cases import CASES, Case, activate, conv_by_definition, random_conv

from deeplab_kernels.ops import atrous_depthwise_bn_act

INFERENCE = torch.ops.deeplab_kernels.atrous_depthwise_bn_act_inference.default
TRAINING = torch.ops.deeplab_kernels.atrous_depthwise_bn_act_training.default
BACKWARD = torch.ops.deeplab_kernels.atrous_depthwise_bn_act_backward.default
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
# Batch statistics need more than one value per channel.
TRAINABLE = [c for c in CASES if c.values_per_channel > 1]
NAMES = ("x", "weight", "gamma", "beta")
# Trained pixel by pixel in channels_last: 3x3, more columns than planes are faster for. Channels that fill no vector,
# rates beyond the map, strides whose taps meet every row or every second one, borders of any width.
BY_PIXELS = [
    Case((1, 13, 174, 190), padding=3),
    Case((3, 13, 110, 100), stride=(2, 1), padding=1),
    Case((281, 24, 9, 13), stride=2, padding=12, dilation=11),
    Case((200, 9, 14, 12), stride=(1, 2), padding=(4, 3), dilation=(3, 2)),
    Case((66, 17, 23, 22), stride=2, padding="same", dilation=3),
    Case((140, 11, 41, 6), padding=(30, 0, 7, 1), dilation=(5, 2)),
]


def per_channel(case, dtype, device="cpu"):
    """gamma, beta, running_mean, running_var; some of gamma negative, beta such that relu and relu6 both bite."""
    c = case.out_channels
    gamma, beta = torch.randn(c) * 2, torch.randn(c) + 1
    mean, var = torch.randn(c), torch.rand(c) * 4 + 0.1
    return [v.to(device, torch.float64 if dtype == torch.float64 else torch.float32) for v in (gamma, beta, mean, var)]


def random_block(case, dtype, layout="nchw", device="cpu"):
    x, weight = random_conv(case, dtype, layout, device)
    gamma, beta, mean, var = per_channel(case, dtype, device)
    return [x, weight, gamma.requires_grad_(), beta.requires_grad_()], [mean, var]


def composed(conv, inputs, statistics, case, *, training, momentum=0.1, eps=1e-5, activation="relu"):
    """The three operators of torch, with the convolution ``conv``."""
    x, weight, gamma, beta = inputs
    y = conv(x, weight, case)
    if y.numel() == 0:  # torch's batch normalisation has no gradient for an empty batch
        return y + 0 * sum(v.sum() for v in (gamma, beta) if v is not None)
    vector_dtype = next((v.dtype for v in (*statistics, gamma, beta) if v is not None), y.dtype)
    if vector_dtype != y.dtype and y.dtype not in (torch.bfloat16, torch.float16):
        y = y.to(vector_dtype)
    return activate(F.batch_norm(y, *statistics, gamma, beta, training, momentum, eps), activation)


def ours(inputs, statistics, case, *, training, **options):
    return atrous_depthwise_bn_act(*inputs, *statistics, training=training, **options, **case.geometry)


def gradient_of_conv(inputs, grad, statistics, case, options):
    """The gradient that batch normalisation hands to the convolution, in float64."""
    x, weight, gamma, beta = as_double(inputs)
    y = conv_by_definition(x, weight, case).requires_grad_()
    out = composed(lambda *_: y, (x, weight, gamma, beta), as_double(statistics), case, **options)
    return torch.autograd.grad(out, y, grad.double())[0]


def as_double(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


# Maps at rate 1 that are worked on in several pieces, whole in the caches or band by band.
PIECES = [Case((2, 9, 70, 65), padding=1), Case((2, 9, 71, 66), stride=2, padding=1),
          Case((1, 8, 75, 67), padding=(0, 2, 2, 1)), Case((2, 8, 73, 64), stride=2, padding=(2, 0, 0, 2)),
          Case((2, 8, 69, 49), stride=2, padding=(0, 1, 1, 0)),
          Case((2, 8, 450, 400), padding=1), Case((2, 8, 643, 640), stride=2, padding=1)]  # fmt: skip
# By planes in NCHW though rows fill no vector (8 floats with AVX2, of which the gradient of x at stride 2 takes two):
# tall maps in several pieces and bands, rows of results that do and do not follow one another.
NARROW = [Case((2, 9, 7, 7), padding=1), Case((2, 8, 30, 5), padding="same", dilation=2),
          Case((1, 8, 9, 3), padding=6, dilation=(1, 6)), Case((3, 8, 1, 1), padding=1),
          Case((2, 9, 7, 7), stride=2, padding=1), Case((1, 8, 13, 16), stride=2, padding=2),
          Case((1, 8, 13, 17), stride=2, padding=3, dilation=3), Case((1, 8, 8, 1), stride=2, padding=1),
          Case((1, 8, 900, 5), padding=1), Case((12, 8, 1900, 6), padding=(3, 3, 0, 4), dilation=(3, 2))]  # fmt: skip
