"""models.refinement: the CRF's results against the definition, energies of labels and of scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _refine import two_halves

from deeplab_kernels import cli
from deeplab_kernels.errors import UserError
from deeplab_kernels.models import refinement
from deeplab_kernels.models.refinement import CRFParameters, energy_of_labels, energy_of_scores, refine


def mean_field(image: np.ndarray, energy: np.ndarray, p: CRFParameters) -> np.ndarray:
    """The definition with N x N matrices, in float64."""
    labels, height, width = energy.shape
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(float)
    colour = image.reshape(-1, 3).astype(float)
    square = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    different = ((colour[:, None] - colour) ** 2).sum(2)
    kernels = [
        p.appearance_weight * _normalised(
            np.exp(-square / (2 * p.appearance_sigma**2) - different / (2 * p.color_sigma**2)), x, y, p
        ),
        p.smoothness_weight * _normalised(np.exp(-square / (2 * p.smoothness_sigma**2)), x, y, p),
    ]  # fmt: skip
    u = energy.reshape(labels, -1).astype(float)
    q = _softmax(-u)
    for _ in range(p.iterations):
        q = _softmax(-u + q @ sum(kernels).T)
    return q.reshape(energy.shape)


def _normalised(kernel: np.ndarray, x: np.ndarray, y: np.ndarray, p: CRFParameters) -> np.ndarray:
    if p.filter == "local":
        far = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y)) > p.window
        kernel = np.where(far, 0, kernel)
    n = kernel.sum(1)
    return kernel / np.sqrt(n[:, None] * n)


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


@pytest.mark.parametrize("filter", refinement.FILTERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (17, 5), (12, 13)])
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_probabilities_against_the_definition(filter, size, labels):
    rng = np.random.default_rng(labels)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    energy = rng.normal(size=(labels, *size)).astype(np.float32)
    p = CRFParameters(2.0, 10.0, 60.0, 1.5, 2.0, iterations=4, filter=filter, window=3)
    steps: list[tuple[int, int]] = []
    q = refine(image, energy, p, on_iteration=lambda done, total: steps.append((done, total)))
    assert q.shape == energy.shape
    assert q.dtype == np.float32
    assert steps == [(i, 4) for i in range(1, 5)]
    error = np.abs(q - mean_field(image, energy, p)).max()
    assert error < (0.3 if filter == "permutohedral" else 1e-5), error  # the lattice approximates


@pytest.mark.parametrize("filter", refinement.FILTERS)
@pytest.mark.parametrize("weights", [(0.0, 0.0), (3.0, 0.0), (0.0, 3.0)])
def test_a_weight_of_0_leaves_a_kernel_out(filter, weights):
    image, energy = two_halves(9, 11), np.random.default_rng(1).normal(size=(3, 9, 11)).astype(np.float32)
    p = CRFParameters(appearance_weight=weights[0], smoothness_weight=weights[1], iterations=2, filter=filter)
    expected = mean_field(image, energy, p)
    assert np.abs(refine(image, energy, p) - expected).max() < (0.15 if filter == "permutohedral" else 1e-5)


def test_the_layer_gives_the_same():
    """What a GPU would compute with: nn.DenseCRF, here on the CPU."""
    image, energy = two_halves(), np.random.default_rng(1).normal(size=(3, 24, 30)).astype(np.float32)
    for filter in refinement.FILTERS:
        p = CRFParameters(iterations=3, filter=filter)
        done: list[tuple[int, int]] = []
        layer = refinement._on_device(image, energy, p, "cpu", lambda *step, done=done: done.append(step))
        assert np.abs(layer - refine(image, energy, p)).max() < 2e-3
        assert done == [(3, 3)]


def test_inputs_are_left_alone_and_may_be_read_only_or_strided():
    image, energy = two_halves(10, 12)[::-1], np.random.default_rng(1).normal(size=(10, 12, 2)).astype(np.float32)
    energy = energy.transpose(2, 0, 1)
    image.setflags(write=False)
    for filter in refinement.FILTERS:
        before = energy.copy()
        refine(image, energy, CRFParameters(iterations=2, filter=filter))
        assert np.array_equal(energy, before)


def test_refine_with_wrong_arguments(monkeypatch):
    image, energy = two_halves(4, 5), np.zeros((2, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"one size, got \(4, 5, 3\), \(2, 5, 5\)"):
        refine(image, np.zeros((2, 5, 5), np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="energy must be finite"):
            refine(image, np.full_like(energy, bad))
    monkeypatch.setattr(refinement, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"2 labels on 5 x 4 pixels take about .* GB .*--max-side"):
        refine(image, energy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appearance_weight", -1.0), ("smoothness_weight", math.inf), ("appearance_sigma", 0.0), ("color_sigma", -3.0),
        ("smoothness_sigma", math.nan), ("iterations", 0), ("window", 0), ("filter", "box"),
    ],
)  # fmt: skip
def test_wrong_parameters(name, value, capsys):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        CRFParameters(**{name: value})
    option = f"--{name.replace('_', '-')}"
    if name != "filter":  # argparse checks the choices
        assert cli.main(["refine", "a.png", "b.png", option, str(value)]) == 2
        assert f"{option} must be" in capsys.readouterr().err


def test_memory_that_is_available():
    there = refinement.available_memory()
    assert there is None or there > 2**20
    assert refinement.required_memory(21, 4096, 4096) < 16 * 2**30


# Energies


def test_energy_of_labels():
    labels = np.array([[0, 7, 255, 7]])
    energy = energy_of_labels(labels, [0, 3, 7], 255, 0.6)
    expected = np.array([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [1 / 3] * 3, [0.2, 0.2, 0.6]])
    assert np.allclose(np.exp(-energy[:, 0]).T, expected)
    assert energy_of_labels(labels, [0, 7, 255], None, 0.6)[2, 0, 2] == pytest.approx(-math.log(0.6))
    for confidence in (1 / 3, 0.1, 1.0):
        with pytest.raises(UserError, match="confidence must be between 1/3"):
            energy_of_labels(labels, [0, 3, 7], 255, confidence)


def test_energy_of_scores():
    logits = np.random.default_rng(0).normal(0, 3, (4, 5, 6))
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    for scores in (logits, probabilities, probabilities.astype(np.float16), np.asfortranarray(logits.astype(">f4"))):
        assert _softmax(-energy_of_scores(scores)) == pytest.approx(probabilities, abs=1e-3)
    assert energy_of_scores(np.array([[[0.0]], [[1.0]]])).ravel() == pytest.approx([-math.log(1e-5), 0])
    huge = energy_of_scores(np.array([[[1e30]], [[-1e30]]]))
    assert np.isfinite(huge).all()
    as_logits = energy_of_scores(probabilities, kind="logits")
    assert _softmax(-as_logits) == pytest.approx(_softmax(probabilities), abs=1e-6)


@pytest.mark.parametrize("size", [(10, 12), (13, 15), (3, 4), (1, 1)])
def test_scores_of_another_size_are_resized(size):
    scores = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    energy = energy_of_scores(scores, size)
    shrinks = size[0] < 5
    expected = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], size, mode="bilinear", antialias=shrinks)
    assert energy.shape == (2, *size)
    assert energy[1] - energy[0] == pytest.approx((expected[0, 0] - expected[0, 1]).numpy(), abs=1e-5)
    flat = energy_of_scores(np.full((2, 5, 6), 0.5), size)
    assert flat == pytest.approx(np.full((2, *size), math.log(2)))


@pytest.mark.parametrize(
    ("scores", "kind", "message"),
    [
        (np.zeros((3, 8)), "auto", r"shape \(L, H, W\), got \(3, 8\)"),
        (np.zeros((1, 8, 9)), "auto", "at least 2 labels"),
        (np.zeros((8, 9, 3)), "auto", "do not fit a photograph of 9 x 8 pixels; are the labels the last axis"),
        (np.zeros((2, 9, 8)), "auto", "do not fit a photograph of 9 x 8"),
        (np.full((2, 8, 9), np.nan), "auto", "finite"),
        (np.full((2, 8, 9), np.inf), "logits", "finite"),
        (np.full((2, 8, 9), -1.0), "probabilities", "negative"),
    ],
)
def test_scores_that_are_refused(scores, kind, message):
    with pytest.raises(UserError, match=message):
        energy_of_scores(scores, (8, 9), kind)


def test_most_probable_of_a_resized_map():
    q = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    assert np.array_equal(refinement.most_probable(q), q.argmax(0))
    large = torch.nn.functional.interpolate(torch.from_numpy(q)[None], (9, 11), mode="bilinear")[0].numpy()
    assert np.array_equal(refinement.most_probable(q, (9, 11)), large.argmax(0))
