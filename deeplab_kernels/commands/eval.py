"""``python -m deeplab_kernels eval``: how good a network is on a dataset."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._text import columns
from ..errors import UserError
from . import _inference_options

if TYPE_CHECKING:
    from ..models.data import Dataset, Scene
    from ..models.evaluation import Evaluation
    from ..models.evaluation.pictures import Segmented

HELP = "evaluate trained weights on a dataset: IoU of each class, at boundaries, before and after a CRF"

_SHOWN_WIDTHS = (1, 2, 3, 5, 10, 20, 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="generated, voc:PATH, cityscapes:PATH, folder:PATH, or the path of a folder with one of these layouts",
    )
    parser.add_argument("--split", default="val", help="part of the dataset (default: val)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--window", type=int, metavar="N", help="cut images into windows of this side (default: each as a whole)"
    )
    parser.add_argument(
        "--trimap", type=int, default=40, metavar="B", help="mean IoU within 1 to B pixels of boundaries (default: 40)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for results.json, plots, and pictures of errors"
    )
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="with -o: pictures of the N worst images")
    parser.add_argument(
        "--save-predictions",
        action="store_true",
        help="with -o: every label map, as a palette PNG; in PASCAL VOC's form for submission if the dataset is VOC",
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of a table")
    _inference_options.add_inference_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _inference_options.check(args)
    for name, least in (("limit", 1), ("trimap", 0), ("worst", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if args.save_predictions and args.output is None:
        raise UserError("--save-predictions needs --output")

    import numpy as np
    from tqdm import tqdm

    from ..models.data import open_dataset
    from ..models.evaluation import evaluate
    from ..models.evaluation.evaluate import name_of
    from ..models.evaluation.pictures import WorstImages
    from ..models.inference import Inference
    from ..models.segmenter import colourise
    from .segment import save_png

    inference = Inference(window=args.window, crf=_inference_options.crf(args), **_inference_options.settings(args))
    dataset: Dataset = open_dataset(args.data, args.split)
    classes = len(dataset.class_names)
    model = _model(args, dataset.class_names)
    palette = np.array(dataset.palette, np.uint8)
    scenes = dataset if args.limit is None else First(dataset, args.limit)
    folder = None if args.output is None else _made(args.output)
    predictions = _made(folder / _predictions_folder(dataset, args.split)) if folder and args.save_predictions else None
    worst = WorstImages(args.worst if folder else 0, classes)

    def on_image(index: int, scene: Scene, labels: Any) -> None:
        worst.add(index, scene, labels.final)
        if predictions is not None:
            save_png(colourise(labels.final, palette), predictions / f"{name_of(scenes, index)}.png")

    start = time.perf_counter()
    with tqdm(total=len(scenes), desc="evaluating", unit="image", disable=None, leave=False) as bar:
        evaluation = evaluate(
            model,
            scenes,
            classes,
            inference,
            trimap_widths=range(1, args.trimap + 1),
            on_batch=bar.update,
            on_image=on_image,
        )
    results: dict[str, Any] = {
        "weights": str(args.weights),
        "model": args.model or type(model).__name__,
        "data": str(args.data),
        "split": args.split,
        "images": evaluation.images,
        "seconds": round(time.perf_counter() - start, 2),
        "inference": dataclasses.asdict(inference),
        "stages": {name: stage.summary(dataset.class_names) for name, stage in evaluation.stages().items()},
    }
    if folder is not None:
        named = [(name_of(scenes, item.position), item) for item in worst.worst_first()]
        results["worst"] = _write_pictures(folder, named, dataset.palette)
        _write(folder, results, evaluation, dataset.class_names)
    print(json.dumps(results, indent=2) if args.json else render(results))
    return 0


class First:
    """The first items of a dataset."""

    def __init__(self, dataset: Dataset, length: int) -> None:
        self._dataset, self._length = dataset, min(length, len(dataset))
        if (names := getattr(dataset, "names", None)) is not None:
            self.names = names

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} images")
        return self._dataset[index]


def _model(args: argparse.Namespace, class_names: Sequence[str]) -> Any:
    """The network with its weights, on the device; its classes are the dataset's."""
    from ..models.weights.adopt import adopt, check_complete
    from .segment import device

    adopted = adopt(args.weights, _inference_options.model(args))
    check_complete(adopted)
    if adopted.model.num_classes != len(class_names):
        raise UserError(
            f"{args.weights}: has {adopted.model.num_classes} classes, but {args.data} has {len(class_names)} "
            f"({', '.join(class_names[:3])} ...)"
        )
    names = adopted.content["class_names"] if adopted.content else class_names
    if list(names) != list(class_names):
        differing = next((a, b) for a, b in zip(names, class_names, strict=True) if a != b)
        print(
            f"note: the weights call a class {differing[0]!r} that the dataset calls {differing[1]!r}; "
            "classes are taken in their order",
            file=sys.stderr,
        )
    return adopted.model.to(device(args.device))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output: {folder} is, or lies in, a file, not a folder") from None
    return folder


def _predictions_folder(dataset: Dataset, split: str) -> Path:
    from ..models.data import PascalVOC

    if isinstance(dataset, PascalVOC):
        return Path("results", "VOC2012", "Segmentation", f"comp6_{split}_cls")
    return Path("predictions")


def _write_pictures(
    folder: Path, worst: Sequence[tuple[str, Segmented]], palette: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    from ..models.evaluation.pictures import boundary_picture

    out = []
    for rank, (name, item) in enumerate(worst, 1):
        path = folder / f"worst-{rank:02d}-{name}.png"
        path.write_bytes(boundary_picture(item.scene, item.labels, palette))
        out.append({"image": name, "mean_iou": item.mean_iou, "picture": path.name})
    return out


def _write(folder: Path, results: dict[str, Any], evaluation: Evaluation, class_names: Sequence[str]) -> None:
    from ..models.evaluation import plots

    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.txt").write_text(render(results) + "\n", encoding="utf-8")
    if not plots.available():
        print("no plots: they need matplotlib; pip install 'deeplab_kernels[eval]'", file=sys.stderr)
        return
    stages = evaluation.stages()
    plots.plot_iou(folder / "iou.png", stages, class_names)
    plots.plot_confusion(folder / "confusion.png", evaluation.final, class_names)
    if evaluation.trimap.widths:
        plots.plot_trimap(folder / "trimap.png", stages)


def render(results: dict[str, Any]) -> str:
    """The table."""
    stages = results["stages"]
    first = next(iter(stages.values()))
    rows = [["IoU, %", *stages]]
    rows += [[name, *(_percent(stage["iou"][name]) for stage in stages.values())] for name in first["iou"]]
    for key, title in (
        ("mean_iou", "mean IoU"),
        ("frequency_weighted_iou", "frequency-weighted IoU"),
        ("pixel_accuracy", "pixel accuracy"),
    ):
        rows.append([title, *(_percent(stage[key]) for stage in stages.values())])
    widths = first["trimap"]["widths"]
    for n, width in enumerate(widths):
        if width in _SHOWN_WIDTHS or n == len(widths) - 1:
            values = (_percent(stage["trimap"]["mean_iou"][n]) for stage in stages.values())
            rows.append([f"mean IoU within {width} px of boundaries", *values])
    seconds, images = results["seconds"], results["images"]
    return f"{columns(rows)}\n{images} images of {results['data']} ({results['split']}) in {seconds:.1f} s"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
