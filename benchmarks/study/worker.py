"""One job in a process of its own, on one thread: train, evaluate in every variant, write the record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deeplab_kernels.models.data import Scene, SceneDataset, to_input
from deeplab_kernels.models.evaluation import ConfusionMatrix, boundary_distance
from deeplab_kernels.models.layers import resize_bilinear
from deeplab_kernels.models.refinement import energy_of_scores, refine
from deeplab_kernels.models.system import SegmentationModel
from deeplab_kernels.models.training import TrainingConfig, start_near_identity, train
from numpy.typing import NDArray

from deeplab_kernels import models
from deeplab_kernels.demo import crf
from deeplab_kernels.demo.speed import keep_freed_memory

from .experiments import NETWORKS, Job, Settings, Variant

WIDTHS = range(1, 41)  # of the trimap, pixels
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
    passes = sum(sum(scale**2 for scale in v.scales) * (1 + v.flip) for v in NETWORKS[job.network].variants.values())
    refined = sum(v.crf is not None for v in NETWORKS[job.network].variants.values())
    settings = job.settings
    return 0.15 * passes * settings.test_scenes + 3.0 * refined * (settings.test_scenes + settings.validation_scenes)


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
    temporary = weights.with_suffix(f".{os.getpid()}")
    torch.save({"model": model.state_dict(), "training": training}, temporary)
    temporary.replace(weights)
    return model, training


@lru_cache(maxsize=3)
def _scenes(settings: Settings, part: int) -> list[Scene]:
    count = (settings.train_scenes, settings.test_scenes, settings.validation_scenes)[part]
    datasets = [SceneDataset(count, settings.scene_size, part, clutter=clutter) for clutter in settings.clutter]
    return [datasets[i % len(datasets)][i] for i in range(count)]


@lru_cache(maxsize=1)
def _distances(settings: Settings) -> list[NDArray[np.int64]]:
    return [boundary_distance(scene.labels, WIDTHS[-1]) for scene in _scenes(settings, _TEST)]


def _evaluate(model: SegmentationModel, job: Job, progress: Progress) -> dict[str, Any]:
    settings, variants = job.settings, NETWORKS[job.network].variants
    test, validation = _scenes(settings, _TEST), _scenes(settings, _VALIDATION)
    results: dict[str, Any] = {}
    for name, variant in variants.items():
        extra: dict[str, Any] = {}
        if variant.crf is None:
            labels = [scores(model, scene, variant).argmax(0) for scene in test]
        else:
            energies = [
                [energy_of_scores(scores(model, s, variant), kind="logits") for s in part]
                for part in (validation, test)
            ]
            candidates = (crf.FULL if settings.all_candidates else crf.QUICK)[variant.crf]
            parameters, best = crf.choose(candidates, validation, energies[0], _CLASSES)
            labels = [refine(s.image, e, parameters).argmax(0) for s, e in zip(test, energies[1], strict=True)]
            extra = {"crf": asdict(parameters), "candidates": len(candidates), "validation_mean_iou": best}
        results[name] = quality(labels, test, _distances(settings)) | extra
        progress(evaluation_cost(job) / len(variants))
    return results


@torch.inference_mode()
def scores(model: SegmentationModel, scene: Scene, variant: Variant) -> NDArray[np.float32]:
    """(L, H, W): logits, or the logarithm of the mean probability over several scales and the mirrored image."""
    trained_at = model.output_stride
    model.set_output_stride(variant.output_stride or trained_at)
    x = to_input(scene.image[None], model.normalization)
    size = x.shape[2:]
    try:
        if variant.scales == (1.0,) and not variant.flip:
            return model(x)[0].numpy()
        total = torch.zeros(1, model.num_classes, *size)
        for scale in variant.scales:
            scaled = resize_bilinear(x, [round((n - 1) * scale) + 1 for n in size])
            total += resize_bilinear(model(scaled), size).softmax(1)
            if variant.flip:
                total += resize_bilinear(model(scaled.flip(-1)).flip(-1), size).softmax(1)
        return total.log()[0].numpy()
    finally:
        model.set_output_stride(trained_at)


def quality(
    labels: Sequence[NDArray[np.integer[Any]]], scenes: Sequence[Scene], distances: Sequence[NDArray[np.int64]]
) -> dict[str, Any]:
    """Mean IoU, IoU of each class, share of pixels that are right, and the trimap's mean IoU of each of WIDTHS."""
    limit = WIDTHS[-1] + 1
    counts = np.zeros((limit + 1, _CLASSES, _CLASSES), np.int64)
    for prediction, scene, distance in zip(labels, scenes, distances, strict=True):
        for d in range(1, limit + 1):
            matrix = ConfusionMatrix(_CLASSES)
            matrix.update(prediction[distance == d], scene.labels[distance == d])
            counts[d] += matrix.counts
    within = counts.cumsum(0)
    matrices = []
    for b in (*WIDTHS, limit):
        matrices.append(ConfusionMatrix(_CLASSES))
        matrices[-1].counts = within[b]
    return {
        "mean_iou": matrices[-1].mean_iou(),
        "iou": matrices[-1].iou().tolist(),
        "pixel_accuracy": matrices[-1].pixel_accuracy(),
        "trimap": [matrix.mean_iou() for matrix in matrices[:-1]],
    }


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
