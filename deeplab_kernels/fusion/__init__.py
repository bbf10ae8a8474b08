"""Puts the fused operators into models that were written without them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from .chains import flow, is_depthwise, unfit
from .modules import (
    Chain,
    FusedConvolution,
    FusedOwner,
    FusedSequence,
    activation_name,
    norm_parts,
    restore_class,
    set_class,
    unfused_class,
)
from .report import Entry, FusionReport
from .scope import EVERYWHERE, scope_of

__all__ = ["Entry", "FusionReport", "fuse", "unfuse"]


_Names = str | Iterable[str] | None


def _check(model: object) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError("model is a TorchScript module, whose code is fixed: call fuse before scripting or tracing")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _patterns(value: str | Iterable[str], argument: str, names: list[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold names of modules, got {pattern!r}")
        if not any(_matches(name, [pattern]) for name in names):
            raise ValueError(f"{argument}={pattern!r} matches none of the {len(names)} depthwise convolutions")
    return patterns


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in patterns)


def _entry(name: str, conv: nn.Module, **kwargs: object) -> Entry:
    def pair(attribute: str) -> tuple[int, ...]:
        return tuple(getattr(conv, attribute, (1, 1)))

    channels = (conv.in_channels, conv.out_channels)
    return Entry(name, channels, pair("kernel_size"), pair("stride"), pair("dilation"), **kwargs)  # type: ignore[arg-type]


def _activation(owner: nn.Module, chain: Chain) -> str | None:
    norm, activation = (owner._modules.get(n) if n is not None else None for n in (chain.norm, chain.activation))
    return activation_name(norm_parts(norm)[1] if activation is None else activation)


class _Fusion:
    """One call of :func:`fuse`: which convolutions it may take, and the report it writes."""

    def __init__(self, names: dict[int, str], only: _Names, skip: _Names, always: bool) -> None:
        self.names = names  # of the convolutions, by id
        self.only = None if only is None else _patterns(only, "only", list(names.values()))
        self.skip = _patterns(skip or (), "skip", list(names.values()))
        self.always = always
        self.report = FusionReport()
        self.seen: set[int] = set()  # convolutions that are in the report

    def _refusal(self, conv: nn.Module) -> str | None:
        name = self.names[id(conv)]
        if (self.only is not None and not _matches(name, self.only)) or _matches(name, self.skip):
            return "was excluded by only or skip"
        return unfit(conv)

    def take(self, conv: nn.Module) -> bool:
        """Puts ``conv`` on its operator unless something speaks against it."""
        if isinstance(conv, FusedConvolution):  # of another parent too
            return True
        reason = self._refusal(conv)
        if reason is None:
            set_class(conv, FusedConvolution)
            conv._fused_always = self.always  # type: ignore[assignment]
        elif id(conv) not in self.seen:
            self.seen.add(id(conv))
            self.report.skipped.append(_entry(self.names[id(conv)], conv, reason=reason))
        return reason is None

    def tell(self, conv: nn.Module, chain: Chain, activation: str | None, reason: str) -> None:
        if id(conv) in self.seen:
            return
        self.seen.add(id(conv))
        scope = EVERYWHERE if self.always else scope_of(conv, alone=len(chain.names) == 1)  # type: ignore[arg-type]
        half = chain.depthwise_names
        found = {
            "fused": half,
            "pointwise": chain.names[len(half) :],
            "activation": activation,
            "scope": str(scope),
            "reason": reason,
        }
        self.report.fused.append(_entry(self.names[id(conv)], conv, **found))

    def own(self, owner: nn.Module, convs: dict[str, nn.Module]) -> None:
        """Takes the children ``convs`` of ``owner``, and lets it run their chains."""
        taken = {name: conv for name, conv in convs.items() if self.take(conv)}
        if not taken:
            return
        found = flow(owner, list(taken))
        chains = tuple(chain for chain in found.chains.values() if len(chain.names) > 1)
        if chains:
            sequence = unfused_class(owner).forward is nn.Sequential.forward
            set_class(owner, FusedSequence if sequence else FusedOwner)
            owner._fused_chains, owner._fused_inputs = chains, found.inputs  # type: ignore[assignment]
        for name, conv in taken.items():
            chain = found.chains[name]
            self.tell(conv, chain, _activation(owner, chain), found.remarks[name])


def fuse(
    model: nn.Module,
    *,
    only: _Names = None,
    skip: _Names = None,
    always: bool = False,
) -> FusionReport:
    """Lets the depthwise convolutions of ``model`` run on this package's operators, in place.

    A convolution that its parent's forward calls just before a batch norm and ReLU or ReLU6 becomes one operator with
    them, and runs alone on :func:`ops.atrous_depthwise_conv2d` otherwise. Results, gradients and running statistics
    stay what they were up to rounding, in training and evaluation; parameters, buffers, the names in ``state_dict`` and
    hooks stay as they are. Chains are found by torch.fx in every module that has a depthwise convolution as a child. On
    a CPU a convolution runs fused only where that was measured to be no slower (the report's column "where").

    Args:
        model: any module: timm's, torchvision's, one's own; on any device; within DataParallel or DDP too.
        only: name or names of what to fuse, and nothing else: of a convolution, of a module around it, or a pattern
            such as "encoder.*".
        skip: name or names of what not to fuse.
        always: run fused on a CPU even where PyTorch's own kernels were measured to be faster.

    Returns:
        What was fused, and what was not and why. Calling fuse again fuses anew, under the arguments then given.

    Raises:
        TypeError: ``model`` is no module, or TorchScript. ValueError: a name in ``only`` or ``skip`` matches nothing.
    """
    names = {id(module): name for name, module in _check(model).named_modules() if is_depthwise(module)}
    fusion = _Fusion(names, only, skip, always)
    unfuse(model)
    for module in model.modules():
        convs = {n: child for n, child in module._modules.items() if child is not None and is_depthwise(child)}
        if convs:
            fusion.own(module, convs)
    if is_depthwise(model) and fusion.take(model):
        fusion.tell(model, Chain(""), None, "it is the model")
    order = list(names.values())
    for entries in (fusion.report.fused, fusion.report.skipped):
        entries.sort(key=lambda entry: order.index(entry.name))
    return fusion.report


def unfuse(model: nn.Module) -> None:
    """Takes back what :func:`fuse` did to ``model``, in place."""
    for module in _check(model).modules():
        restore_class(module)
