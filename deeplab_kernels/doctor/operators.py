"""Every operator on small inputs, against its definition in plain torch and double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops import _backends

Call = Callable[..., Any]
TOLERANCE = 1e-3  # of the largest value; float32 is exact to about 1e-6, the matrix units' short formats to 1e-3


class _Inputs:
    """Random tensors, the same sequence of numbers for every device and dtype."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def positive(self, *shape: int) -> Tensor:
        return self(*shape).abs() + 0.5


_GEOMETRY = ([2, 1], [2, 3, 2, 2], [2, 2])


def _conv(call: Call, t: _Inputs) -> Any:
    return call("atrous_depthwise_conv2d", t(2, 5, 9, 11), t(10, 1, 3, 3), *_GEOMETRY)


def _conv_backward(call: Call, t: _Inputs) -> Any:
    x, weight = t(2, 5, 9, 11), t(10, 1, 3, 3)
    grad = t(*call("atrous_depthwise_conv2d", x, weight, *_GEOMETRY).shape)
    return call("atrous_depthwise_conv2d_backward", grad, x, weight, *_GEOMETRY, True, True)


def _inference(call: Call, t: _Inputs) -> Any:
    vectors = t(10), t(10), t(10), t.positive(10)
    return call("atrous_depthwise_bn_act_inference", t(2, 5, 9, 11), t(10, 1, 3, 3), *vectors, 1e-3, 2, *_GEOMETRY)


def _training(call: Call, t: _Inputs) -> Any:
    arguments = t(2, 5, 9, 11), t(10, 1, 3, 3), t(10), t(10)
    return call("atrous_depthwise_bn_act_training", *arguments, 1e-3, 1, *_GEOMETRY, True)


def _training_backward(call: Call, t: _Inputs) -> Any:
    x, weight, gamma, beta = t(2, 5, 9, 11), t(10, 1, 3, 3), t(10), t(10)
    out, y, mean, var = call("atrous_depthwise_bn_act_training", x, weight, gamma, beta, 1e-3, 0, *_GEOMETRY, True)
    inputs = t(*out.shape), x, weight, y, gamma, beta, mean, var
    return call("atrous_depthwise_bn_act_backward", *inputs, 1e-3, 0, True, *_GEOMETRY, True, True)


def _separable(call: Call, t: _Inputs) -> Any:
    norms = t(5), t(5), t(5), t.positive(5), t(7), t(7), t(7), t.positive(7)
    tensors = t(2, 5, 9, 11), t(5, 1, 3, 3), t(7, 5, 1, 1), t(2, 7, 5, 11), *norms
    return call("atrous_separable_conv2d", *tensors, 1e-3, 1e-5, 1, 2, 1, *_GEOMETRY)


def _pointwise(call: Call, t: _Inputs) -> Any:
    return call("pointwise_conv2d", t(2, 5, 9, 11), t(7, 5, 1, 1))


def _pointwise_backward(call: Call, t: _Inputs) -> Any:
    return call("pointwise_conv2d_backward", t(2, 7, 9, 11), t(2, 5, 9, 11), t(7, 5, 1, 1), True, True)


def _pointwise_norm(call: Call, t: _Inputs) -> Any:
    return call("pointwise_bn_act_training", t(2, 5, 9, 11), t(7, 5, 1, 1), t(2, 7, 9, 11), t(7), t(7), 1e-3, 1)


def _norm(call: Call, t: _Inputs) -> Any:
    return call("batch_norm_act_training", t(2, 5, 9, 11), t(2, 5, 9, 11), t(5), t(5), 1e-3, 2)


def _norm_backward(call: Call, t: _Inputs) -> Any:
    z, gamma, beta = t(2, 5, 9, 11), t(5), t(5)
    out, mean, var = call("batch_norm_act_training", z, t(2, 5, 9, 11), gamma, beta, 1e-3, 0)
    return call("batch_norm_act_backward", t(2, 5, 9, 11), z, out, gamma, beta, mean, var, 1e-3, 0)


_RATES = [1, 1, 2, 3, 4, 2]


def _pyramid(call: Call, t: _Inputs) -> Any:
    norms = t(3, 5), t(3, 5), t(3, 5), t.positive(3, 5)
    return call("atrous_spatial_pyramid", t(2, 5, 9, 11), t(3, 5, 1, 3, 3), *norms, 1e-3, 1, _RATES, True)


def _pyramid_training(call: Call, t: _Inputs) -> Any:
    tensors = t(2, 5, 9, 11), t(3, 5, 1, 3, 3), t(3, 5), t(3, 5)
    out, _, *rest = call("atrous_spatial_pyramid_training", *tensors, 1e-3, 1, _RATES, True, False)
    return out, rest


def _pyramid_backward(call: Call, t: _Inputs) -> Any:
    tensors = [t(2, 5, 9, 11) for _ in range(3)], t(2, 5, 1, 1), t(2, 5, 9, 11), t(3, 5, 1, 3, 3)
    norms = t(3, 5), t(3, 5), t(3, 5), t.positive(3, 5)
    # No activation: rounding would decide which of the values near its kinks have a gradient.
    return call("atrous_spatial_pyramid_backward", *tensors, [], *norms, 1e-3, 0, True, _RATES, True, True)


def _gaussian(call: Call, t: _Inputs) -> Any:
    return call("gaussian_filter", t(2, 3, 41), t(2, 4, 41))


def _gaussian_backward(call: Call, t: _Inputs) -> Any:
    return call("gaussian_filter_backward", t(2, 3, 41), t(2, 3, 41), t(2, 4, 41), True, True)


def _local(call: Call, t: _Inputs) -> Any:
    return call("local_gaussian_filter", t(2, 3, 7, 9), t(2, 4, 7, 9), [2, 3])


def _local_backward(call: Call, t: _Inputs) -> Any:
    tensors = t(2, 3, 7, 9), t(2, 3, 7, 9), t(2, 4, 7, 9)
    return call("local_gaussian_filter_backward", *tensors, [2, 3], True, True)


def _lattice(call: Call, t: _Inputs) -> Any:
    features = t(2, 5, 41)
    return call("permutohedral_filter", t(2, 3, 41), features, call("permutohedral_lattice", features), 0, False)


def _filter(call: Call, t: _Inputs) -> Any:
    return call("permutohedral_filter", t(2, 3, 41), t(2, 5, 41), None, 3, False)


def _filter_backward(call: Call, t: _Inputs) -> Any:
    return call("permutohedral_filter_backward", t(2, 3, 41), t(2, 3, 41), t(2, 5, 41), None, 3, False, True, True)


def _mean_field(call: Call, t: _Inputs) -> Any:
    return call("dense_crf_mean_field", t(2, 4, 41), [t(2, 5, 41)], [], [t(4, 4)], None, [3], 3, False)[0]


def _mean_field_backward(call: Call, t: _Inputs) -> Any:
    unary, features, matrix = t(2, 4, 41), [t(2, 5, 41)], [t(4, 4)]
    _, saved = call("dense_crf_mean_field", unary, features, [], matrix, None, [3], 3, True)
    arguments: Any = t(2, 4, 41), saved, unary, features, [], matrix, None, [3], 3, True, True
    return call("dense_crf_mean_field_backward", *arguments)


CASES: dict[str, Callable[[Call, _Inputs], Any]] = {
    "atrous_depthwise_conv2d": _conv,
    "atrous_depthwise_conv2d_backward": _conv_backward,
    "atrous_depthwise_bn_act_inference": _inference,
    "atrous_depthwise_bn_act_training": _training,
    "atrous_depthwise_bn_act_backward": _training_backward,
    "atrous_separable_conv2d": _separable,
    "atrous_spatial_pyramid": _pyramid,
    "atrous_spatial_pyramid_training": _pyramid_training,
    "atrous_spatial_pyramid_backward": _pyramid_backward,
    "pointwise_conv2d": _pointwise,
    "pointwise_conv2d_backward": _pointwise_backward,
    "pointwise_bn_act_training": _pointwise_norm,
    "batch_norm_act_training": _norm,
    "batch_norm_act_backward": _norm_backward,
    "gaussian_filter": _gaussian,
    "gaussian_filter_backward": _gaussian_backward,
    "local_gaussian_filter": _local,
    "local_gaussian_filter_backward": _local_backward,
    "permutohedral_lattice": _lattice,
    "permutohedral_filter": _filter,
    "permutohedral_filter_backward": _filter_backward,
    "dense_crf_mean_field": _mean_field,
    "dense_crf_mean_field_backward": _mean_field_backward,
}


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]


def _operator(name: str, *args: Any) -> Any:
    return getattr(torch.ops.deeplab_kernels, name).default(*args)


def _definition(name: str, *args: Any) -> Any:
    return getattr(reference, name)(*args)


def error(name: str, device: str) -> float:
    """Largest difference between the operator's float32 results on ``device`` and its definition's in float64, in units
    of the largest value of each result."""
    with torch.no_grad():
        actual = _flat(CASES[name](_operator, _Inputs(device, torch.float32)))
        expected = _flat(CASES[name](_definition, _Inputs("cpu", torch.float64)))
    return max(_difference(a.cpu().double(), e.double()) for a, e in zip(actual, expected, strict=True))


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    return worst if worst == worst else float("inf")  # NaN


def names() -> Sequence[str]:
    return list(_backends.OPERATORS)
