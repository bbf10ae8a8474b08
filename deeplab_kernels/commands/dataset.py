"""``python -m deeplab_kernels dataset``: writes the generated dataset, checks any dataset, adds SBD to PASCAL VOC."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "write the generated dataset into files, check a dataset, or add SBD's annotations to PASCAL VOC"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    write = actions.add_parser("write", help="draw scenes into a new folder, in PASCAL VOC's layout")
    write.add_argument("output", type=Path)
    write.add_argument("--train", type=int, default=400, metavar="N", help="scenes to train on (default: 400)")
    write.add_argument("--val", type=int, default=60, metavar="N", help="scenes to validate on (default: 60)")
    write.add_argument("--size", type=int, default=193, metavar="N", help="pixels of their sides (default: 193)")
    write.add_argument("--void", type=int, default=0, metavar="N", help="pixels beside boundaries that get label 255")
    write.add_argument("--seed", type=int, default=0, metavar="N")
    check = actions.add_parser("check", help="read every image and label map; report what is wrong, and the classes")
    check.add_argument("data", help="generated, voc:PATH, cityscapes:PATH, folder:PATH, or a path")
    check.add_argument("--split", default="train", help="train (default), val, train_aug ...")
    add = actions.add_parser("add-sbd", help="write SegmentationClassAug and train_aug.txt into PASCAL VOC's folder")
    add.add_argument("voc", type=Path, help="PASCAL VOC 2012")
    add.add_argument("sbd", type=Path, help="SBD, as unpacked: the folder with cls/*.mat, or one above")
    for action in (write, check, add):
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    result: dict[str, Any] = {"write": _write, "check": _check, "add-sbd": _add_sbd}[args.action](args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(_check_text(result) if args.action == "check" else [result["text"]]))
    return 2 if result.get("errors") else 0


def _write(args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from ..models.data import write_generated_dataset

    with tqdm(desc="drawing scenes", unit="scene", total=args.train + args.val, disable=None, leave=False) as bar:
        root = write_generated_dataset(
            args.output,
            train=args.train,
            val=args.val,
            size=args.size,
            seed=args.seed,
            void=args.void,
            on_scene=bar.update,
        )
    text = f"{root}: {args.train} scenes to train on, {args.val} to validate on; --data {root} takes them"
    return {"output": str(root), "train": args.train, "val": args.val, "text": text}


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from ..models.data import open_dataset
    from ..models.data.survey import survey

    dataset = open_dataset(args.data, args.split)
    with tqdm(desc="reading", unit="image", total=len(dataset), disable=None, leave=False) as bar:
        return {"data": args.data, "split": args.split, **survey(dataset, bar.update).summary(dataset)}


def _check_text(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['data']}, {result['split']}: {result['images']} images"]
    if result["smallest"] is not None:
        sizes = (f"{width} x {height}" for height, width in (result["smallest"], result["largest"]))
        lines[0] += f" of {' to '.join(sizes)} pixels, {100 * result['ignored']:.2f} % ignored"
    width = max(map(len, result["classes"]))
    for name, of_class in result["classes"].items():
        lines.append(f"  {name:<{width}}  {100 * of_class['share']:6.2f} %  in {of_class['images']} images")
    if result["errors"]:
        lines += [f"{len(result['errors'])} images cannot be used:", *(f"  {error}" for error in result["errors"])]
    return lines


def _add_sbd(args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from ..models.data import add_sbd
    from .segment import shown_by

    with tqdm(desc="label maps", unit="image", disable=None, leave=False) as bar:
        count = add_sbd(args.voc, args.sbd, on_image=shown_by(bar))
    return {"images": count, "text": f"{count} images in train_aug; --data {args.voc} --train-split train_aug"}
