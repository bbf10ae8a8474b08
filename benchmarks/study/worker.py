"""One job in a process of its own, on one thread: train, evaluate in every variant, write the record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deeplab_kernels import models
from deeplab_kernels._files import written_whole
from deeplab_kernels.demo import crf
from deeplab_kernels.demo.speed import keep_freed_memory
from deeplab_kernels.models.data import Scene, SceneDataset
from deeplab_kernels.models.evaluation import PAPER_WIDTHS, evaluate
from deeplab_kernels.models.inference import Inference, predict_scores
from deeplab_kernels.models.refinement import CRFParameters, energy_of_scores
from deeplab_kernels.models.system import SegmentationModel
from deeplab_kernels.models.training import TrainingConfig, start_near_identity, train

from .experiments import NETWORKS, Job, Settings

_TRAIN, _TEST, _VALIDATION = 0, 1, 2  # seeds of the scenes
_CLASSES = len(SceneDataset.class_names)

Progress = Callable[[float], object]


def start(threads: int = 1) -> None:
    """To be called first in a process that runs jobs."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def run(job: Job, folder: Path, progress: Progress = lambda steps: None) -> dict[str, Any]:
    """The record of ``job``, from ``folder`` where it is known. ``progress`` is called with parts of the job's cost, in
    training steps of the cheapest network."""
    record = folder / job.record_name
    if record.exists():
        return json.loads(record.read_text())
    model, training = _trained(job, folder, progress)
    begin = time.process_time()
    results = _evaluate(model, job, progress)
    seconds = {"evaluation_cpu_seconds": round(time.process_time() - begin, 1)}
    content = {"network": job.network, "seed": job.seed, **job.evaluation(), "results": results, **training, **seconds}
    _write(record, json.dumps(content, indent=1).encode())
    return content


def evaluation_cost(job: Job) -> float:
    """About what the evaluation takes, in training steps of the cheapest network."""
    variants, settings = NETWORKS[job.network].variants.values(), job.settings
    passes = sum(sum(scale**2 for scale in v.scales) * (1 + v.flip) for v in variants)
    refined = sum(v.crf is not None for v in variants)
    candidates = 10 if settings.all_candidates else 2
    return 0.15 * passes * settings.test_scenes + 0.4 * refined * (
        settings.test_scenes + candidates * settings.validation_scenes
    )


def build(name: str) -> SegmentationModel:
    network = NETWORKS[name]
    return models.build(network.model, _CLASSES, network.output_stride, **network.options)


def _trained(job: Job, folder: Path, progress: Progress) -> tuple[SegmentationModel, dict[str, Any]]:
    """The network with the weights of ``job``; training's record."""
    weights, settings = folder / job.weights_name, job.settings
    torch.manual_seed(job.seed)
    model = build(job.network)
    start_near_identity(model)
    if weights.exists():
        saved = torch.load(weights, weights_only=True)
        model.load_state_dict(saved["model"])
        progress(settings.steps * job.cost)
        return model.eval(), saved["training"]
    config = TrainingConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        crop=settings.crop,
        learning_rate=settings.learning_rate,
        seed=job.seed,
    )
    begin = time.process_time()
    result = train(model, _scenes(settings, _TRAIN), config, on_step=lambda *_: progress(job.cost))
    training = {
        "cpu_seconds": round(time.process_time() - begin, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": float(np.mean(result.losses[-50:])),
    }
    with written_whole(weights) as partial:
        torch.save({"model": model.state_dict(), "training": training}, partial)
    return model, training


@lru_cache(maxsize=3)
def _scenes(settings: Settings, part: int) -> list[Scene]:
    count = (settings.train_scenes, settings.test_scenes, settings.validation_scenes)[part]
    datasets = [SceneDataset(count, settings.scene_size, part, clutter=clutter) for clutter in settings.clutter]
    return [datasets[i % len(datasets)][i] for i in range(count)]


def _evaluate(model: SegmentationModel, job: Job, progress: Progress) -> dict[str, Any]:
    settings, variants = job.settings, NETWORKS[job.network].variants
    results: dict[str, Any] = {}
    for name, variant in variants.items():
        inference = Inference(variant.scales, variant.flip, output_stride=variant.output_stride, batch_size=4)
        chosen: dict[str, Any] = {}
        if variant.crf is not None:
            parameters, chosen = _choose(model, settings, variant.crf)
            inference = replace(inference, crf=parameters)
        found = evaluate(model, _scenes(settings, _TEST), _CLASSES, inference, trimap_widths=PAPER_WIDTHS)
        results[name] = {
            "mean_iou": found.matrix.mean_iou(),
            "iou": found.matrix.iou().tolist(),
            "pixel_accuracy": found.matrix.pixel_accuracy(),
            "trimap": found.trimap.mean_iou(),
            **chosen,
        }
        progress(evaluation_cost(job) / len(variants))
    return results


def _choose(model: SegmentationModel, settings: Settings, kind: str) -> tuple[CRFParameters, dict[str, Any]]:
    """The parameters of a CRF that are best on the validation scenes."""
    scenes = _scenes(settings, _VALIDATION)
    candidates = (crf.FULL if settings.all_candidates else crf.QUICK)[kind]
    energies = [energy_of_scores(predict_scores(model, s.image)[0], kind="probabilities") for s in scenes]
    parameters, best = crf.choose(candidates, scenes, energies, _CLASSES)
    return parameters, {"crf": asdict(parameters), "candidates": len(candidates), "validation_mean_iou": best}


def _write(path: Path, content: bytes) -> None:
    with written_whole(path) as partial:
        partial.write_bytes(content)
