"""Recognises separable blocks that were written elsewhere: by the names in their state_dict, or by their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Other names of the submodules in published checkpoints. The first name of each entry is the depthwise convolution's.
_SPELLINGS: tuple[dict[str, str], ...] = (
    {
        "conv_dw": "depthwise",
        "bn_dw": "depthwise_norm",
        "conv_pw": "pointwise",
        "bn_pw": "pointwise_norm",
        "bn": "pointwise_norm",
    },
    {"conv1": "depthwise", "bn": "depthwise_norm", "pointwise": "pointwise"},
)
_NUMBERED = re.compile(r"(?:body\.)?((?:\d+\.)+)(\w+)")


def only_zeros(padding_mode: str, name: str = "padding_mode") -> None:
    if padding_mode != "zeros":
        raise ValueError(f'{name} must be "zeros", got {padding_mode!r}: pad with torch.nn.functional.pad before')


def untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """True if calling ``module`` runs its class's own forward and nothing else, so that a fused operator may do it."""
    return (
        type(module) in types
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def renamed(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs (name in a foreign state_dict of such a block, name here)."""
    submodules = {name.rpartition(".")[0] for name in given}
    if "depthwise" in submodules:
        return
    for spelling in _SPELLINGS:
        if next(iter(spelling)) in submodules:
            for name in given:
                submodule, _, leaf = name.rpartition(".")
                if submodule in spelling:
                    yield name, f"{spelling[submodule]}.{leaf}"
            return
    layers: dict[tuple[int, ...], dict[str, str]] = {}
    for name in given:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            position = tuple(int(number) for number in match[1].split(".")[:-1])
            layers.setdefault(position, {})[match[2]] = name
    ordered = [layers[position] for position in sorted(layers)]
    kinds = "".join("c" if "weight" in layer and given[layer["weight"]].dim() == 4 else "n" for layer in ordered)
    if re.fullmatch("cn?cn?", kinds):
        pointwise = kinds.rindex("c")
        for i, (kind, layer) in enumerate(zip(kinds, ordered, strict=True)):
            half = "pointwise" if i >= pointwise else "depthwise"
            for leaf, name in layer.items():
                yield name, f"{half}.{leaf}" if kind == "c" else f"{half}_norm.{leaf}"


def _flattened(modules: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential:
            yield from _flattened(module)
        elif module is not None and type(module) is not nn.Identity:
            yield module


def sort_modules(modules: Iterable[nn.Module | None], activations: dict[str, str | None]) -> dict[str, Any]:
    """Finds the role of each module; adds the activation modules to ``activations``."""
    parts: dict[str, Any] = {}
    stage = "pre"  # the last convolution seen
    activated = False
    for module in _flattened(modules):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            if activations[stage] is not None:
                raise ValueError(f"from_modules got two activations for the {stage} position, the second is {module}")
            activations[stage] = "relu6" if isinstance(module, nn.ReLU6) else "relu"
            activated = True
        elif isinstance(module, nn.Conv2d):
            if stage == "pointwise":
                raise ValueError(f"from_modules takes a depthwise and a pointwise convolution, got a third: {module}")
            stage = "depthwise" if stage == "pre" else "pointwise"
            parts[stage] = module
            activated = False
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            if stage == "pre" or activated or f"{stage}_norm" in parts:
                raise ValueError(f"from_modules takes one norm directly after each convolution, got {module}")
            parts[f"{stage}_norm"] = module
        else:
            raise TypeError(f"from_modules takes nn.Conv2d, norms, nn.ReLU and nn.ReLU6, got {module!r}")
    if stage != "pointwise":
        raise ValueError(
            f"from_modules needs a depthwise and a pointwise convolution, got {len(parts.keys() & {'depthwise'})} of 2"
        )
    return parts


def check_convolutions(depthwise: nn.Conv2d, pointwise: nn.Conv2d, own_type: type[nn.Conv2d]) -> None:
    if type(depthwise) not in (nn.Conv2d, own_type):
        raise TypeError(f"the depthwise convolution must be an nn.Conv2d itself, got {type(depthwise).__name__}")
    if type(depthwise) is nn.Conv2d and not untouched(depthwise, nn.Conv2d):
        raise ValueError("the depthwise convolution has hooks, which the block could not take over: remove them first")
    if depthwise.groups != depthwise.in_channels:
        raise ValueError(
            f"the depthwise convolution must have groups equal to its in_channels {depthwise.in_channels}, "
            f"got groups={depthwise.groups}"
        )
    only_zeros(depthwise.padding_mode, "the depthwise convolution's padding_mode")
    if pointwise.kernel_size != (1, 1):
        raise ValueError(f"the pointwise convolution must have kernel_size (1, 1), got {pointwise.kernel_size}")
    if pointwise.stride != (1, 1) or pointwise.padding not in ((0, 0), "same", "valid") or pointwise.groups != 1:
        raise ValueError(f"the pointwise convolution must have stride 1, padding 0 and groups 1, got {pointwise}")
    if pointwise.in_channels != depthwise.out_channels:
        raise ValueError(
            f"the pointwise convolution must have the depthwise convolution's {depthwise.out_channels} output channels "
            f"as in_channels, got {pointwise.in_channels}"
        )
    for attribute in ("device", "dtype"):
        first, second = getattr(depthwise.weight, attribute), getattr(pointwise.weight, attribute)
        if first != second:
            raise ValueError(f"the convolutions must have one {attribute}, got {first} and {second}")


def check_norm(norm: Any, conv: nn.Conv2d, name: str) -> None:
    channels = getattr(norm, "num_features", getattr(norm, "num_channels", conv.out_channels))
    if channels != conv.out_channels:
        raise ValueError(
            f"the norm after the {name} convolution must have {conv.out_channels} channels, got {channels}"
        )
