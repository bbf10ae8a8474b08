"""``python -m deeplab_kernels refine``: an annotation or a score map that follows the photograph's edges."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import _crf_options
from .segment import device, shown_by

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..models.data import LabelMap

HELP = "refine a coarse annotation or a score map with its photograph, by a fully connected CRF"

_MOST_LABELS = 64  # more distinct values than this, and no --classes: it is probably no label map


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", type=Path, help="an image file of any kind that Pillow reads, of any size")
    parser.add_argument(
        "annotation",
        type=Path,
        help="a label map (a palette or grey image whose pixel values are the labels, or integers (H, W) in a .npy "
        "file), or scores: probabilities or logits (L, H, W) in a .npy file. If smaller or larger than the photo it is "
        "resized",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="label map to write, a .png file or a folder (default: PHOTO-refined.png in the current folder); "
        "an overlay and a comparison of before and after go beside it",
    )
    parser.add_argument(
        "--void", metavar="N", default="255", help="label of unknown pixels, or 'none' (default: 255); they are filled"
    )
    parser.add_argument(
        "--keep-void", action="store_true", help="leave unknown pixels unknown in the output; they help nevertheless"
    )
    parser.add_argument("--classes", type=int, metavar="N", help="check that there are N classes: labels 0 to N - 1")
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="probability that a pixel's annotation is right, for label maps (default: 0.7)",
    )
    parser.add_argument(
        "--scores", choices=("auto", "probabilities", "logits"), help="what the scores are (default: auto)"
    )
    parser.add_argument("--palette", type=Path, metavar="FILE", help="a palette image whose colours the output takes")
    parser.add_argument(
        "--probabilities", type=Path, metavar="FILE", help="write the refined probabilities, too (.npy)"
    )
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="refine at this size at most, and enlarge the probabilities"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _crf_options.add_crf_arguments(parser)


def run(args: argparse.Namespace) -> int:
    void = _void(args.void)
    for name, least in (("max_side", 1), ("classes", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.confidence is not None and not 0 < args.confidence < 1:
        raise UserError(f"--confidence must be between 0 and 1, got {args.confidence}")
    target, overlay_path, comparison_path = output_paths(args)
    where = device(args.device)

    import numpy as np
    from tqdm import tqdm

    from ..models import refinement
    from ..models.data import LabelMap, read_annotation, read_image, voc_palette
    from ..models.segmenter import overlay, shrunk

    parameters = _crf_options.crf_parameters(args)
    image = read_image(args.photo)
    annotation = read_annotation(args.annotation)
    palette = None if args.palette is None else _palette(args.palette)
    size = image.shape[:2]
    small = shrunk(image, args.max_side)
    bar = tqdm(desc="refining", unit="iteration", disable=None, leave=False)

    def refined(energy: NDArray[np.float32]) -> NDArray[np.float32]:
        with bar:
            return refinement.refine(small, energy, parameters, device=where, on_iteration=shown_by(bar))

    start = time.perf_counter()
    probabilities: NDArray[np.float32] | None = None
    filled = 0.0
    if isinstance(annotation, LabelMap):
        if args.scores is not None:
            raise UserError("--scores is for score maps, but the annotation is a label map")
        before = _fitted(annotation, size, args.annotation)
        if palette is not None:
            before = LabelMap(before.labels, palette)
        values = _values(before, void, args)
        unknown = before.labels == void if void is not None else np.zeros(size, bool)
        after = before.labels.copy()
        filled = 0.0 if args.keep_void else float(unknown.mean())
        if len(values) > 1:
            refinement.check_memory(len(values), *small.shape[:2], parameters)
            seen = resize_labels(before.labels, small.shape[:2])
            confidence = 0.7 if args.confidence is None else args.confidence
            probabilities = refined(refinement.energy_of_labels(seen, values, void, confidence))
            after = np.asarray(values)[refinement.most_probable(probabilities, size)].astype(before.labels.dtype)
        if args.keep_void:
            after[unknown] = before.labels[unknown]
        changed = float((after != before.labels)[~unknown].mean()) if not unknown.all() else 0.0
        result = before.with_labels(after)
    else:
        if args.confidence is not None or args.keep_void:
            option = "--confidence" if args.confidence is not None else "--keep-void"
            raise UserError(f"{option} is for label maps, but the annotation is a score map")
        if args.classes is not None and len(annotation) != args.classes:
            raise UserError(f"{args.annotation}: scores of {len(annotation)} labels, but --classes is {args.classes}")
        refinement.check_memory(len(annotation), *small.shape[:2], parameters)
        try:
            energy = refinement.energy_of_scores(annotation, small.shape[:2], args.scores or "auto")
        except UserError as error:
            raise UserError(f"{args.annotation}: {error}") from None
        values = list(range(len(annotation)))
        colours = voc_palette() if palette is None and len(values) <= 256 else palette
        kind = np.uint8 if len(values) <= 256 else np.uint16
        before = LabelMap(refinement.most_probable(-energy, size).astype(kind), colours)
        probabilities = refined(energy)
        result = before.with_labels(refinement.most_probable(probabilities, size).astype(kind))
        changed = float((before.labels != result.labels).mean())
    seconds = time.perf_counter() - start

    if result.palette is not None and result.labels.max() > 255:
        result = LabelMap(result.labels)
    result.to_image().save(target)
    colours_of = result.colours()
    overlay(image, result.labels, colours_of).save(overlay_path)
    comparison(image, before.labels, result.labels, colours_of, void).save(comparison_path)
    if args.probabilities is not None:
        if probabilities is None:
            probabilities = np.ones((1, *small.shape[:2]), np.float32)
        with args.probabilities.open("wb") as file:  # np.save(path) would append .npy to other names
            np.save(file, np.ascontiguousarray(probabilities))

    labels, counts = np.unique(result.labels, return_counts=True)
    shares = {int(label): int(count) / result.labels.size for label, count in zip(labels, counts, strict=True)}
    summary: dict[str, Any] = {
        "photo": str(args.photo),
        "annotation": str(args.annotation),
        "width": size[1],
        "height": size[0],
        "labels": len(values),
        "seconds": round(seconds, 3),
        "changed": changed,
        "filled": filled,
        "shares": shares,
        "refined": str(target),
        "overlay": str(overlay_path),
        "comparison": str(comparison_path),
        "parameters": dataclasses.asdict(parameters),
    }
    print(json.dumps(summary, indent=2) if args.json else _text(summary))
    return 0


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['photo']}: {summary['width']} x {summary['height']} pixels, {summary['labels']} labels, "
        f"refined in {summary['seconds']:.1f} s",
        f"  changed {100 * summary['changed']:.2f} % of the annotated pixels, "
        f"filled {100 * summary['filled']:.2f} % of all",
    ]
    lines += [f"  label {label:<5} {100 * share:6.2f} %" for label, share in summary["shares"].items()]
    lines += [f"{name + ':':<12}{summary[name]}" for name in ("refined", "overlay", "comparison")]
    return "\n".join(lines)


def _void(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise UserError(f"--void must be a label from 0 to 65535 or 'none', got {text!r}")
    return int(text)


def output_paths(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """(label map, overlay, comparison), in a folder that exists; none of them is one of the inputs."""
    output: Path | None = args.output
    if output is None:
        target = Path(f"{args.photo.stem}-refined.png")
    elif output.is_dir():
        target = output / f"{args.photo.stem}-refined.png"
    elif output.suffix.lower() == ".png":
        target = output
    else:
        raise UserError(f"--output must be a .png file or an existing folder, got {output}")
    paths = (
        target,
        target.with_name(f"{target.stem}-overlay.png"),
        target.with_name(f"{target.stem}-comparison.png"),
    )
    written = [("--output", path) for path in paths]
    if args.probabilities is not None:
        written.append(("--probabilities", args.probabilities))
    for option, path in written:
        if not path.parent.is_dir():
            raise UserError(f"{option}: there is no folder {path.parent}")
        for what, given in (("photo", args.photo), ("annotation", args.annotation), ("palette", args.palette)):
            if given is not None and path.exists() and given.exists() and path.samefile(given):
                raise UserError(f"{option}: {path} is the {what} itself")
    if args.probabilities is not None and args.probabilities.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"--probabilities: {args.probabilities} is a picture to be written")
    return paths


def _palette(path: Path) -> NDArray[np.uint8]:
    from ..models.data import LabelMap, read_annotation

    annotation = read_annotation(path)
    if not isinstance(annotation, LabelMap) or annotation.palette is None:
        raise UserError(f"--palette: {path} has no palette")
    return annotation.palette


def _fitted(annotation: LabelMap, size: tuple[int, int], path: Path) -> LabelMap:
    """The annotation in the photograph's size."""
    from ..models.refinement import same_aspect

    height, width = annotation.labels.shape
    if not same_aspect((height, width), size):
        raise UserError(f"{path}: {width} x {height} pixels do not fit a photograph of {size[1]} x {size[0]}")
    return annotation.with_labels(resize_labels(annotation.labels, size))


def _values(annotation: LabelMap, void: int | None, args: argparse.Namespace) -> list[int]:
    """The labels that occur."""
    import numpy as np

    occurring = [int(value) for value in np.unique(annotation.labels)]
    values = [value for value in occurring if value != void]
    if not values:
        raise UserError(f"{args.annotation}: every pixel is unknown (label {void}), so there is nothing to refine")
    if args.classes is not None and values[-1] >= args.classes:
        raise UserError(
            f"{args.annotation}: has label {values[-1]}, but --classes {args.classes} allows 0 to {args.classes - 1}"
            + ("" if void is None else f" and {void} for unknown")
        )
    if args.classes is None and len(values) > _MOST_LABELS:
        raise UserError(
            f"{args.annotation}: {len(values)} different values, which looks like a picture and no label map; "
            "--classes N says that it is one"
        )
    if len(values) == 1 and len(occurring) > 1:
        raise UserError(
            f"{args.annotation}: only label {values[0]} occurs beside the unknown pixels ({void}), so there is nothing "
            f"to refine; if {void} is a label here, use --void none"
        )
    return values


def resize_labels(labels: NDArray[np.integer[Any]], size: tuple[int, int]) -> NDArray[np.integer[Any]]:
    """(h, w) -> (H, W), each pixel from the nearest pixel centre."""
    import numpy as np

    if labels.shape == size:
        return labels
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, size, strict=True))
    return labels[rows[:, None], columns]


def comparison(
    image: NDArray[np.uint8],
    before: NDArray[np.integer[Any]],
    after: NDArray[np.integer[Any]],
    colours: NDArray[np.uint8],
    void: int | None = None,
    *,
    longest: int = 900,
) -> Any:
    """A picture of the photograph, the labels before, the labels after, and the photograph tinted by the latter; side
    by side, or one below the other where the photograph is wide. Unknown pixels are grey. ``longest``: pixels of a
    panel's longer side at most."""
    import numpy as np
    from PIL import Image

    from ..models.segmenter import overlay

    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))
    maps = [resize_labels(labels, size) for labels in (before, after)]
    coloured = [colours[labels] for labels in maps]
    for labels, panel in zip(maps, coloured, strict=True):
        if void is not None:
            panel[labels == void] = 128
    panels = [small, *coloured, np.asarray(overlay(small, maps[1], colours))]
    gap, across = 6, 1 if width > 2 * height else 0
    step = size[0] + gap if across else size[1] + gap
    shape = (4 * step - gap, size[1]) if across else (size[0], 4 * step - gap)
    canvas = np.full((*shape, 3), 255, np.uint8)
    for position, panel in enumerate(panels):
        along = slice(position * step, position * step + (size[0] if across else size[1]))
        if across:
            canvas[along] = panel
        else:
            canvas[:, along] = panel
    return Image.fromarray(canvas)
