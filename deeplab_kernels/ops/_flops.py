"""FLOP formulas for ``torch.utils.flop_counter``, registered when that module is first imported.

Importing it here would import Triton, which takes longer than the rest of the package together.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

Formula = Callable[..., int]
_waiting: list[tuple[Any, Formula]] = []


def register_flop_formula(operator: Any) -> Callable[[Formula], Formula]:
    """As ``torch.utils.flop_counter.register_flop_formula``, at once only where that module is there already."""

    def register(formula: Formula) -> Formula:
        _waiting.append((operator, formula))
        if counter := sys.modules.get(COUNTER):
            _register_waiting(counter)
        elif _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        return formula

    return register


def _register_waiting(counter: ModuleType) -> None:
    while _waiting:
        operator, formula = _waiting.pop(0)
        counter.register_flop_formula(operator)(formula)


class _Loader(importlib.abc.Loader):
    """The module's own loader, and the formulas after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.meta_path.remove(_finder)
        _register_waiting(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of the counter."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()
