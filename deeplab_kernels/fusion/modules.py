"""What fused modules do when they are called.

``fuse`` gives two kinds of modules a subclass of their own class: depthwise convolutions, which then run on
``ops.atrous_depthwise_conv2d``, and the modules whose ``forward`` calls a convolution, its norm and its activation in
turn, which then run the three as one operator. Parameters, buffers, names and hooks stay where they are; a fused module
holds nothing but the names of its chains, so that copies, pickles and replicas need no care.
"""

from __future__ import annotations

import copyreg
import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nn._halves import conv_act, conv_norm_act, convolve, fusable, norm_parameters
from ..nn._separable_blocks import untouched
from ..ops import _validation, atrous_separable_conv2d
from ..ops.atrous_separable import picks_whole
from .scope import covers

# Classes of timm and segmentation_models_pytorch that are understood without importing them: convolutions with
# TensorFlow's padding, for the size of the input and for a size fixed when built; the batch norm that carries its
# activation.
STATIC_SAME_CONVOLUTION = ("segmentation_models_pytorch.encoders._efficientnet", "Conv2dStaticSamePadding")
SAME_CONVOLUTION = ("timm.layers.conv2d_same", "Conv2dSame")
NORM_WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


def unfused_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, or the one it had before ``fuse``."""
    return module._unfused if is_fused(module) else type(module)


def is_class(cls: type[nn.Module], name: tuple[str, str]) -> bool:
    return (cls.__module__, cls.__qualname__) == name


class Fused(nn.Module):
    """Base of what ``fuse`` mixes into a class."""

    _unfused: ClassVar[type[nn.Module]]
    _mixin: ClassVar[type[Fused]]
    _exactly: ClassVar[type[Fused]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists in this process only: pickles and copies name what it was made of.
        function, args, *state = super().__reduce_ex__(max(protocol, 2))  # type: ignore[str-unpack]
        if is_fused(self) and function is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (self._mixin, self._unfused), *state)
        return (function, args, *state)


_classes: dict[tuple[type[Fused], type[nn.Module]], type[Fused]] = {}


def fused_class(mixin: type[Fused], cls: type[nn.Module]) -> type[Fused]:
    """The subclass of ``cls`` that does as ``mixin`` says; made once."""
    if (mixin, cls) not in _classes:
        names: dict[str, Any] = {"_unfused": cls, "_mixin": mixin}
        names |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
        if mixin is FusedOwner:
            names["forward"] = _like(cls.forward)
        fused: Any = types.new_class(f"Fused{cls.__name__}", (mixin, cls), {}, lambda body: body.update(names))
        fused._exactly = fused
        _classes[mixin, cls] = fused
    return _classes[mixin, cls]


def _like(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # tracers ask for the names and the number of the arguments
    def forward(self: FusedOwner, *args: Any, **kwargs: Any) -> Any:
        return self._fused_forward(*args, **kwargs)

    return forward


def is_fused(module: nn.Module) -> TypeGuard[Fused]:
    """Whether ``fuse`` made ``module``'s class, and nobody another one out of that (as parametrisations do)."""
    return isinstance(module, Fused) and type(module) is module._exactly


def _new(mixin: type[Fused], cls: type[nn.Module]) -> nn.Module:
    fused = fused_class(mixin, cls)
    return fused.__new__(fused)


class FusedConvolution(Fused, nn.Conv2d):
    """A depthwise ``nn.Conv2d`` on ``ops.atrous_depthwise_conv2d``."""

    _fused_always: bool

    def takes(self, x: Any, alone: bool) -> bool:
        """Whether the operator serves ``x`` and is the faster choice; the class's own forward does the rest."""
        if not is_fused(self) or not isinstance(x, Tensor):
            return False
        weight = self.weight
        return (
            x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.dtype in _validation.DTYPES
            and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
            and x.layout == torch.strided
            and not x.is_nested
            and (type(x) is Tensor or not is_traceable_wrapper_subclass(x))
            and (self._fused_always or covers(self, x, weight.requires_grad, alone))
        )

    def sides(self, x: Tensor) -> Any:
        """The zeros around ``x``."""
        if is_class(self._unfused, STATIC_SAME_CONVOLUTION):
            left, right, top, bottom = getattr(self._modules["static_padding"], "padding", (0, 0, 0, 0))
            top_, bottom_, left_, right_ = _validation.sides(self.padding, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
            return (top + top_, bottom + bottom_, left + left_, right + right_)
        if not is_class(self._unfused, SAME_CONVOLUTION):
            return self.padding
        values: list[int] = []
        for size, k, s, r in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * r + 1 - size, 0)
            values += [total // 2, total - total // 2]
        return tuple(values)

    def forward(self, x: Any) -> Any:
        return convolve(self, x, self.sides(x)) if self.takes(x, alone=True) else super().forward(x)


@dataclass(frozen=True)
class Chain:
    """Names of a module's children that its forward calls one after the other, none of whose results goes elsewhere."""

    conv: str
    norm: str | None = None
    activation: str | None = None
    pointwise: str | None = None
    pointwise_norm: str | None = None
    pointwise_activation: str | None = None
    names: tuple[str, ...] = field(init=False)
    """Those that are there, in order."""
    depthwise_names: tuple[str, ...] = field(init=False)
    """Those of the depthwise half."""

    def __post_init__(self) -> None:
        first = (self.conv, self.norm, self.activation)
        second = (self.pointwise, self.pointwise_norm, self.pointwise_activation)
        for attribute, names in (("depthwise_names", first), ("names", (*first, *second))):
            object.__setattr__(self, attribute, tuple(name for name in names if name is not None))

    def depthwise_half(self) -> Chain:
        return Chain(self.conv, self.norm, self.activation)


def is_pointwise(module: nn.Module | None) -> bool:
    """Whether this is a plain 1x1 convolution."""
    return (
        module is not None
        and untouched(module, nn.Conv2d)
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
    )


def norm_parts(norm: nn.Module | None) -> tuple[bool, nn.Module | None]:
    """(whether ``norm`` is a batch norm that runs as its class says, the activation that it carries)."""
    if norm is not None and is_class(type(norm), NORM_WITH_ACTIVATION):
        drop, act = norm._modules["drop"], norm._modules["act"]
        plain = untouched(norm, type(norm)) and drop is not None and untouched(drop, nn.Identity)
        return plain, None if act is not None and untouched(act, nn.Identity) else act
    return norm is not None and untouched(norm, nn.BatchNorm2d, nn.SyncBatchNorm), None


def activation_name(module: nn.Module | None) -> str | None:
    return ACTIVATIONS[type(module)] if module is not None and untouched(module, *ACTIVATIONS) else None


class _Run:
    """A chain during one call of its owner's forward."""

    def __init__(self, owner: nn.Module, chain: Chain) -> None:
        self.chain = chain
        self.modules = owner._modules
        self.result: Tensor | None = None
        self.covered: tuple[str, ...] = ()  # whose work is in the result
        self.passed: tuple[str, ...] = ()  # who has been called with the result since

    def call(self, name: str, x: Any) -> Any:
        if name == self.chain.conv:
            self.passed = ()
            self.result = self._start(x)
            return self.result
        if name in self.covered:
            if x is self.result:
                self.passed = (*self.passed, name)
                return x
            if name not in (self.chain.activation, self.chain.pointwise_activation):
                raise self._changed()
        return self.modules[name](x)  # type: ignore[misc]

    def finish(self) -> None:
        for name in self.covered:
            if name not in self.passed:
                raise self._changed()

    def _changed(self) -> RuntimeError:
        names = ", ".join(self.chain.names)
        return RuntimeError(
            f"this module was fused as one that calls {names} in turn, and no longer does: call "
            "deeplab_kernels.fuse(model) again after changing how a model computes, or deeplab_kernels.unfuse(model)"
        )

    def _start(self, x: Any) -> Any:
        """The convolution and as much of the rest as is the same in one operator: names it in ``covered``."""
        conv, norm, activation = self._roles()
        self.covered = ()
        if not isinstance(conv, FusedConvolution) or not untouched(conv, conv._exactly) or _has_any_global_hook():
            return conv(x)  # type: ignore[misc]
        if not conv.takes(x, alone=False):
            # What calling it would come to, sooner: nobody watches, and alone it gains less.
            return conv._unfused.forward(conv, x) if isinstance(x, Tensor) else conv(x)
        last = activation_name(activation)
        padding = conv.sides(x)
        plain, carried = norm_parts(norm)
        own = activation_name(carried)
        if self.chain.pointwise is not None:
            unresolved = (activation is not None and last is None) or (carried is not None and own is None)
            if not unresolved and (norm is None or plain):
                out = self._whole(conv, norm, last if carried is None else own, x, padding)
                if out is not None:
                    return out
        half = self.chain.depthwise_names[1:]
        if self.chain.norm is None:
            if last is None:
                return conv(x)
            self.covered = half
            return conv_act(conv, last, x, padding)
        if not plain or norm is None or not fusable(norm, conv, x):
            return conv(x)
        self.covered = half if last is not None and carried is None else (self.chain.norm,)
        out = conv_norm_act(conv, norm, own if carried is not None else last, x, padding)
        return out if carried is None or own is not None else carried(out)

    def _whole(
        self, conv: FusedConvolution, norm: nn.Module | None, activation: str | None, x: Tensor, padding: Any
    ) -> Tensor | None:
        """Both halves in one operator, or None where that is not faster or not the same."""
        chain = self.chain
        pointwise, second, last = (
            None if name is None else self.modules.get(name)
            for name in (chain.pointwise, chain.pointwise_norm, chain.pointwise_activation)
        )
        if torch.jit.is_tracing():  # the trace would be another with gradients than without
            return None
        if not is_pointwise(pointwise) or pointwise.weight.dtype != x.dtype:  # type: ignore[union-attr]
            return None
        assert isinstance(pointwise, nn.Conv2d)
        plain, carried = norm_parts(second)
        own, name = activation_name(carried), activation_name(last)
        if (second is not None and not plain) or (last is not None and name is None) or (carried and not own):
            return None
        norms = [norm_parameters(n) for n in (norm, second)]
        tensors = [x, conv.weight, conv.bias, pointwise.weight, pointwise.bias]
        for n, parameters in zip((norm, second), norms, strict=True):
            if parameters is not None:
                if n.training or parameters.mean is None or parameters.var is None:  # type: ignore[union-attr]
                    return None
                tensors += [parameters.gamma, parameters.beta]
        if not picks_whole("auto", x, conv.weight, pointwise.out_channels, tensors):
            return None
        self.covered = chain.names[1:]
        return atrous_separable_conv2d(
            x,
            conv.weight,
            pointwise.weight,
            depthwise_norm=norms[0],
            pointwise_norm=norms[1],
            depthwise_bias=conv.bias,
            pointwise_bias=pointwise.bias,
            depthwise_activation=activation,
            pointwise_activation=name if carried is None else own,
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
        )

    def _roles(self) -> tuple[nn.Module | None, ...]:
        chain, modules = self.chain, self.modules
        norm = None if chain.norm is None else modules.get(chain.norm)
        return modules[chain.conv], norm, None if chain.activation is None else modules.get(chain.activation)


class _Link:
    """Stands for a child of a chain while its owner's forward runs."""

    def __init__(self, run: _Run, name: str) -> None:
        self._run = run
        self._name = name

    def __call__(self, x: Any) -> Any:
        return self._run.call(self._name, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run.modules[self._name], name)


class _Owner:
    """Stands for the owner as ``self`` of its forward: the children of chains are links, all else is the owner's."""

    def __init__(self, owner: nn.Module, links: dict[str, _Link]) -> None:
        self.__dict__.update(_owner=owner, _links=links)
        if not torch.compiler.is_compiling():  # sooner found here than by __getattr__
            self.__dict__.update(owner._modules)
            self.__dict__.update(links)

    def __getattr__(self, name: str) -> Any:
        links, owner = self.__dict__["_links"], self.__dict__["_owner"]
        if name in links:
            return links[name]
        for own in (owner._modules, owner.__dict__):  # sooner found than by nn.Module's __getattr__
            if name in own:
                return own[name]
        method = getattr(owner._unfused, name, None)
        if isinstance(method, types.FunctionType) and not _calls_super(method):
            return method.__get__(self)
        return getattr(owner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_owner"], name, value)
        self.__dict__.pop(name, None)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_owner"], name)
        self.__dict__.pop(name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_owner"](*args, **kwargs)


def _calls_super(function: Callable[..., Any]) -> bool:
    return "__class__" in function.__code__.co_freevars


class FusedOwner(Fused):
    """A module whose forward runs chains of its children, each as one operator."""

    _fused_chains: tuple[Chain, ...]
    _fused_inputs: tuple[int, ...]

    def _fused_links(self) -> tuple[list[_Run], dict[str, _Link]]:
        runs, links = [], {}
        for chain in self._fused_chains:
            run = _Run(self, chain)
            runs.append(run)
            for name in chain.names:
                links[name] = _Link(run, name)
        return runs, links

    def _fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if len(given) not in self._fused_inputs or (len(given) > 1 and any(value is None for value in given)):
            return self._unfused.forward(self, *args, **kwargs)  # type: ignore[operator]
        runs, links = self._fused_links()
        out = self._unfused.forward(_Owner(self, links), *args, **kwargs)  # type: ignore[arg-type]
        for run in runs:
            run.finish()
        return out


class FusedSequence(FusedOwner):
    """An ``nn.Sequential`` with chains."""

    def forward(self, x: Any) -> Any:
        _, links = self._fused_links()
        for name, module in self._modules.items():
            x = links[name](x) if name in links else module(x)  # type: ignore[misc]
        return x


def set_class(module: nn.Module, mixin: type[Fused]) -> None:
    module.__class__ = fused_class(mixin, unfused_class(module))


def restore_class(module: nn.Module) -> None:
    """Makes a fused module what it was."""
    if is_fused(module):
        module.__class__ = module._unfused  # type: ignore[assignment]
        for name in [n for n in module.__dict__ if n.startswith("_fused_")]:
            del module.__dict__[name]
