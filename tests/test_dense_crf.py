"""nn.DenseCRF: what it computes, learns and refuses, and what people do with it."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _filters import assert_close, random
from torch import Tensor

from deeplab_kernels.nn import DenseCRF
from deeplab_kernels.ops import dense_crf_mean_field

D = torch.float64


def scene(height: int = 24, width: int = 30, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(labels (B, H, W), image (B, 3, H, W), noisy logits of 3 classes): coloured shapes on a ground."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[(y - height // 2) ** 2 + (x - width // 3) ** 2 < (height // 4) ** 2] = 1
    labels[4:-4, -8:-3] = 2
    labels = labels.expand(batch, -1, -1)
    colors = torch.tensor([[200.0, 190.0, 180.0], [60.0, 120.0, 40.0], [40.0, 60.0, 160.0]])
    image = colors[labels].movedim(3, 1) + torch.randn(batch, 3, height, width) * 6
    logits = 2 * F.one_hot(labels, 3).movedim(3, 1) + torch.randn(batch, 3, height, width) * 1.5
    return labels, image.clamp(0, 255), logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("filter", ["permutohedral", "exact", "local"])
def test_layer_refines_a_noisy_score_map(filter: str) -> None:
    labels, image, logits = scene()
    crf = DenseCRF(3, appearance_sigma=20, filter=filter)
    refined = crf(logits, image)
    assert accuracy(logits, labels) < 0.9
    assert accuracy(refined, labels) > 0.99
    assert torch.equal(crf(logits, image.to(torch.uint8)), crf(logits, image.to(torch.uint8).float()))


def test_layer_is_the_function_with_its_features() -> None:
    _, image, logits = scene(batch=2)
    crf = DenseCRF(3, appearance_weight=4.0, appearance_sigma=50.0, color_sigma=5.0, smoothness_sigma=2.0, iterations=4)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    positions = torch.stack([x, y]).expand(2, -1, -1, -1)
    features = [torch.cat([positions / 50.0, image / 5.0], 1), positions / 2.0]
    wanted = dense_crf_mean_field(-logits, features, [4.0, 3.0], iterations=4)
    assert_close(crf(logits, image), wanted, 1e-4)
    volume = DenseCRF(3, appearance_weight=None, smoothness_sigma=2.0, iterations=4)
    cube = torch.randn(1, 3, 4, 5, 6)
    z, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in cube.shape[2:]), indexing="ij")
    wanted = dense_crf_mean_field(-cube, torch.stack([x, y, z])[None] / 2.0, 3.0, iterations=4)
    assert_close(volume(cube), wanted, 1e-5)
    assert DenseCRF(3)(cube, torch.rand(1, 3, 4, 5, 6)).shape == cube.shape


def test_layer_agrees_with_the_numpy_interface() -> None:
    """The same parameters as in pydensecrf, whose results deeplab_kernels.densecrf reproduces."""
    densecrf = pytest.importorskip("deeplab_kernels.densecrf")
    _, image, logits = scene(48, 64)
    image = image.round()
    crf = DenseCRF(3, appearance_weight=4.0, appearance_sigma=30.0, color_sigma=8.0, iterations=5)
    ours = crf(logits, image).detach().softmax(1)[0].flatten(1)
    model = densecrf.DenseCRF2D(64, 48, 3)
    model.setUnaryEnergy((-logits[0]).flatten(1).contiguous().numpy())
    model.addPairwiseGaussian(sxy=3, compat=3)
    pixels = image[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
    model.addPairwiseBilateral(sxy=30, srgb=8, rgbim=pixels, compat=4)
    theirs = torch.tensor(model.inference(5))
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() > 0.999
    assert (ours - theirs).abs().mean() < 1e-4


@pytest.mark.parametrize("compatibility", ["potts", "per_label", "full"])
def test_forms_of_compatibility_start_as_potts(compatibility: str) -> None:
    _, image, logits = scene()
    crf = DenseCRF(3, compatibility=compatibility)
    assert_close(crf(logits, image), DenseCRF(3)(logits, image), 1e-5)
    assert (crf.compatibility is None) == (compatibility == "potts")


def test_gradcheck_of_the_layer() -> None:
    """Every learnable parameter, the three sigmas included, the logits and the guide image."""
    crf = DenseCRF(
        3, iterations=2, trainable=True, compatibility="full", appearance_sigma=2.3, color_sigma=31.0,
        smoothness_sigma=1.7, appearance_weight=1.5, smoothness_weight=0.7,
    ).double()  # fmt: skip
    names = [name for name, _ in crf.named_parameters()]
    assert names == [
        "appearance_weight", "smoothness_weight", "log_appearance_sigma", "log_color_sigma", "log_smoothness_sigma",
        "compatibility",
    ]  # fmt: skip
    logits, image = random(1, 3, 3, 3, requires_grad=True), (torch.rand(1, 3, 3, 3, dtype=D) * 255).requires_grad_()
    # Pixel (0, 0) lies on a vertex of the lattice whatever the sigma, where simplices meet: off with it.
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    parameters = [p.detach().clone().requires_grad_() for p in crf.parameters()]

    def function(logits: Tensor, image: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(crf, dict(zip(names, parameters, strict=True)), (logits, image, mask))

    torch.autograd.gradcheck(function, (logits, image, *parameters), eps=1e-7, atol=1e-4)


def test_layer_learns_its_sigmas_and_weights() -> None:
    torch.manual_seed(1)
    labels, image, logits = scene(batch=2)
    crf = DenseCRF(
        3, iterations=5, trainable=True, appearance_weight=0.5, appearance_sigma=3.0, color_sigma=120.0,
        smoothness_weight=0.2, smoothness_sigma=0.7, compatibility="full",
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in crf.named_parameters()}
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(crf(logits, image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in crf.named_parameters())
    assert crf.color_sigma < 100
    fresh_labels, fresh_image, fresh_logits = scene()
    untrained = copy.deepcopy(crf)
    untrained.load_state_dict(start)
    before = accuracy(untrained(fresh_logits, fresh_image), fresh_labels)
    after = accuracy(crf(fresh_logits, fresh_image), fresh_labels)
    assert after > before + 0.03


def test_layer_can_be_kept_copied_and_moved() -> None:
    _, image, logits = scene()
    crf = DenseCRF(3, compatibility="per_label", trainable=("color_sigma",), iterations=3)
    with torch.no_grad():
        crf.log_color_sigma.add_(0.3)
    wanted = crf(logits, image)
    again = DenseCRF(3, compatibility="per_label", iterations=3)
    again.load_state_dict(crf.state_dict())
    buffer = io.BytesIO()
    torch.save(crf.state_dict(), buffer)
    buffer.seek(0)
    loaded = DenseCRF(3, compatibility="per_label", iterations=3)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (again, loaded, copy.deepcopy(crf), pickle.loads(pickle.dumps(crf)), crf.eval(), crf.train()):
        assert torch.equal(other(logits, image), wanted)
    assert [n for n, p in crf.named_parameters() if p.requires_grad] == ["log_color_sigma"]
    assert_close(copy.deepcopy(crf).double()(logits.double(), image.double()), wanted, 1e-4)
    assert copy.deepcopy(crf).bfloat16()(logits.bfloat16(), image).dtype == torch.bfloat16


def test_trainable_parameters_are_chosen() -> None:
    def trained(**options: Any) -> set[str]:
        return {name for name, p in DenseCRF(3, **options).named_parameters() if p.requires_grad}

    assert trained() == {"appearance_weight", "smoothness_weight"}
    assert trained(compatibility="full") == {"appearance_weight", "smoothness_weight", "compatibility"}
    assert trained(trainable=False) == set()
    assert len(trained(trainable=True, compatibility="full")) == 6
    assert trained(trainable=["color_sigma", "compatibility"]) == {"log_color_sigma"}
    assert "color_sigma=13, smoothness_weight=3" in repr(DenseCRF(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"appearance_sigma": 0}, ValueError, "appearance_sigma must be finite and positive, got 0"),
        ({"color_sigma": -1.0}, ValueError, "color_sigma must be finite and positive"),
        ({"smoothness_sigma": float("nan")}, ValueError, "smoothness_sigma must be finite and positive"),
        ({"smoothness_weight": float("inf")}, ValueError, "smoothness_weight must be finite"),
        ({"appearance_weight": "10"}, TypeError, "appearance_weight must be a number"),
        ({"compatibility": "matrix"}, ValueError, "compatibility must be .* or a tensor, got 'matrix'"),
        ({"compatibility": torch.eye(4)}, ValueError, r"compatibility must have shape \(3,\) or \(3, 3\)"),
        ({"compatibility": 1.0}, TypeError, "compatibility must be a string or a tensor"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of"),
        ({"filter": "box"}, ValueError, "filter must be one of"),
        ({"trainable": "color_sigma"}, TypeError, "trainable must be a bool or a sequence of names"),
        ({"trainable": ["sigma"]}, ValueError, "trainable must be names among"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseCRF(**({"num_classes": 3} | options))


def test_layer_checks_its_inputs() -> None:
    crf = DenseCRF(3)
    logits, image = torch.randn(1, 3, 4, 5), torch.rand(1, 3, 4, 5)
    for wrong, error, message in (
        ((torch.randn(1, 4, 4, 5), image), ValueError, r"logits must have shape \(B, 3, H, W\)"),
        ((logits[0], image), ValueError, r"logits must have shape \(B, 3, H, W\)"),
        ((logits, torch.rand(1, 3, 5, 4)), ValueError, "image must have the batch and size of logits"),
        ((logits, torch.rand(2, 3, 4, 5)), ValueError, "image must have the batch and size of logits"),
        ((logits, image.to(torch.uint16)), TypeError, "image must be uint8, float32, .* got torch.uint16"),
        ((logits, None), TypeError, "image must be given for the appearance kernel"),
        ((logits, torch.rand(1, 15, 4, 5)), ValueError, r"features\[0\] must have 1 to 16 feature dimensions"),
        ((logits, image, torch.ones(1, 4, 5)), TypeError, "mask must be bool"),
        ((logits.abs().neg().sqrt(), image), ValueError, "unary must not hold NaN"),
    ):
        with pytest.raises(error, match=message):
            crf(*wrong)


def test_documentation_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "dense_crf.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
