"""``python -m deeplab_kernels madds``: the Multiply-Adds of the papers' table, and of any model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .._text import columns

HELP = "print the Multiply-Adds of DeepLab v3+ beside the paper's, or those of one model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list; counts are multiply-adds, not billions")
    parser.add_argument("--per-layer", action="store_true", help="also list every convolution at one scale")
    parser.add_argument(
        "--model", metavar="NAME", help="count this model instead of the paper's table (its name, see models.build)"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="with --model: height and width (default: 513)"
    )
    parser.add_argument("--output-stride", type=int, metavar="N", help="with --model: 8, 16 or 32 (default: 16)")
    parser.add_argument("--num-classes", type=int, metavar="K", help="with --model (default: 21)")


def run(args: argparse.Namespace) -> int:
    from ..errors import UserError

    if args.model is None:
        for option in ("size", "output_stride", "num_classes"):
            if getattr(args, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} needs --model: the table's models and sizes are the paper's"
                )
    if args.size is not None and len(args.size) > 2:
        raise UserError(f"--size takes one number or two (height width), got {len(args.size)}")
    for option, values in (("--size", args.size or ()), ("--num-classes", (args.num_classes,))):
        for value in values:
            if value is not None and value < 1:
                raise UserError(f"{option} must be at least 1, got {value}")
    rows = _table(args.per_layer) if args.model is None else [_model_row(args)]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.model is None:
        print(_render_table(rows))
    else:
        print(_render_model(rows[0]))
    if args.per_layer and not args.json:
        for row in rows:
            print("\n" + _render_layers(row))
    return 0


def _table(per_layer: bool) -> list[dict[str, Any]]:
    from ..models import build, paper_table

    rows = paper_table()
    if per_layer:
        for row in rows:
            options = {"decoder": row["decoder"], "separable": row["separable"]}
            model = build(row["model"], output_stride=row["eval_output_stride"], device="meta", **options)
            row["layers"] = _layers(model, row["input_size"])
    return rows


def _model_row(args: argparse.Namespace) -> dict[str, Any]:
    from ..models import build
    from ..models.madds import PAPER_SIZE, row
    from ..models.registry import checked_name

    checked_name(args.model, "--model")
    size = tuple(args.size) if args.size else (PAPER_SIZE,)
    options = {"num_classes": args.num_classes, "output_stride": args.output_stride}
    model = build(args.model, device="meta", **{k: v for k, v in options.items() if v is not None})
    result = row(model, args.model, size[0] if len(set(size)) == 1 else size)
    if args.per_layer:
        result["layers"] = _layers(model, result["input_size"])
    return result


def _layers(model: Any, size: int | Sequence[int]) -> list[dict[str, Any]]:
    from ..models import madds

    paper, true = (madds(model, size, convention, per_layer=True) for convention in ("paper", "true"))
    result = []
    for p, t in zip(paper, true, strict=True):
        layer = t._asdict()
        del layer["madds"]
        result.append({**layer, "madds_paper_convention": p.madds, "madds_true": t.madds})
    return result


def _billions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def _render_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["eval OS", "decoder", "SC", "paper", "recomputed", "off by", "true"]
    for scales in ("MS", "MS+flip"):
        header += [f"{scales} paper", "recomputed", "off by"]
    lines = [header]
    for row in rows:
        line = [str(row["eval_output_stride"]), "yes" if row["decoder"] else "-", "yes" if row["separable"] else "-"]
        for prefix in ("", "multi_scale_", "multi_scale_flip_"):
            paper, ours = row[f"{prefix}paper"], row[f"{prefix}madds_paper_convention"]
            line += [_billions(paper), _billions(ours), "-" if paper is None else f"{100 * (ours / paper - 1):+.2f} %"]
            if not prefix:
                line.append(_billions(row["madds_true"]))
        lines.append(line)
    return (
        f"Billions of Multiply-Adds: {rows[0]['model']}, 21 classes, {rows[0]['input_size']} pixels square\n\n"
        f"{columns(lines)}\n\n"
        "paper: table 5 of arXiv:1802.02611. recomputed: by its convention, the output grid of an atrous convolution\n"
        "rounded up to a multiple of the rate. true: without that rounding. MS: six scales, 0.5 to 1.75."
    )


def _render_model(row: dict[str, Any]) -> str:
    size = row["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (
        f"{row['model']}, output stride {row['eval_output_stride']}, {height} x {width}: "
        f"{row['madds_true']:,} Multiply-Adds ({row['madds_paper_convention']:,} by the paper's convention)"
    )


def _render_layers(row: dict[str, Any]) -> str:
    lines = [["layer", "output", "kernel", "stride", "rate", "groups", "millions", "paper's convention"]]
    for layer in row["layers"]:
        lines.append(
            [
                layer["name"],
                "x".join(map(str, layer["output_shape"][1:])),
                *("x".join(map(str, layer[key])) for key in ("kernel", "stride", "rate")),
                str(layer["groups"]),
                *(f"{layer[key] / 1e6:.1f}" for key in ("madds_true", "madds_paper_convention")),
            ]
        )
    title = f"output stride {row['eval_output_stride']}"
    title += f", {'with' if row['decoder'] else 'no'} decoder, {'with' if row['separable'] else 'no'} SC"
    return f"{title}\n{columns(lines)}"
