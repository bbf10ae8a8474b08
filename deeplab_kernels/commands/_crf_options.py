"""The CRF's parameters on the command line, alike for ``refine`` and ``segment --crf``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.refinement import CRFParameters

_FILTERS = ("permutohedral", "exact", "local")
_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("appearance-weight", float, "weight of the appearance kernel (positions and colours), 0 for none (default: 10)"),
    ("appearance-sigma", float, "its standard deviation in pixels (default: 80)"),
    ("color-sigma", float, "its standard deviation in colour, of 0..255 (default: 13)"),
    ("smoothness-weight", float, "weight of the smoothness kernel (positions alone), 0 for none (default: 3)"),
    ("smoothness-sigma", float, "its standard deviation in pixels (default: 3)"),
    ("iterations", int, "mean-field iterations (default: 10)"),
    ("window", int, "pixels to each side that the local filter sees (default: 5)"),
)
_FILTER_HELP = (
    "permutohedral (default): linear in the number of pixels; exact: the same sums without approximation, quadratic; "
    "local: cut off outside a window, a short-range CRF"
)


def add_crf_arguments(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Adds --appearance-weight, ..., --filter, each with ``prefix`` before its name."""
    group = parser.add_argument_group("parameters of the CRF")
    for name, kind, text in _OPTIONS:
        group.add_argument(f"--{prefix}{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument(f"--{prefix}filter", choices=_FILTERS, help=_FILTER_HELP)


def given(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The parameters that were given, by the names of CRFParameters."""
    names = [name for name, _, _ in _OPTIONS] + ["filter"]
    values = {name.replace("-", "_"): getattr(args, f"{prefix}{name}".replace("-", "_")) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def crf_parameters(args: argparse.Namespace, prefix: str = "") -> CRFParameters:
    """The parameters; errors name the option."""
    from ..models.refinement import CRFParameters

    try:
        return CRFParameters(**given(args, prefix))
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UserError(f"--{prefix}{name.replace('_', '-')} {rest}") from None
