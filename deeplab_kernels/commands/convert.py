"""``python -m deeplab_kernels convert``: weights of other libraries -> a weights file of this package."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.weights.adopt import Adopted

HELP = "convert weights of torchvision, timm, TensorFlow and others into a file for 'segment', 'eval' and 'train'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="a known name, a file or an https URL")
    parser.add_argument("-o", "--output", type=Path, help="weights file to write (default: weights.pt)")
    parser.add_argument("--list", action="store_true", help="list the known names")
    parser.add_argument("--model", metavar="NAME", help="model to fill (default: the one that fits the weights)")
    parser.add_argument("--num-classes", type=int, metavar="K", help="default: that of the weights, or of the names")
    parser.add_argument(
        "--class-names", metavar="NAMES", help="voc, cityscapes, ade20k, or a text file with one name a line"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the model, such as output_stride=8 (may be repeated; the value in JSON)",
    )
    parser.add_argument("--origin", metavar="NAME", help="the library, where the names of the tensors do not tell it")
    parser.add_argument("--skip-classifier", action="store_true", help="take everything but the last layer")
    parser.add_argument("--sha256", metavar="HEX", help="checksum of the file, or its beginning")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of downloads (default: torch.hub's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    if args.source is None:
        raise UserError("give a source: a known name (--list), a file or an https URL")
    output = args.output or Path("weights.pt")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output must be a file in an existing folder, got {output}")
    if args.num_classes is not None and args.num_classes < 1:
        raise UserError(f"--num-classes must be at least 1, got {args.num_classes}")

    from ..models.data.classes import named_classes
    from ..models.registry import checked_name
    from ..models.weights import known_weights, save_weights_file
    from ..models.weights.adopt import adopt, class_names_of

    known = known_weights().get(args.source)
    classes = args.class_names or (known.classes if known and args.num_classes is None else "")
    names = named_classes(classes)[0] if classes else ()
    if names and args.num_classes not in (None, len(names)):
        raise UserError(f"--class-names has {len(names)} names, --num-classes is {args.num_classes}")
    if args.model is not None:
        checked_name(args.model, "--model")
    adopted = adopt(
        args.source,
        args.model,
        len(names) or args.num_classes,
        options=_options(args.option),
        origin=args.origin,
        skip_classifier=args.skip_classifier,
        cache=args.cache,
        sha256=args.sha256,
    )
    names, palette = class_names_of(adopted, classes)
    save_weights_file(
        output,
        adopted.model,
        name=adopted.name,
        class_names=names,
        palette=palette,
        options=adopted.options,
        notes={"source": args.source, "origin": adopted.report.origin, "network": adopted.report.network},
    )
    print(json.dumps(_summary(adopted, output), indent=2) if args.json else _text(adopted, names, output))
    return 0


def _options(items: list[str]) -> dict[str, Any]:
    options = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UserError(f"--option must be NAME=VALUE, got {item!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return options


def _summary(adopted: Adopted, output: Path) -> dict[str, Any]:
    report = adopted.report
    return {
        "source": report.source,
        "origin": report.origin,
        "network": report.network,
        "model": adopted.name,
        "options": adopted.options,
        "num_classes": adopted.model.num_classes,
        "loaded": len(report.matched) + len(report.renamed),
        "missing": report.missing,
        "ignored": report.ignored,
        "normalization": dataclasses.asdict(adopted.model.normalization),
        "output": str(output),
    }


def _text(adopted: Adopted, names: tuple[str, ...], output: Path) -> str:
    lines = [str(adopted.report)]
    options = ", ".join(f"{name}={value!r}" for name, value in adopted.options.items())
    lines.append(f"model:   {adopted.name}{f' ({options})' if options else ''}, {len(names)} classes")
    if adopted.report.missing:
        parts = sorted({name.partition(".")[0] for name in adopted.report.missing})
        lines.append(f"at random, to be trained: {', '.join(parts)}")
    return "\n".join([*lines, f"written: {output}"])


def _list(as_json: bool) -> int:
    from ..models.weights import known_weights

    known = known_weights()
    if as_json:
        print(json.dumps({name: entry._asdict() for name, entry in known.items()}, indent=2))
        return 0
    width = max(map(len, known))
    for name, entry in known.items():
        print(f"{name:<{width}}  {entry.classes or 'backbone':<10}  {entry.url}")
    return 0
