"""The parts of the demo in their order: draw, train, evaluate, segment photographs, count, time, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import info
from ..errors import UserError
from ..models import build, madds, paper_table
from ..models.data import Scene, SceneDataset, read_image
from ..models.evaluation import ConfusionMatrix, evaluate
from ..models.segmenter import Segmenter
from ..models.training import TrainingConfig, start_near_identity, train
from ..models.weights import save_weights_file
from . import checkerboard, crf, speed
from .photographs import Photograph, bundled
from .pictures import mistakes, side_by_side
from .report import render
from .results import Figure, Results

MODEL = "deeplabv3plus_small"
_SHOWN_SCENES = 6
_SHOWN_REFINED = 3
_VALIDATION_SEED = 1_000_003  # added to the seed: far from those of the other scenes
_PHOTOGRAPH_SIDE = (
    512  # larger photographs are shrunk to it, so that things have about the size they have in the scenes
)


@dataclass(frozen=True)
class Settings:
    """How much is done. scene_size, crop: pixels; time_limit: seconds of training."""

    train_scenes: int = 400
    test_scenes: int = 60
    scene_size: int = 193
    output_stride: int = 8
    steps: int = 2000
    batch_size: int = 4
    crop: int = 97
    learning_rate: float = 0.2
    time_limit: float = 175.0
    layers: tuple[speed.Layer, ...] = speed.LAYERS
    rounds: int = 9
    multi_scale: bool = True
    validation_scenes: int = 12  # on which the CRFs' parameters are chosen
    candidates: crf.Candidates = field(default_factory=lambda: crf.FULL)


FULL = Settings()
QUICK = Settings(
    train_scenes=24,
    test_scenes=6,
    steps=12,
    batch_size=4,
    crop=97,
    time_limit=10.0,
    layers=speed.QUICK_LAYERS,
    rounds=3,
    multi_scale=False,
    validation_scenes=2,
    candidates=crf.QUICK,
)


def run(
    output: Path, *, seed: int, settings: Settings, photographs: Sequence[Photograph], command: str, quick: bool
) -> Results:
    """Does everything and writes it into the folder ``output``; returns what the report tells."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--output: {output} is a file, not a folder") from None
    speed.keep_freed_memory()
    seconds: dict[str, float] = {}

    with _timed(seconds, "drawing scenes"):
        train_scenes = _draw(settings.train_scenes, settings.scene_size, 2 * seed, "drawing scenes")
        test_scenes = _draw(settings.test_scenes, settings.scene_size, 2 * seed + 1, "drawing unseen scenes")

    class_names, palette = SceneDataset.class_names, np.array(SceneDataset.palette, np.uint8)
    torch.manual_seed(seed)
    model = build(MODEL, len(class_names), settings.output_stride).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_near_identity(model)
    results = Results(
        command=command,
        seed=seed,
        quick=quick,
        model=MODEL,
        parameters=sum(p.numel() for p in model.parameters()),
        class_names=class_names,
        palette=SceneDataset.palette,
        train_scenes=len(train_scenes),
        crop=settings.crop,
        batch_size=settings.batch_size,
        planned_steps=settings.steps,
        scene_size=settings.scene_size,
        test_scenes=len(test_scenes),
        seconds=seconds,
        machine=_machine(),
    )

    with _timed(seconds, "training"), _bar(settings.steps, "training", "step") as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update(step - bar.n)

        config = TrainingConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            crop=settings.crop,
            learning_rate=settings.learning_rate,
            seed=seed,
            time_limit=settings.time_limit,
        )
        results.losses = train(model, train_scenes, config, on_step=on_step).losses

    with (
        _timed(seconds, "segmenting unseen scenes"),
        _bar(len(test_scenes), "segmenting unseen scenes", "scene") as bar,
    ):
        predictions: list[Any] = []
        matrix = evaluate(
            model,
            test_scenes,
            len(class_names),
            on_batch=bar.update,
            on_image=lambda index, scene, labels: predictions.append(labels.final),
        ).matrix
    results.iou = [float(value) for value in matrix.iou()]
    results.mean_iou, results.pixel_accuracy = matrix.mean_iou(), matrix.pixel_accuracy()
    results.background_only = _background_only(matrix)
    notes = {"mean_iou": results.mean_iou, "seed": seed, "steps": len(results.losses)}
    save_weights_file(
        output / "weights.pt",
        model,
        name=MODEL,
        class_names=class_names,
        palette=SceneDataset.palette,
        options={"output_stride": settings.output_stride},
        notes=notes,
    )

    with _timed(seconds, "pictures and photographs"):
        for index, (scene, prediction) in enumerate(zip(test_scenes, predictions, strict=True)):
            if index == _SHOWN_SCENES:
                break
            wrong = mistakes(scene.image, scene.labels, prediction)
            png = side_by_side([scene.image, palette[scene.labels], palette[prediction], wrong])
            (output / f"scene-{index + 1}.png").write_bytes(png)
            share = f"{100 * np.mean(scene.labels == prediction):.1f} % of the pixels right"
            results.scenes.append(Figure(png, f"Scene {index + 1}: {share}.", f"Unseen scene {index + 1}"))
        segmenter = Segmenter.from_file(output / "weights.pt")
        for photograph in tqdm(photographs, desc="photographs", disable=None):
            results.photographs.append(_photograph(segmenter, photograph, palette, output))

    _refine(results, segmenter, test_scenes, photographs, settings, seed, output)

    with _timed(seconds, "counting multiply-adds"):
        results.model_madds = int(madds(model, settings.crop))
        results.madds = paper_table(multi_scale=settings.multi_scale)

    results.upsampling = checkerboard.figure(seed)
    (output / "checkerboard.png").write_bytes(results.upsampling.png)

    total = 4 * len(settings.layers)
    with _timed(seconds, "timing operators"), _bar(total, "timing operators", "row") as bar:
        results.speed = speed.measure(settings.layers, rounds=settings.rounds, on_row=bar.update)

    (output / "report.html").write_text(render(results), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results.summary(), indent=2) + "\n", encoding="utf-8")
    return results


def _refine(
    results: Results,
    segmenter: Segmenter,
    scenes: Sequence[Scene],
    photographs: Sequence[Photograph],
    settings: Settings,
    seed: int,
    output: Path,
) -> None:
    """The CRF: coarse annotations, the comparison on unseen scenes, and what it makes of the scores."""
    candidates = settings.candidates
    with _timed(results.seconds, "refining by CRFs"):
        validation = _draw(
            settings.validation_scenes, settings.scene_size, _VALIDATION_SEED + 2 * seed, "drawing validation scenes"
        )
        for photograph in bundled(tuple(crf.COARSE)):
            name = photograph.path.stem
            png, changed = crf.refine_annotation(photograph)
            (output / f"annotation-{name}.png").write_bytes(png)
            caption = f"{crf.COARSE[name].caption} {100 * changed:.1f} % of the annotated pixels changed."
            results.annotations.append(Figure(png, caption, f"{name}: annotation before and after refinement"))
        total = crf.refinements(candidates, len(scenes), len(validation))
        with _bar(total, "refining by CRFs", "image") as bar:
            comparison = results.crf = crf.compare(segmenter, scenes, validation, candidates, bar.update)
        short = comparison.rows[2].parameters
        assert short is not None
        for index, scene in enumerate(scenes[:_SHOWN_REFINED]):
            pngs = crf.scene_pictures(segmenter, scene, short, comparison.chosen)
            for png, what in zip(pngs, ("labels", "probabilities"), strict=True):
                (output / f"scene-{index + 1}-crf-{what}.png").write_bytes(png)
                caption = f"Scene {index + 1}: " + (what if what == "labels" else "probability of not being background")
                results.refined_scenes.append(Figure(png, f"{caption}.", f"Scene {index + 1}, {what}"))
        for photograph in photographs[:1]:
            png = crf.photograph_picture(segmenter, photograph, _PHOTOGRAPH_SIDE, comparison.chosen)
            (output / f"photograph-{photograph.path.stem}-crf.png").write_bytes(png)
            caption = f"{photograph.path.stem}: photograph, network alone, with the fully connected CRF, overlay."
            results.refined_photographs.append(Figure(png, caption, caption))


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def _bar(total: int, what: str, unit: str) -> Any:
    """A progress bar on stderr; where that is no terminal, a line every now and then."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 15, dynamic_ncols=True)


def _draw(count: int, size: int, seed: int, what: str) -> list[Scene]:
    dataset = SceneDataset(count, size, seed)
    with _bar(count, what, "scene") as bar:
        scenes = []
        for index in range(count):
            scenes.append(dataset[index])
            bar.update()
    return scenes


def _background_only(matrix: ConfusionMatrix) -> float:
    """Mean IoU of a prediction that is background everywhere, on the same labels."""
    constant = ConfusionMatrix(matrix.num_classes)
    constant.counts[:, 0] = matrix.counts.sum(1)
    return constant.mean_iou()


def _photograph(segmenter: Segmenter, photograph: Photograph, palette: Any, output: Path) -> Figure:
    image = read_image(photograph.path)
    labels = segmenter(image, max_side=_PHOTOGRAPH_SIDE)
    png = side_by_side([image, palette[labels], np.asarray(segmenter.overlay(image, labels))])
    (output / f"photograph-{photograph.path.stem}.png").write_bytes(png)
    shares = sorted(segmenter.shares(labels).items(), key=lambda item: -item[1])
    found = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares if share >= 0.005)
    return Figure(png, f"{photograph.caption} Found: {found}.", f"{photograph.path.stem}, segmented")


def _machine() -> dict[str, str]:
    facts = info.collect()
    versions, devices = facts["versions"], facts["devices"]
    cpu = devices[0]
    return {
        "processor": f"{cpu['name']}, {cpu['cores']} cores, {torch.get_num_threads()} threads",
        "instruction set of the operators": str(facts["operators"]["cpu_instruction_set"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "date": time.strftime("%Y-%m-%d"),
    }
