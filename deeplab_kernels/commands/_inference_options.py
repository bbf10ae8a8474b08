"""How images are predicted, on the command line: alike for ``eval`` and ``segment``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import _crf_options

if TYPE_CHECKING:
    from ..models.refinement import CRFParameters


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, --model, --scales, --flip, --output-stride, --batch, --device, --crf and its parameters."""
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SOURCE",
        help="weights file of this package, such as demo/weights.pt; or another library's: a file, URL or name "
        "('convert --list' lists the names)",
    )
    parser.add_argument("--model", metavar="NAME", help="the model that --weights are for, where they do not tell it")
    group = parser.add_argument_group("prediction")
    group.add_argument(
        "--scales",
        metavar="S,S,...",
        help="average over the image enlarged by these; 'ms' is 0.5,0.75,1,1.25,1.5,1.75, the papers' (default: 1)",
    )
    group.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    group.add_argument(
        "--output-stride", type=int, metavar="N", help="of the network, finer or coarser than it was trained with"
    )
    group.add_argument("--batch", type=int, default=1, metavar="N", help="images of one size, or windows, at once")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument("--crf", action="store_true", help="refine the scores by a dense CRF at the image's resolution")
    _crf_options.add_crf_arguments(parser, "crf-")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what is senseless, before anything is imported or loaded."""
    for name in ("batch", "output_stride", "window"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.crf and (unused := _crf_options.given(args, "crf-")):
        raise UserError(f"--crf-{next(iter(unused)).replace('_', '-')} needs --crf")
    scales(args)


def model(args: argparse.Namespace) -> str | None:
    """The name that --model gives, if any."""
    from ..models.registry import checked_name

    return None if args.model is None else checked_name(args.model, "--model")


def scales(args: argparse.Namespace) -> tuple[float, ...]:
    if args.scales is None:
        return (1.0,)
    if args.scales == "ms":
        from ..models.inference import PAPER_SCALES

        return PAPER_SCALES
    try:
        values = tuple(float(word) for word in args.scales.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 16 for value in values):
        raise UserError(f"--scales must be 'ms' or numbers above 0 and up to 16 with commas, got {args.scales!r}")
    return values


def crf(args: argparse.Namespace) -> CRFParameters | None:
    return _crf_options.crf_parameters(args, "crf-") if args.crf else None


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The given ones, by the names of ``Inference``, but for the CRF and the window."""
    return {
        "scales": scales(args),
        "flip": args.flip,
        "output_stride": args.output_stride,
        "batch_size": args.batch,
    }
