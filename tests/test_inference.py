"""Predicted scores against direct computations: scales, mirror images, windows, output strides, the CRF."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import randomise
from torch import nn
from torch.nn import functional as F

from deeplab_kernels.models import build
from deeplab_kernels.models.crf_stage import with_crf
from deeplab_kernels.models.data import SceneDataset, to_input
from deeplab_kernels.models.inference import PAPER_SCALES, Inference, predict_labels, predict_scores
from deeplab_kernels.models.madds import PAPER_SCALED_SIZES
from deeplab_kernels.models.refinement import CRFParameters, energy_of_scores, refine
from deeplab_kernels.models.system import IMAGENET, Normalization

IMAGE = SceneDataset(1, (50, 67), seed=4)[0].image
NOISE = np.random.default_rng(0).integers(0, 256, (150, 101, 3)).astype(np.uint8)


class PixelNet(nn.Module):
    """Logits = the normalised colours. Remembers the sizes it was given and that it was in evaluation mode."""

    def __init__(self, normalization: Normalization | None = None) -> None:
        super().__init__()
        self.parameter, self.sizes = nn.Parameter(torch.zeros(1)), []
        if normalization is not None:
            self.normalization = normalization

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(tuple(x.shape))
        return x


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(build("deeplabv3plus_small", num_classes=7)).eval()


@torch.no_grad()
def _scores(model: nn.Module, image: np.ndarray, scale: float = 1, flip: bool = False) -> np.ndarray:
    """The definition, for one scale and one direction."""
    x = to_input(image, model.normalization)
    size = [int((n - 1) * scale + 1) for n in x.shape[2:]]
    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    logits = model(x.flip(-1)).flip(-1) if flip else model(x)
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=True).softmax(1)[0].numpy()


def test_scores_are_the_softmax_of_the_logits(network):
    scores = predict_scores(network, IMAGE)
    assert scores.shape == (1, 7, 50, 67)
    assert scores.dtype == np.float32
    assert np.allclose(scores.sum(1), 1, atol=1e-5)
    assert np.abs(scores[0] - _scores(network, IMAGE)).max() < 1e-6
    assert np.array_equal(predict_labels(network, IMAGE, Inference()).final[0], scores[0].argmax(0))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.5), (0.7,)])
def test_scales_and_mirror_images_are_averaged(scales, flip, network):
    expected = np.mean([_scores(network, IMAGE, s, f) for s in scales for f in ((False, True) if flip else [False])], 0)
    actual = predict_scores(network, IMAGE, scales=scales, flip=flip)[0]
    assert np.abs(actual - expected).max() < 1e-6
    assert expected.std() > 0.05


def test_a_mirrored_image_has_mirrored_scores_with_flip(network):
    scores = predict_scores(network, IMAGE, flip=True)
    mirrored = predict_scores(network, IMAGE[:, ::-1], flip=True)
    assert np.allclose(mirrored[..., ::-1], scores, atol=1e-6)
    assert not np.allclose(predict_scores(network, IMAGE[:, ::-1])[..., ::-1], scores, atol=1e-3)


def test_scaled_sizes_are_the_papers():
    model = PixelNet()
    predict_scores(model, np.zeros((513, 513, 3), np.uint8), scales=PAPER_SCALES)
    assert tuple(size[2] for size in model.sizes) == PAPER_SCALED_SIZES
    assert tuple(size[3] for size in model.sizes) == PAPER_SCALED_SIZES


@pytest.mark.parametrize("normalization", [None, IMAGENET])
def test_the_models_normalization_is_respected(normalization):
    model = PixelNet(normalization)
    x = to_input(NOISE) if normalization is None else to_input(NOISE, normalization)
    assert np.allclose(predict_scores(model, NOISE)[0], x.softmax(1)[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_give_what_the_whole_image_gives_where_context_does_not_matter(batch_size):
    model = PixelNet()
    images = np.stack([NOISE, NOISE[::-1]])
    seen = []
    scores = predict_scores(
        model, images, window=60, margin=8, batch_size=batch_size, on_window=lambda *step: seen.append(step)
    )
    assert np.allclose(scores, predict_scores(PixelNet(), images), atol=1e-6)
    assert {size[2:] for size in model.sizes} == {(60, 60)}
    assert max(size[0] for size in model.sizes) == batch_size
    assert seen[-1] == (16, 16)
    labels = predict_labels(PixelNet(), images, Inference(window=60, margin=8, batch_size=batch_size))
    assert np.array_equal(labels.final, scores.argmax(1))
    assert labels.network is labels.final


def test_a_window_sees_nothing_else(network):
    image = np.concatenate([IMAGE, IMAGE[::-1]], 1)
    scores = predict_scores(network, image, window=50, margin=0)
    assert np.allclose(scores[..., :50][..., :40], predict_scores(network, image[:, :50])[..., :40], atol=1e-5)


def test_output_stride_is_set_and_restored(network):
    network.train()
    network.backbone.eval()  # as with frozen batch normalisation
    fine = predict_scores(network, IMAGE, output_stride=8)
    assert network.output_stride == 16
    assert network.training
    assert not network.backbone.training
    network.eval().set_output_stride(8)
    assert np.array_equal(fine, predict_scores(network, IMAGE))
    network.set_output_stride(16)
    assert not np.allclose(fine, predict_scores(network, IMAGE), atol=1e-3)
    with pytest.raises(ValueError, match="output_stride"):
        predict_scores(network, IMAGE, output_stride=5)
    assert network.output_stride == 16
    with pytest.raises(ValueError, match="PixelNet has no other"):
        predict_scores(PixelNet(), IMAGE, output_stride=8)


def test_crf_refines_each_image_by_itself():
    crf, steps = CRFParameters(iterations=2, color_sigma=20), []
    images = np.stack([IMAGE, IMAGE[:, ::-1]])
    actual = predict_scores(PixelNet(), images, crf=crf, on_iteration=lambda *step: steps.append(step))
    plain = predict_scores(PixelNet(), images)
    for image, before, after in zip(images, plain, actual, strict=True):
        assert np.array_equal(after, refine(image, energy_of_scores(before, kind="probabilities"), crf))
    labels = predict_labels(PixelNet(), images, Inference(crf=crf))
    assert np.array_equal(labels.final, actual.argmax(1))
    assert np.array_equal(labels.network, plain.argmax(1))
    assert steps == [(1, 2), (2, 2)] * 2


def test_a_crf_that_is_part_of_the_model(network):
    model = with_crf(network, iterations=2)
    scores = predict_scores(model, IMAGE, output_stride=8)
    network.set_output_stride(8)
    with torch.no_grad():
        expected = model(to_input(IMAGE, network.normalization)).softmax(1).numpy()
        before = network(to_input(IMAGE, network.normalization)).softmax(1).numpy()
    network.set_output_stride(16)
    assert np.abs(scores - expected).max() < 1e-5
    assert np.abs(scores - before).max() > 1e-2


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (34, 2)])
def test_small_images_are_continued_by_their_border(size, network):
    image = np.full((*size, 3), 77, np.uint8)
    image[0, 0] = 200
    model = PixelNet()
    scores = predict_scores(model, image, scales=(0.5, 1), flip=True)
    assert scores.shape == (1, 3, *size)
    assert min(min(s[2:]) for s in model.sizes) >= 33
    assert predict_scores(network, image, scales=(0.5, 1), flip=True).shape == (1, 7, *size)


def test_half_precision_weights():
    model = PixelNet().bfloat16()
    scores = predict_scores(model, NOISE)
    assert scores.dtype == np.float32
    assert np.allclose(scores, predict_scores(PixelNet(), NOISE), atol=4e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "scales must be finite and positive, at least one"),
        ({"scales": (1, 0)}, "scales"),
        ({"scales": (float("nan"),)}, "scales"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 10, "margin": 5}, "twice its margin"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Inference(**settings)


@pytest.mark.parametrize("images", [NOISE.astype(np.float32), NOISE[..., :2], NOISE[:0], NOISE[:, :, 0]])
def test_wrong_images(images):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, H, W, 3\)"):
        predict_scores(PixelNet(), images)


def test_scores_that_are_not_finite_or_of_another_size_are_refused():
    class Broken(PixelNet):
        def forward(self, x):
            return self.answer(x)

    model = Broken()
    model.answer = lambda x: x / 0
    with pytest.raises(ValueError, match="not finite"):
        predict_scores(model, NOISE)
    model.answer = lambda x: x[:, :, ::2]
    with pytest.raises(ValueError, match=r"must give logits \(N, K, H, W\)"):
        predict_scores(model, NOISE)
