"""How other libraries name and store the parameters of the networks that exist here, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..system import SYMMETRIC, Normalization

State = dict[str, Tensor]
# (pattern that matches a whole name of theirs, our name: a template for re.Match.expand, a function of the match, or
# None for what has no place here and need not have one)
Rule = tuple[str, str | Callable[[re.Match[str]], str] | None]


@dataclass(frozen=True)
class Layout:
    """One kind of network in one library's state_dict.

    Args:
        origin: the library, as ``load_weights(origin=...)`` takes it.
        network: what it is, for people.
        marks: regular expressions; each matches a whole name of such a state_dict, and together of no other kind.
        rules: the first whose pattern matches a name tells our name.
        normalization: of the input that the weights were trained with.
        norm_eps: prefix of our module names -> epsilon of the batch normalisations there; the longest prefix counts.
        prefix: what of our model the weights are for: "backbone." or, with "", all of it.
        optional: regular expression of our names that a model may lack.
        classifier: our name of the last layer.
        fit: (our model, state_dict) -> our name -> (theirs, tensor), for what depends on the model's sizes.
        select: state_dict -> the part of it that is a network: drops what the optimiser kept, for instance.
        convert: (our name, tensor as stored) -> tensor as it is here.
        free: regular expression of our modules whose rates the library's users choose: the weights do not tell them.
        model: state_dict -> the name of the model here that computes the same function, and its options.
    """

    origin: str
    network: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    normalization: Normalization = SYMMETRIC
    norm_eps: Mapping[str, float] = field(default_factory=dict)
    prefix: str = ""
    optional: str = ""
    classifier: str = "classifier"
    free: str = ""
    fit: Callable[[nn.Module, State], dict[str, tuple[str, Tensor]]] = lambda model, state: {}
    select: Callable[[State], State] = lambda state: state
    convert: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    model: Callable[[State], tuple[str, dict[str, Any]]] | None = None

    def recognises(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(re.fullmatch(mark, name) for name in names) for mark in self.marks)

    def translate(self, model: nn.Module, state: State) -> Translation:
        result = Translation()
        patterns = [(re.compile(pattern), target) for pattern, target in self.rules]
        for name, tensor in self.select(state).items():
            for pattern, target in patterns:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                if target is None:
                    result.ignored.append(name)
                else:
                    ours = match.expand(target) if isinstance(target, str) else target(match)
                    result.theirs[ours] = name
                    result.tensors[ours] = self.convert(ours, tensor)
                break
            else:
                result.unknown.append(name)
        for ours, (theirs, tensor) in self.fit(model, state).items():
            result.theirs[ours], result.tensors[ours] = theirs, tensor
            if theirs in result.ignored:
                result.ignored.remove(theirs)
        return result

    def classes(self, state: State) -> int | None:
        """How many classes the last layer has; None for weights of a backbone."""
        if self.prefix:
            return None
        translation = self.translate(nn.Module(), {k: v for k, v in state.items() if v.dim() == 1})
        bias = translation.tensors.get(f"{self.classifier}.bias")
        return None if bias is None else len(bias)

    def eps_of(self, module_name: str) -> float | None:
        """The epsilon of our batch normalisation of that name; None where it stays as it is."""
        fitting = [prefix for prefix in self.norm_eps if module_name.startswith(prefix)]
        return self.norm_eps[max(fitting, key=len)] if fitting else None


@dataclass
class Translation:
    """tensors: by our names. theirs: our name -> theirs. ignored: names of theirs without a place here, as expected.
    unknown: names that no rule knows."""

    tensors: State = field(default_factory=dict)
    theirs: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def conv_norm(pattern: str, target: str, first: int = 0) -> tuple[Rule, Rule]:
    """Rules of a Sequential that has a convolution at ``first`` and its normalisation after it -> ``ConvNormAct``."""
    return (
        (rf"{pattern}\.{first}\.(?P<leaf>\w+)", rf"{target}.conv.\g<leaf>"),
        (rf"{pattern}\.{first + 1}\.(?P<leaf>\w+)", rf"{target}.norm.\g<leaf>"),
    )


def pooled_last(name: str, tensor: Tensor) -> Tensor:
    """torchvision and its descendants concatenate the image pooling of the ASPP last; here, as in the official code, it
    comes first."""
    if name != "aspp.project.conv.weight":
        return tensor
    channels = tensor.shape[0]
    return tensor.roll(channels, 1)


def depth(state: Iterable[str], pattern: str) -> int:
    """1 + the largest number that ``pattern``'s group finds among the names: how many units a stage has."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def resnet_name(state: Iterable[str], prefix: str = "") -> str:
    """ "resnet50" or "resnet101", by the units of the third stage."""
    units = depth(state, rf"{re.escape(prefix)}layer3\.(\d+)\.")
    return {6: "resnet50", 23: "resnet101"}.get(units, f"a ResNet with {units} units in its third stage")


def find(layouts: Sequence[Layout], state: State) -> Layout | None:
    """The first layout that recognises the names of ``state``."""
    return next((layout for layout in layouts if layout.recognises(state)), None)
