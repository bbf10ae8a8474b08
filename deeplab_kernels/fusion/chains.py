"""Finds depthwise convolutions, and who calls them followed by a norm and an activation.

Every module that has a depthwise convolution among its children is traced by torch.fx on its own, its children opaque:
what a whole model does around it - loops, shapes, other libraries' code - then does not matter. ``nn.Sequential`` needs
no tracing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..nn import AtrousDepthwiseConv2d, AtrousSeparableConv2d
from .modules import (
    ACTIVATIONS,
    SAME_CONVOLUTION,
    STATIC_SAME_CONVOLUTION,
    Chain,
    _calls_super,
    activation_name,
    is_class,
    is_pointwise,
    norm_parts,
    unfused_class,
)

# Bounds of one forward's control flow, all of which is traced.
_MAX_PATHS, _MAX_CONDITIONS = 32, 16
_LONGEST = 6  # modules of a chain


@dataclass(frozen=True)
class Flow:
    """What is known of the children's order in a module: their chains by the convolution's name, or why not."""

    chains: dict[str, Chain]
    remarks: dict[str, str]
    """Convolution -> why its chain ends where it does."""
    inputs: tuple[int, ...] = (1,)
    """Numbers of arguments of the forward for which this is known."""


def is_depthwise(module: nn.Module) -> bool:
    """Whether this is a two-dimensional depthwise convolution of any make (quantised and transposed ones too)."""
    groups, channels = getattr(module, "groups", None), getattr(module, "in_channels", None)
    kernel = getattr(module, "kernel_size", None)
    return isinstance(groups, int) and groups == channels and groups > 1 and isinstance(kernel, tuple | list) and (
        len(kernel) == 2
    )  # fmt: skip


def unfit(conv: nn.Module) -> str | None:
    """Why the operators cannot take over this depthwise convolution, or None."""
    if isinstance(conv, AtrousDepthwiseConv2d):
        return "runs on the operators already"
    cls = unfused_class(conv)
    if cls is not nn.Conv2d and not any(is_class(cls, known) for known in (SAME_CONVOLUTION, STATIC_SAME_CONVOLUTION)):
        kind = "parametrised" if hasattr(conv, "parametrizations") else f"a {cls.__name__}"
        return f"is {kind}, which may compute something else than nn.Conv2d"
    assert isinstance(conv, nn.Conv2d)
    if is_class(cls, STATIC_SAME_CONVOLUTION) and type(conv.static_padding) not in (nn.ZeroPad2d, nn.Identity):
        return f"pads by a {describe(conv.static_padding)}"  # type: ignore[arg-type]
    if "forward" in conv.__dict__:
        return "has a forward of its own"
    if conv.padding_mode != "zeros":
        return f'has padding_mode "{conv.padding_mode}"'
    if tuple(conv.kernel_size) == (1, 1):
        return "has a 1 x 1 kernel: nothing to gain"
    if conv.weight.is_complex():
        return f"computes in {conv.weight.dtype}"
    return None


class _Path(fx.Tracer):
    """Traces one path of a forward's control flow: conditions on symbols come out as ``decisions`` say, then False."""

    proxy_buffer_attributes = True  # nothing is computed, so no buffer is updated

    def __init__(self, decisions: list[bool]) -> None:
        super().__init__()
        self.decisions = decisions
        self.asked = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        if self.asked > _MAX_CONDITIONS:
            raise ValueError(f"more than {_MAX_CONDITIONS} conditions on values in one forward")
        if self.asked > len(self.decisions):
            self.decisions.append(False)
        return self.decisions[self.asked - 1]


def _required(cls: type[nn.Module]) -> tuple[int, dict[str, object]]:
    """(number of arguments of ``cls.forward`` without a default, the others with theirs)."""
    count, defaults = 0, {}
    for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise TypeError(f"forward requires the keyword argument {parameter.name}")
        else:
            count += 1
    return count, defaults


def _twin(module: nn.Module, training: bool) -> nn.Module:
    """A shallow copy, whose attributes forward may set."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = module.__dict__[name].copy()
    twin.training = training
    return twin


def _paths(module: nn.Module, training: bool, defaults: dict[str, object]) -> Iterator[fx.Graph]:
    """The graphs of every path through ``module``'s forward."""
    decisions: list[bool] = []
    for _ in range(_MAX_PATHS):
        yield _Path(decisions).trace(_twin(module, training), concrete_args=dict(defaults))
        while decisions and decisions[-1]:
            decisions.pop()
        if not decisions:
            return
        decisions[-1] = True
    raise ValueError(f"more than {_MAX_PATHS} paths through its forward")


def _graphs(module: nn.Module, defaults: dict[str, object]) -> list[fx.Graph]:
    """The graphs of ``module``'s forward in training and evaluation, along every path."""
    with torch.random.fork_rng(devices=[]):
        return [graph for training in (True, False) for graph in _paths(module, training, defaults)]


def _calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    return calls


def _next_child(node: fx.Node, module: nn.Module) -> tuple[fx.Node | None, str]:
    """(the call of a child that alone takes ``node``'s result, otherwise why there is none)."""
    users = list(node.users)
    if len(users) != 1:
        return None, f"its result is used {len(users)} times" if users else "its result is returned"
    user = users[0]
    if user.op == "output":
        return None, "its result is returned"
    if user.op != "call_module" or user.args != (node,) or user.kwargs:
        return None, f"its result goes to {getattr(user.target, '__name__', user.target)}"
    if type(module._modules.get(str(user.target))) is nn.Identity:
        return _next_child(user, module)
    return user, ""


def describe(module: nn.Module | None) -> str:
    return "nothing" if module is None else unfused_class(module).__name__


def _is_activation(module: nn.Module | None) -> bool:
    return module is not None and type(module) in ACTIVATIONS


def _half(children: Mapping[str, nn.Module | None], names: list[str]) -> tuple[list[str | None], list[str], str]:
    """([norm, activation] that ``names``, which follow a convolution, begin with; the other names; why nothing else may
    join, or an empty string)."""
    norm = None
    if names and norm_parts(children[names[0]])[0]:
        norm, *names = names
        carried = norm_parts(children[norm])[1]
        if carried is not None:
            kind = type(carried)
            remark = "" if kind in ACTIVATIONS else f"{kind.__name__} is not one of the fused activations"
            return [norm, None], names, remark
    elif names and "norm" in describe(children[names[0]]).lower():
        return [None, None], names, f"{names[0]} ({describe(children[names[0]])}) is not a plain batch norm"
    if names and _is_activation(children[names[0]]):
        if activation_name(children[names[0]]) is None:
            return [norm, None], names, f"{names[0]} has hooks"
        return [norm, names[0]], names[1:], ""
    return [norm, None], names, ""


def _chain(children: Mapping[str, nn.Module | None], names: list[str], end: str) -> tuple[Chain, str]:
    """The chain at the beginning of ``names`` (convolution first; behind the last one comes what ``end`` says), and why
    it is not longer."""
    conv, *rest = names
    (norm, activation), rest, remark = _half(children, rest)
    half = Chain(conv, norm, activation)
    if remark or not rest:
        return half, remark or end
    if is_pointwise(children[rest[0]]):
        second, _, _ = _half(children, rest[1:])
        return Chain(conv, norm, activation, rest[0], *second), ""
    return half, f"{rest[0]} ({describe(children[rest[0]])}) follows"


def _sequence(module: nn.Module, convs: list[str]) -> Flow:
    names = [name for name, child in module._modules.items() if child is not None]
    chains, remarks = {}, {}
    for conv in convs:
        following = names[names.index(conv) :][:_LONGEST]
        chains[conv], remarks[conv] = _chain(module._modules, following, "it is the last of its nn.Sequential")
    return Flow(chains, remarks)


def _chain_in(graph: fx.Graph, conv: str, module: nn.Module) -> tuple[Chain, str]:
    """The chain of the child ``conv`` in one graph of ``module``, and why it is not longer."""
    calls = _calls(graph)
    times = len(calls.get(conv, []))
    if times != 1:
        return Chain(conv), f"is called {times} times in one forward" if times else "is not called by its parent"
    names, end = [conv], ""
    node: fx.Node | None = calls[conv][0]
    while node is not None and len(names) < _LONGEST:
        node, end = _next_child(node, module)
        if node is None:
            break
        name = str(node.target)
        if name not in module._modules:
            end = f"its result goes to {name}, which is not a child of the same module"
            break
        if len(calls[name]) > 1 and type(module._modules[name]) not in ACTIVATIONS:
            end = f"{name} is called {len(calls[name])} times"
            break
        names.append(name)
    return _chain(module._modules, names, end)


def _traced(module: nn.Module, convs: list[str]) -> Flow:
    required, defaults = _required(unfused_class(module))
    graphs, inputs = _graphs(module, defaults), [required]
    if defaults:
        with contextlib.suppress(Exception):  # then only calls without optional arguments run fused
            graphs += _graphs(module, {})
            inputs.append(required + len(defaults))
    chains, remarks = {}, {}
    for conv in convs:
        found = [_chain_in(graph, conv, module) for graph in graphs]
        whole, halves = {chain for chain, _ in found}, {chain.depthwise_half() for chain, _ in found}
        chains[conv] = (whole if len(whole) == 1 else halves).pop() if len(halves) == 1 else Chain(conv)
        branches = "it is followed by one module or another: the parent's forward has branches"
        remarks[conv] = found[0][1] if len(halves) == 1 else branches
    return Flow(chains, remarks, tuple(inputs))


def flow(module: nn.Module, convs: list[str]) -> Flow:
    """The chains that start at the children ``convs`` of ``module``."""
    cls = unfused_class(module)
    reason = None
    if "forward" in module.__dict__:
        reason = "its parent has a forward of its own"
    elif cls.forward is nn.Sequential.forward:
        return _sequence(module, convs)
    elif isinstance(module, fx.GraphModule | AtrousSeparableConv2d):
        reason = f"its parent is a {cls.__name__}"
    elif hasattr(cls, "__getitem__") or hasattr(cls, "__iter__"):
        reason = f"its parent {cls.__name__} is a container"
    elif _calls_super(cls.forward):
        reason = "its parent's forward calls super()"
    else:
        try:
            return _traced(module, convs)
        except Exception as error:  # the forward is somebody else's code, run on symbols
            text = " ".join(str(error).split()) or type(error).__name__
            reason = f"torch.fx cannot trace its parent: {text[:100]}"
    return Flow({conv: Chain(conv) for conv in convs}, dict.fromkeys(convs, reason))
