"""``python -m deeplab_kernels train``: trains a model on a dataset, into a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError

HELP = "train a model on a dataset; writes logs, checkpoints and a weights file for 'segment' and 'eval' into a folder"

# Name, kind ("toml" is a list or table) and description of every setting; a setting in a file has the same name.
SETTINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "what": (
        ("data", "str", "generated, voc:PATH, cityscapes:PATH, folder:PATH, or a path with one of these layouts"),
        ("train-split", "str", "part to train on (default: train; VOC with SBD: train_aug)"),
        ("val-split", "str", "part to validate on (default: val); '' for none"),
        ("model", "str", "name of the model (default: deeplabv3plus_small), see models.list_models()"),
        ("options", "toml", "its options, such as '{decoder = false}'"),
        ("init", "str", "pretrained weights: a file, a name, or a URL"),
        ("skip-classifier", "bool", "start the last layer afresh even where that of --init is for as many classes"),
        ("near-identity", "bool", "start depthwise kernels near the identity (default: for *_small without --init)"),
        ("crf", "bool", "a fully connected CRF as last stage: its weights and compatibility are trained, too"),
        ("crf-sigmas", "bool", "train the standard deviations of that CRF as well, which makes a step slower"),
        ("output", "str", "folder to write into (default: training)"),
    ),
    "schedule": (
        ("steps", "int", "updates of the weights"),
        ("stages", "toml", "instead of steps: '[{steps = 30000}, {steps = 10000, output_stride = 8, ...}]'"),
        ("learning-rate", "float", "at the start; it falls to 0 as (1 - s / S) ^ power"),
        ("power", "float", "of that schedule"),
        ("warmup-steps", "int", "in which the learning rate rises linearly"),
        ("head-multiplier", "float", "of the learning rate outside the backbone"),
        ("momentum", "float", "of SGD"),
        ("weight-decay", "float", "of the kernels of dense convolutions"),
        ("output-stride", "int", "8, 16 or 32"),
        ("freeze-batch-norm", "bool", "normalise by the moving averages and leave them as they are"),
        ("ema-decay", "float", "keep a moving average of the weights, validate and write that; 0 for none"),
        ("time-limit", "float", "seconds; the schedule is shortened if it would take longer"),
        ("seed", "int", "of weights, order, crops and dropout"),
    ),
    "samples": (
        ("batch-size", "int", "images of one pass in one process"),
        ("accumulation", "int", "passes that make one step"),
        ("crop", "int", "side of the square crops, pixels"),
        ("min-scale", "float", "smallest random scale"),
        ("max-scale", "float", "largest random scale"),
        ("flip", "float", "share of mirrored samples"),
        ("color-jitter", "float", "largest relative change of brightness, contrast and saturation"),
    ),
    "loss": (
        ("class-weights", "toml", "one number for each class, such as '[1, 2.5, 1]'"),
        ("hard-fraction", "float", "share of each image's pixels, the hardest, that count"),
        ("hard-steps", "int", "in which that share falls from all pixels to --hard-fraction"),
        ("auxiliary-weight", "float", "of the loss of a model's auxiliary heads"),
    ),
    "how": (
        ("precision", "str", "fp32, bf16 or fp16"),
        ("device", "str", "auto (default: cuda if there is one), cpu, cuda, cuda:1 ..."),
        ("workers", "int", "processes that prepare samples; the result is the same for any number (default: 2)"),
        ("threads", "int", "CPU threads (default: PyTorch's choice)"),
        ("channels-last", "bool", "channels_last memory format (default: yes, which is faster)"),
        ("compile", "bool", "run the model through torch.compile"),
        ("validate-every", "int", "steps between validations; 0 only at the end (default)"),
        ("checkpoint-every", "int", "steps between checkpoints (default: 500)"),
        ("tensorboard", "bool", "a log for TensorBoard, too"),
    ),
}
_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str, "toml": str}
_METAVARS = {"int": "N", "float": "X", "str": None, "toml": "TOML"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="TOML file of settings; options replace what it says")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object instead of text")
    for title, settings in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, kind, text in settings:
            if kind == "bool":
                group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
            else:
                group.add_argument(f"--{name}", type=_KINDS[kind], metavar=_METAVARS[kind], help=text)


def run(args: argparse.Namespace) -> int:
    from ..models.training.run import Interrupted
    from ..models.training.run import run as train
    from ..models.training.settings import run_config
    from .segment import device

    config = run_config(_values(args))
    if config.device != "auto":
        device(config.device)
    try:
        summary = train(config, resume=args.resume)
    except Interrupted as interruption:
        print(f"deeplab_kernels train: {interruption}", file=sys.stderr)
        return 128 + interruption.signal_number
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary, indent=2) if args.json else _text(summary))
    return 0


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the file, or of the run that is continued, and over them those of the command line."""
    from ..models.training.settings import parse_value, read_toml

    given: dict[str, Any] = {}
    for name, kind, _ in (setting for settings in SETTINGS.values() for setting in settings):
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            given[name.replace("-", "_")] = parse_value(f"--{name}", value) if kind == "toml" else value
    values = read_toml(args.config) if args.config is not None else {}
    if args.resume and args.config is None:
        continued = Path(given.get("output", "training")) / "config.toml"
        if not continued.exists() and "data" not in given:
            raise UserError(f"--resume: there is no {continued}, the settings of the run to continue")
        values = read_toml(continued) if continued.exists() else {}
    for one, other in (("steps", "stages"), ("stages", "steps")):
        if one in given and other not in given:
            values.pop(other, None)
    return {**values, **given}


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['model']} ({summary['parameters'] / 1e6:.2f} M parameters) on {summary['images']} images of "
        f"{summary['classes']} classes: {summary['steps_of_this_call']} steps in {summary['seconds']:.0f} s"
    ]
    if summary["loss"] is not None:
        lines.append(f"loss {summary['loss']:.4f} at step {summary['steps']}")
    best = summary["best"]
    if best.get("mean_iou") is not None:
        lines.append(
            f"validation: mean IoU {100 * best['mean_iou']:.2f} %, pixel accuracy {100 * best['pixel_accuracy']:.2f} % "
            f"at step {best['step']}"
        )
    return "\n".join([*lines, f"weights: {summary['weights']}"])
