"""The trainer: order of samples, accumulation, stages, averages, precision, and continuing as if nothing happened."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deeplab_kernels.errors import UserError
from deeplab_kernels.models import build
from deeplab_kernels.models.data import IGNORE, Scene, SceneDataset
from deeplab_kernels.models.system import SegmentationModel
from deeplab_kernels.models.training import (
    Stage,
    Trainer,
    TrainingConfig,
    WeightAverage,
    freeze_batch_norm,
    parameter_groups,
    samples,
    train,
)

BASE = TrainingConfig(steps=6, batch_size=2, crop=17, learning_rate=0.05, warmup_steps=2)


class Net(SegmentationModel):
    """Small, with what the trainer knows of: a backbone, batch normalisation, dropout, an output stride."""

    def __init__(self, num_classes: int = 7, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(8, num_classes, 1))
        self.strides: list[int] = [16]

    @property
    def output_stride(self) -> int:
        return self.strides[-1]

    def set_output_stride(self, output_stride: int) -> None:
        self.strides.append(output_stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def net(**options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [SceneDataset(7, 33, seed=0)[i] for i in range(7)]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Samples


def test_every_scene_comes_once_an_epoch():
    marked = [Scene(np.full((4, 4, 3), n, np.uint8), np.full((4, 4), n % 7, np.uint8)) for n in range(10)]
    drawn = samples.Samples(marked, dataclasses.replace(BASE, crop=4))
    epochs = [[int(drawn[e * 10 + i].image[0, 0, 0]) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert int(drawn[3].image[0, 0, 0]) == epochs[0][3]  # in any order


@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_share_what_one_would_take(accumulation):
    one = dataclasses.replace(BASE, batch_size=6, accumulation=accumulation)
    many = dataclasses.replace(BASE, batch_size=2, accumulation=accumulation)
    for step in (0, 5):
        whole = list(itertools.islice(samples.numbers(one, step, 0, 1), accumulation))
        parts = [list(itertools.islice(samples.numbers(many, step, r, 3), accumulation)) for r in range(3)]
        assert [list(itertools.chain(*passes)) for passes in zip(*parts, strict=True)] == whole


def test_batches_do_not_depend_on_the_workers(scenes):
    config = dataclasses.replace(BASE, color_jitter=0.2, min_scale=0.5, max_scale=2.0)
    alone, two = (
        list(itertools.islice(samples.batches(scenes, config, step=1, workers=workers), 5)) for workers in (0, 2)
    )
    for (images, labels), (other_images, other_labels) in zip(alone, two, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
        assert images.shape == (2, 17, 17, 3)
        assert images.dtype == labels.dtype == torch.uint8


class _Damaged:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Scene:
        raise UserError(f"image-{index}.png: the image is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_reported_in_one_line(workers):
    with pytest.raises(UserError, match=r"^image-\d.png: the image is damaged$"):
        train(net(), _Damaged(), BASE, workers=workers)


class _Killed(_Damaged):
    def __getitem__(self, index: int) -> Scene:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        raise AssertionError


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match=r"was ended \(DataLoader worker.* lower workers"):
        train(net(), _Killed(), BASE, workers=1)


# One step


def test_accumulated_passes_are_one_large_batch(scenes):
    """Without batch normalisation and dropout nothing else couples the images; the numbers of counted pixels differ."""
    for scene, rows in zip(scenes, range(len(scenes)), strict=False):
        scene.labels[: 3 * rows] = IGNORE
    models = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        model = net(dropout=0.0)
        model.backbone[1] = nn.Identity()
        config = dataclasses.replace(BASE, batch_size=batch_size, accumulation=accumulation)
        models.append((train(model, scenes, config).losses, weights(model)))
    assert models[0][0] == pytest.approx(models[1][0], rel=1e-5)
    for a, b in zip(models[0][1], models[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pixels_that_are_all_ignored_cost_nothing(scenes):
    ignored = [Scene(s.image, np.full_like(s.labels, IGNORE)) for s in scenes]
    result = train(net(), ignored, dataclasses.replace(BASE, steps=2))
    assert result.losses == [0, 0]


def test_the_head_learns_faster():
    model = net()
    groups = parameter_groups(model, 1e-4, 10.0)
    fast = {id(p) for g in groups if g["multiplier"] == 10 for p in g["params"]}
    assert fast == {id(p) for p in model.head.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"head_multiplier 2\.0 needs a model with a backbone, Sequential has none"):
        parameter_groups(nn.Sequential(nn.Conv2d(3, 3, 1)), 0, 2.0)


def test_a_multiplier_scales_the_update(scenes):
    before = net()
    changes = []
    for multiplier in (1.0, 4.0):
        model = net()
        config = dataclasses.replace(BASE, steps=1, head_multiplier=multiplier, weight_decay=0.0)
        train(model, scenes, config)
        changes.append([b.detach() - a.detach() for a, b in zip(before.parameters(), model.parameters(), strict=True)])
    for name, one, four in zip(dict(before.named_parameters()), *changes, strict=True):
        torch.testing.assert_close(four, one * (4 if name.startswith("head") else 1), rtol=1e-3, atol=1e-6)


class _WithAuxiliary(Net):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.aux_classifier = nn.Conv2d(8, 7, 1)
        nn.init.zeros_(self.aux_classifier.weight)
        nn.init.zeros_(self.aux_classifier.bias)

    def forward(self, x: torch.Tensor) -> Any:
        features = self.backbone(x)
        return (self.head(features), self.aux_classifier(features)) if self.training else self.head(features)


def test_an_auxiliary_head_adds_to_the_loss(scenes):
    torch.manual_seed(1)
    model = _WithAuxiliary()
    with_auxiliary = train(model, scenes, dataclasses.replace(BASE, steps=1)).losses[0]
    alone = train(net(dropout=0.0), scenes, dataclasses.replace(BASE, steps=1)).losses[0]
    assert with_auxiliary == pytest.approx(alone + 0.4 * np.log(7), rel=1e-5)
    assert model.aux_classifier.bias.any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_alike(scenes, precision):
    config = dataclasses.replace(BASE, steps=10)
    full = train(net(dropout=0.0), scenes, config).losses
    model = net(dropout=0.0)
    mixed = train(model, scenes, dataclasses.replace(config, precision=precision)).losses
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_whole_model_trains_in_bf16(scenes):
    config = TrainingConfig(steps=3, batch_size=2, crop=33, learning_rate=0.02, precision="bf16")
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = build("deeplabv3plus_small", 7)
        losses.append(train(model, scenes, dataclasses.replace(config, precision=precision)).losses)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# Stages, batch normalisation, averages


def test_stages_have_their_own_schedule_and_stride(scenes):
    stages = (Stage(3), Stage(2, learning_rate=0.01, output_stride=8, freeze_batch_norm=True, warmup_steps=0))
    model = net()
    trainer = Trainer(model, scenes, dataclasses.replace(BASE, stages=stages))
    assert trainer.planned_steps == 5
    rates = [trainer.learning_rate(s) for s in range(5)]
    assert rates == pytest.approx([0.05 / 3, 0.1 / 3 * (2 / 3) ** 0.9, 0.05 * (1 / 3) ** 0.9, 0.01, 0.01 * 0.5**0.9])
    seen = []

    def on_step(step: int, steps: int, loss: float) -> None:
        model.eval()  # as validation does
        seen.append((step, steps, model.output_stride, float(model.backbone[1].running_mean[0])))

    trainer.run(on_step)
    assert [s[:3] for s in seen] == [(1, 5, 16), (2, 5, 16), (3, 5, 16), (4, 5, 8), (5, 5, 8)]
    means = [s[3] for s in seen]
    assert means[0] != means[1] != means[2]
    assert means[2] == means[3] == means[4]


def test_frozen_batch_norm_still_learns_scale_and_shift(scenes):
    model = net()
    model.train()
    freeze_batch_norm(model)
    assert [m.training for m in model.backbone] == [True, False, True]
    before = weights(model.backbone[1])
    train(model, scenes, dataclasses.replace(BASE, freeze_batch_norm=True))
    after = weights(model.backbone[1])  # weight, bias, running mean, running variance, count
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True, True]


def test_the_average_is_the_recursion():
    model = net()
    average = WeightAverage(model, 0.9)
    expected = model.head[1].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.head[1].weight.normal_()
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head[1].weight.detach()
    own = weights(model)
    with average.applied_to(model):
        torch.testing.assert_close(model.head[1].weight.detach(), expected)
    assert equal(weights(model), own)


def test_the_average_is_what_is_left_after_training(scenes):
    config = dataclasses.replace(BASE, ema_decay=0.99)
    averaged, last = net(), net()
    train(averaged, scenes, config)
    trainer = Trainer(last, scenes, config)
    trainer.run()
    assert not equal(weights(averaged), weights(last))
    with trainer.evaluated() as model:
        assert equal(weights(averaged), weights(model))
        assert not model.training


# Continuing


class _Stop(Exception):
    pass


CONTINUED = {
    "plain": {},
    "averaged, accumulated": {"ema_decay": 0.9, "accumulation": 2, "hard_fraction": 0.5, "hard_steps": 4},
    "scaled": {"min_scale": 0.5, "max_scale": 2.0, "precision": "fp16"},
    "in stages": {"stages": (Stage(3), Stage(3, output_stride=8, learning_rate=0.02, freeze_batch_norm=True))},
}


@pytest.mark.parametrize("changes", CONTINUED.values(), ids=CONTINUED)
def test_a_continued_run_has_the_same_bits(scenes, changes, tmp_path):
    config = dataclasses.replace(BASE, **changes)

    def result(trainer: Trainer) -> list[torch.Tensor]:
        with trainer.evaluated() as model:
            return weights(model)

    whole = Trainer(net(), scenes, config)
    losses = whole.run().losses
    for stop in range(1, 6):
        first = Trainer(net(), scenes, config)

        def on_step(step: int, steps: int, loss: float, stop: int = stop) -> None:
            if step == stop:
                raise _Stop

        with pytest.raises(_Stop):
            first.run(on_step)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        torch.manual_seed(torch.seed() % 1000)
        second = Trainer(Net(), scenes, config)  # other initial weights
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert second.step == stop
        assert second.run().losses == losses[stop:]
        assert equal(result(second), result(whole))
        assert second.model.output_stride == whole.model.output_stride


def test_hard_examples_are_chosen_gradually(scenes):
    config = dataclasses.replace(BASE, steps=5, hard_fraction=0.2, hard_steps=3)
    trainer, fractions = Trainer(net(), scenes, config), []
    trainer.run(lambda step, steps, loss: fractions.append(trainer.loss.hard_fraction))
    assert fractions == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    plain = Trainer(net(), scenes, dataclasses.replace(config, hard_steps=0)).run().losses
    assert Trainer(net(), scenes, config).run().losses[0] < plain[0]  # easy pixels count as well


def test_memory_format_does_not_change_by_training(scenes):
    model = net().to(memory_format=torch.channels_last)
    seen = []
    model.backbone[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].is_contiguous()))
    train(model, scenes, dataclasses.replace(BASE, steps=1))
    train(net(), scenes, dataclasses.replace(BASE, steps=1))
    assert seen == [False]
    assert model.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_training_gives_the_same(scenes, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # seconds less
    config = dataclasses.replace(BASE, steps=2)
    plain = Trainer(net(dropout=0.0), scenes, config).run().losses
    trainer = Trainer(net(dropout=0.0), scenes, config, compile=True)
    assert trainer.run().losses == pytest.approx(plain, rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"hard_fraction": 0.0}, "hard_fraction must be"),
        ({"hard_steps": -1}, "hard_steps must be at least 0, got -1"),
        ({"min_scale": -1.0}, "min_scale"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1.5}, "steps must be an int, got 1.5"),
        ({"steps": True}, "steps must be an int, got True"),
        ({"precision": 16}, "precision must be a str, got 16"),
        ({"class_weights": ("a",)}, "class_weights must be a list of numbers"),
        ({"stages": (3,)}, "stages must be a list of stages"),
    ],
)
def test_settings_of_a_wrong_type(changes, message):
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(BASE, **changes)


def test_bad_stages():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Stage(0)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 5"):
        Stage(1, output_stride=5)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        Stage(1, learning_rate=-1.0)


def test_what_does_not_go_with_the_model(scenes):
    def attempt(config: TrainingConfig, data: Any = scenes, model: nn.Module | None = None) -> None:
        Trainer(model or net(), data, config)

    with pytest.raises(ValueError, match="scenes must not be empty"):
        attempt(BASE, [])
    with pytest.raises(ValueError, match="crop must exceed the output stride 16, got 16"):
        attempt(dataclasses.replace(BASE, crop=16))
    with pytest.raises(ValueError, match="crop must exceed the output stride 32, got 17"):
        attempt(dataclasses.replace(BASE, stages=(Stage(1, output_stride=8), Stage(1, output_stride=32))))
    with pytest.raises(ValueError, match="one value for each of the 7 classes, got 2"):
        attempt(dataclasses.replace(BASE, class_weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match="the model has 5 classes, the dataset 7"):
        attempt(BASE, SceneDataset(2, 33), net(num_classes=5))
    with pytest.raises(ValueError, match="output_stride 8: Conv2d has no set_output_stride"):
        attempt(dataclasses.replace(BASE, output_stride=8), model=nn.Conv2d(3, 7, 1))


def test_one_image_and_image_pooling(scenes):
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1"):
        train(build("deeplabv3plus_small", 7), scenes, TrainingConfig(steps=1, batch_size=1, crop=33))


def test_a_loss_that_is_not_finite_leaves_the_weights(scenes):
    model = net()
    with torch.no_grad():
        model.head[1].bias.fill_(float("inf"))
    before = weights(model.backbone[0])
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train(model, scenes, BASE)
    assert equal(weights(model.backbone[0]), before)
