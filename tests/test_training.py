"""Training: the schedule, what is decayed, crops, and that it learns and repeats."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from deeplab_kernels.models.data import Scene, SceneDataset
from deeplab_kernels.models.training import (
    TrainingConfig,
    parameter_groups,
    poly_learning_rate,
    start_near_identity,
    train,
    trainer,
)


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, 7, 1)
    )


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [SceneDataset(6, 49, seed=0)[i] for i in range(6)]


def test_poly_schedule():
    schedule = [poly_learning_rate(s, 100, 0.5, power=0.9, warmup_steps=4) for s in range(101)]
    assert schedule[:2] == pytest.approx([0.1, 0.2 * 0.99**0.9])
    assert schedule[50] == pytest.approx(0.5 * 0.5**0.9)
    assert all(a > b for a, b in itertools.pairwise(schedule[10:]))
    assert schedule[-1] == 0


def test_depthwise_kernels_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    decayed, plain = parameter_groups(model, 1e-4)
    assert decayed["multiplier"] == plain["multiplier"] == 1
    assert [p.shape for p in decayed["params"]] == [(8, 3, 3, 3), (4, 8, 1, 1)]
    assert decayed["weight_decay"] == 1e-4
    assert len(plain["params"]) == 6
    assert plain["weight_decay"] == 0


def test_start_near_identity_touches_depthwise_centres_alone():
    depthwise = nn.Conv2d(8, 16, (3, 5), groups=8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), depthwise, nn.Conv2d(16, 16, 1), nn.Conv2d(1, 1, 3))
    before = [p.detach().clone() for p in model.parameters()]
    start_near_identity(model, 0.5)
    change = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    assert [bool(c.any()) for c in change] == [False, False, True] + [False] * 5
    expected = torch.zeros(16, 1, 3, 5)
    expected[:, :, 1, 2] = 0.5
    torch.testing.assert_close(change[2], expected)


def test_the_loss_falls(scenes):
    result = train(small_net(), scenes, TrainingConfig(steps=40, batch_size=4, crop=33, learning_rate=0.1))
    assert result.steps == result.planned_steps == 40
    assert np.mean(result.losses[-5:]) < 0.8 * np.mean(result.losses[:3])


def test_the_same_seed_gives_the_same_weights(scenes):
    def weights(seed: int) -> list[torch.Tensor]:
        model = small_net()
        torch.manual_seed(torch.seed() % 1000)  # what was drawn before must not matter
        train(model, scenes, TrainingConfig(steps=5, batch_size=2, crop=17, seed=seed))
        assert not model.training
        return [p.detach() for p in model.parameters()]

    first, second, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_training_leaves_the_global_generator_alone(scenes):
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 7, 1))
    state = torch.get_rng_state()
    train(model, scenes, TrainingConfig(steps=1, crop=9))
    assert torch.equal(state, torch.get_rng_state())


def test_a_time_limit_shortens_the_run_and_ends_the_schedule(scenes):
    seen = []
    config = TrainingConfig(steps=10_000, batch_size=2, crop=17, time_limit=0.5)
    result = train(small_net(), scenes, config, on_step=lambda step, steps, loss: seen.append((step, steps)))
    assert result.planned_steps == 10_000
    assert result.steps < 10_000
    assert seen[-1] == (result.steps, result.steps)
    assert result.seconds < 20


def test_a_machine_that_gets_busy_ends_soon_after_the_time_limit(scenes, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])

    class Steps(trainer.Trainer):
        def _step(self, network, passes):
            now[0] += 0.01 if self.step < 70 else 9.0
            self.step += 1
            return 0.0

    result = Steps(small_net(), scenes, TrainingConfig(steps=1000, batch_size=1, crop=17, time_limit=20)).run()
    assert (result.planned_steps, result.steps) == (1000, 74)
    assert now[0] < 20 + 2 * 9  # the last one at the end of the schedule


def test_a_loss_that_is_not_finite_is_reported(scenes):
    model = small_net()
    with torch.no_grad():
        model[-1].bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="at step 0"):
        train(model, scenes, TrainingConfig(steps=2, batch_size=2, crop=17))


def test_bad_arguments_are_named(scenes):
    with pytest.raises(ValueError, match="scenes must not be empty"):
        train(small_net(), [], TrainingConfig(steps=1))
    for name in ("steps", "batch_size", "crop"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            TrainingConfig(**{name: 0})
    with pytest.raises(ValueError, match="learning_rate"):
        TrainingConfig(learning_rate=0)
