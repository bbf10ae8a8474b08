"""``python -m deeplab_kernels segment``: a label map for any image file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import _crf_options

HELP = "segment an image file with trained weights: label map, overlay and the share of each class"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", type=Path, help="an image file of any kind that Pillow reads, of any size")
    parser.add_argument("--weights", type=Path, required=True, help="weights file, such as demo/weights.pt")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="label map to write, a .png file or a folder (default: PHOTO-labels.png in the current folder); "
        "the overlay goes beside it",
    )
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="shrink a larger image to N pixels before it is segmented"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--crf", action="store_true", help="refine the scores by a dense CRF at the photo's resolution")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _crf_options.add_crf_arguments(parser, "crf-")


def run(args: argparse.Namespace) -> int:
    if args.max_side is not None and args.max_side < 1:
        raise UserError(f"--max-side must be at least 1, got {args.max_side}")
    if not args.crf and (unused := _crf_options.given(args, "crf-")):
        raise UserError(f"--crf-{next(iter(unused)).replace('_', '-')} needs --crf")
    labels_path, overlay_path = output_paths(args.photo, args.output)

    from tqdm import tqdm

    from ..models.data import read_image
    from ..models.segmenter import Segmenter

    crf = _crf_options.crf_parameters(args, "crf-") if args.crf else None
    image = read_image(args.photo)
    segmenter = Segmenter.from_file(args.weights, device(args.device))
    start = time.perf_counter()
    with (
        tqdm(desc="segmenting", unit="tile", disable=None, leave=False) as tiles,
        tqdm(desc="refining", unit="iteration", disable=None if crf else True, leave=False) as iterations,
    ):
        labels = segmenter(
            image, max_side=args.max_side, crf=crf, on_tile=shown_by(tiles), on_iteration=shown_by(iterations)
        )
    seconds = time.perf_counter() - start
    segmenter.colourise(labels).save(labels_path)
    segmenter.overlay(image, labels).save(overlay_path)

    shares = segmenter.shares(labels)
    if args.json:
        result = {
            "photo": str(args.photo),
            "width": labels.shape[1],
            "height": labels.shape[0],
            "seconds": round(seconds, 3),
            "labels": str(labels_path),
            "overlay": str(overlay_path),
            "classes": shares,
            "crf": dataclasses.asdict(crf) if crf else None,
        }
        print(json.dumps(result, indent=2))
    else:
        print(f"{args.photo}: {labels.shape[1]} x {labels.shape[0]} pixels, segmented in {seconds:.1f} s")
        for name, share in sorted(shares.items(), key=lambda item: -item[1]):
            if share > 0:
                print(f"  {name:<12} {100 * share:6.2f} %")
        print(f"labels:  {labels_path}\noverlay: {overlay_path}")
    return 0


def shown_by(bar: Any) -> Callable[[int, int], None]:
    """A callback (done, total) that moves the progress bar."""

    def on_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return on_progress


def device(name: str) -> str:
    """``name`` if torch can use it here; a UserError otherwise."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def output_paths(photo: Path, output: Path | None) -> tuple[Path, Path]:
    """(label map, overlay), in a folder that exists."""
    if output is None:
        labels = Path(f"{photo.stem}-labels.png")
    elif output.is_dir():
        labels = output / f"{photo.stem}-labels.png"
    elif output.suffix.lower() == ".png":
        labels = output
    else:
        raise UserError(f"--output must be a .png file or an existing folder, got {output}")
    if not labels.parent.is_dir():
        raise UserError(f"--output: there is no folder {labels.parent}")
    overlay = labels.with_name(f"{labels.stem.removesuffix('-labels')}-overlay.png")
    for path in (labels, overlay):
        if path.exists() and photo.exists() and path.samefile(photo):
            raise UserError(f"--output: {path} is the photo itself")
    return labels, overlay
