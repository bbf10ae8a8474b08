"""Gaussian filter of a feature image, cut off outside a window around each pixel.

    out[y, x] = sum over |dy| <= rv, |dx| <= rh of exp(-|f[y, x] - f[y + dy, x + dx]|^2 / 2) v[y + dy, x + dx]

The message of a short-range CRF: what fully connected ones are compared with (Chen et al., arXiv:1412.7062, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.local_gaussian_filter import clamped
from . import _validation
from ._flops import register_flop_formula
from .gaussian_filter import backward_pair_flops, call, check_points, normalised, pair_flops, register_filter

_ops = torch.ops.deeplab_kernels


def local_gaussian_filter(
    values: Tensor, features: Tensor, radius: int | Sequence[int], normalization: str = "none"
) -> Tensor:
    """Each pixel's sum over the window ``|dy| <= rv``, ``|dx| <= rh`` of ``exp(-|f_i - f_j|^2 / 2) v_j``, itself
    included; pixels outside the image are absent.

    Args:
        values: (B, C, H, W), float32, float64, float16 or bfloat16. Any size, also 0.
        features: (B, d, H, W), d from 1 to 16, in units of the kernel's standard deviation; positions count only if
            they are among the features. dtype of ``values``; with float16 or bfloat16 values it may also be float32.
        radius: int or (vertical, horizontal), at least 0, in pixels. Beyond the image's size nothing changes.
        normalization: as in :func:`gaussian_filter`; n is the sum of the kernel over the window.

    Returns:
        (B, C, H, W) in the dtype of ``values``. Kernel and sums are formed in float32 (float64 for float64).
        Differentiable any number of times w.r.t. ``values`` and ``features``. Deterministic. Under autocast, as torch's
        exp and sum, computed and returned in float32.

    Raises:
        ValueError, TypeError: an argument is not as above, or ``features`` hold a NaN or an infinity. The latter is
            only looked for in eager mode on the CPU; elsewhere the result of that image is NaN. A NaN or infinity in
            ``values`` spreads over its window.
    """
    values, features = check_points(values, features, shape="H, W")
    window = _validation.pair(radius, "radius", 0)
    return normalised(lambda v: call("local_gaussian_filter", v, features, window), values, normalization)


register_filter("local_gaussian_filter")


def _pairs(batch: int, height: int, width: int, radius: Sequence[int]) -> int:
    """Pixels times the neighbours that they have inside the image."""
    pairs = batch
    for size, r in zip((height, width), clamped(radius, height, width), strict=True):
        pairs *= size * (2 * r + 1) - r * (r + 1)
    return pairs


@register_flop_formula(_ops.local_gaussian_filter)
def _(values_shape, features_shape, radius, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    batch, channels, height, width = values_shape
    return pair_flops(_pairs(batch, height, width, radius), channels, features_shape[1])


@register_flop_formula(_ops.local_gaussian_filter_backward)
def _(grad_shape, values_shape, features_shape, radius, need_values, need_features, **kwargs):  # type: ignore[no-untyped-def]
    batch, channels, height, width = values_shape
    pairs = _pairs(batch, height, width, radius)
    return backward_pair_flops(pairs, channels, features_shape[1], need_values, need_features)
