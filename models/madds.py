"""Multiply-Adds of a model, as the DeepLab papers count them and as they are.

Convolutions (and matrix products) only: batch normalisation, activations and resizing are not counted, and one
multiply-add is 1. The paper's convention counts an atrous convolution as TensorFlow ran it (space-to-batch): its output
grid is rounded up to a multiple of the rate on each axis, so 33 x 33 counts as 36 x 36 at rates 6, 12 and 18.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from .system import evaluation_mode

Convention = Literal["paper", "true"]

_NAMESPACE = "deeplab_kernels"


class LayerMadds(NamedTuple):
    """One convolution of a model, in the order in which they run."""

    name: str
    """Of the parameter that is the weight, without ".weight"."""
    output_shape: tuple[int, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    rate: tuple[int, int]
    groups: int
    madds: int


@overload
def madds(
    model: nn.Module,
    input_size: int | Sequence[int],
    convention: Convention = ...,
    *,
    per_layer: Literal[False] = ...,
    channels: int = ...,
) -> int: ...


@overload
def madds(
    model: nn.Module,
    input_size: int | Sequence[int],
    convention: Convention = ...,
    *,
    per_layer: Literal[True],
    channels: int = ...,
) -> list[LayerMadds]: ...


def madds(
    model: nn.Module,
    input_size: int | Sequence[int],
    convention: Convention = "paper",
    *,
    per_layer: bool = False,
    channels: int = 3,
) -> int | list[LayerMadds]:
    """Multiply-adds of one image through ``model`` in evaluation mode.

    The model runs on the meta device with stand-ins for its parameters: nothing is allocated or computed, whatever
    device the model is on, and the model is left as it was.

    Args:
        input_size: int for a square image, or (height, width).
        convention: "paper" rounds the output grid of atrous convolutions up to multiples of the rate, "true" does not.
        per_layer: return a list of :class:`LayerMadds`, in the order of execution, instead of the sum.
        channels: of the input.

    Raises:
        ValueError: a size or convention that is not as above.
        NotImplementedError: the model calls one of this package's convolutions that has no rule here.
    """
    if convention not in get_args(Convention):
        raise ValueError(f'convention must be "paper" or "true", got {convention!r}')
    counts = _count(model, input_size, channels)
    layers = [layer._replace(madds=paper) if convention == "paper" else layer for layer, paper in counts]
    return layers if per_layer else sum(layer.madds for layer in layers)


def _count(model: nn.Module, input_size: int | Sequence[int], channels: int = 3) -> list[tuple[LayerMadds, int]]:
    """Every convolution with its true count, and its count by the paper's convention."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in size):
        raise ValueError(f"input_size must be a positive int or (height, width), got {input_size!r}")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    x = torch.empty((1, channels, *size), dtype=dtype, device="meta")
    counter = _Counter(meta)
    with torch.no_grad(), evaluation_mode(model), counter:
        functional_call(model, meta, (x,))
    return counter.counts


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


_aten = torch.ops.aten
_ELEMENTWISE = {_aten.relu.default, _aten.rsqrt.default, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor}


class _Counter(TorchDispatchMode):
    """Sees every operator call of a forward pass and records the convolutions."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.counts: list[tuple[LayerMadds, int]] = []
        # A weight may arrive as a view (a pointwise kernel as a matrix): its storage tells which parameter it is. The
        # tensors are kept, so that no address comes to mean another storage.
        self._names = {_storage(t): name.removesuffix(".weight") for name, t in parameters.items()}
        self._kept = list(parameters.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._shortcut(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        if func is _aten.convolution.default:
            x, weight, _, stride, _, dilation, transposed, _, groups = args
            # A transposed convolution multiplies once per input pixel and kernel entry.
            grid = x.shape if transposed else out.shape
            self._add(
                weight, out, grid[2:], weight[0].numel() * weight.shape[0], _pair(stride), _pair(dilation), groups
            )
        elif func in (_aten.mm.default, _aten.bmm.default):
            self._add(args[1], out, out.shape[-1:], args[0].numel(), (1, 1), (1, 1), 1)
        elif func in (_aten.addmm.default, _aten.baddbmm.default):
            self._add(args[2], out, out.shape[-1:], args[1].numel(), (1, 1), (1, 1), 1)
        elif func.namespace == _NAMESPACE and func.__name__.startswith("atrous_"):
            self._add_own(func, args, out)
        else:
            self._inherit_name(args, out)
        return out

    def _shortcut(self, func: Any, args: Any) -> Any:
        # Only shapes matter, and on the meta device these operators decompose into dozens of Python functions: most of
        # the time of a pass.
        if func is _aten.native_batch_norm.default:
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        if func in _ELEMENTWISE and all(isinstance(a, Tensor) and a.dtype == args[0].dtype for a in args):
            shape = torch.broadcast_shapes(*(a.shape for a in args))
            return next((torch.empty_like(a) for a in args if a.shape == shape), None)
        return None

    def _inherit_name(self, args: Any, out: Any) -> None:
        # What is computed from a weight and keeps its shape (cast, scaled by a folded normalisation) is that weight.
        if not isinstance(out, Tensor) or out.dim() < 2:
            return
        for arg in args:
            if isinstance(arg, Tensor) and arg.shape == out.shape and _storage(arg) in self._names:
                self._names.setdefault(_storage(out), self._names[_storage(arg)])
                self._kept.append(out)
                return

    def _add_own(self, func: Any, args: Any, out: Any) -> None:
        name = func.__name__.removesuffix(".default")
        if name not in ("atrous_depthwise_conv2d", "atrous_depthwise_bn_act_inference"):
            raise NotImplementedError(f"deeplab_kernels.models.madds has no rule for the operator {name}")
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        weight = named["weight"]
        stride, dilation = _pair(named["stride"]), _pair(named["dilation"])
        self._add(weight, out, out.shape[2:], weight.numel(), stride, dilation, named["x"].shape[1])

    def _add(
        self,
        weight: Tensor,
        out: Tensor,
        grid: Sequence[int],
        per_pixel: int,
        stride: tuple[int, int],
        rate: tuple[int, int],
        groups: int,
    ) -> None:
        kernel = _pair(weight.shape[2:]) if weight.dim() == 4 else (1, 1)
        rounded = list(grid)
        if len(grid) == 2 and max(kernel) > 1:
            rounded = [math.ceil(n / r) * r for n, r in zip(grid, rate, strict=True)]
        name = self._names.get(_storage(weight), "?")
        layer = LayerMadds(name, tuple(out.shape), kernel, stride, rate, groups, per_pixel * math.prod(grid))
        self.counts.append((layer, per_pixel * math.prod(rounded)))


# Chen et al., arXiv:1802.02611, table 5: (eval output stride, decoder, SC) -> Multiply-Adds at one scale, at six
# scales, and at six scales with left-right flips.
_PAPER_TABLE = {
    (16, False, False): (68_000_000_000, 601_740_000_000, 1203_340_000_000),
    (8, False, False): (240_850_000_000, 2149_910_000_000, 4299_680_000_000),
    (16, True, False): (89_760_000_000, 790_120_000_000, 1580_100_000_000),
    (8, True, False): (262_590_000_000, 2338_150_000_000, 4676_160_000_000),
    (16, True, True): (54_170_000_000, None, 928_810_000_000),
    (8, True, True): (177_100_000_000, None, 3055_350_000_000),
}
PAPER_MODEL = "deeplabv3plus_xception65"
PAPER_SIZE = 513
# 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times 513, rounded as the official code does: int(512 * scale + 1)
PAPER_SCALED_SIZES = (257, 385, 513, 641, 769, 897)


def row(model: nn.Module, name: str, input_size: int | Sequence[int] = PAPER_SIZE) -> dict[str, Any]:
    """The two counts of ``model`` as a row of :func:`paper_table`, its numbers of the paper None."""
    counts = _count(model, input_size)
    return {
        "model": name,
        "input_size": input_size if isinstance(input_size, int) else list(input_size),
        "eval_output_stride": getattr(model, "output_stride", None),
        "decoder": getattr(model, "decoder", None) is not None,
        "separable": getattr(model, "separable", None),
        "madds_paper_convention": sum(paper for _, paper in counts),
        "madds_true": sum(layer.madds for layer, _ in counts),
        "paper": None,
    }


def paper_table(*, multi_scale: bool = True) -> list[dict[str, Any]]:
    """The Multiply-Adds of the v3+ paper's table 5 recomputed from the built models, one dict per row.

    Keys: model, input_size, eval_output_stride, decoder, separable, then multiply-adds as ints: madds_paper_convention,
    madds_true and paper (what the paper prints) at one scale; with ``multi_scale`` the same three with the prefixes
    multi_scale_ (six scales) and multi_scale_flip_. Where the paper prints no number it is None.
    """
    from .registry import build

    rows = []
    models: dict[tuple[bool, bool], Any] = {}
    for (output_stride, decoder, separable), printed in _PAPER_TABLE.items():
        if (decoder, separable) not in models:
            models[decoder, separable] = build(PAPER_MODEL, decoder=decoder, separable=separable, device="meta")
        model = models[decoder, separable]
        model.set_output_stride(output_stride)
        result = row(model, PAPER_MODEL)
        result.update(decoder=decoder, separable=separable, paper=printed[0])
        if multi_scale:
            scales = [row(model, PAPER_MODEL, size) for size in PAPER_SCALED_SIZES]
            for prefix, factor, paper in (("multi_scale_", 1, printed[1]), ("multi_scale_flip_", 2, printed[2])):
                for key in ("madds_paper_convention", "madds_true"):
                    result[prefix + key] = factor * sum(scale[key] for scale in scales)
                result[prefix + "paper"] = paper
        rows.append(result)
    return rows
