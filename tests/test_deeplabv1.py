"""DeepLab v1, LargeFOV."""

from __future__ import annotations

import copy

import pytest
import torch
from _models import randomise, relative_error
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models

SIZES = [(1, 1), (1, 7), (5, 33), (64, 50), (97, 65)]


def small(name: str = "deeplabv1_small", **options: object) -> nn.Module:
    return randomise(models.build(name, 5, **options))


def test_the_papers_network() -> None:
    model = models.build("deeplabv1_vgg16", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 20_505_429  # 20.5 M in the paper's table 2
    fc6, fc7, fc8 = (model.head.branches[0].get_submodule(name) for name in ("fc6", "fc7", "fc8"))
    assert fc6.weight.shape == (1024, 512, 3, 3)
    assert fc6.dilation == fc6.padding == (12, 12)
    assert fc7.weight.shape == (1024, 1024, 1, 1)
    assert fc8.weight.shape == (21, 1024, 1, 1)
    assert model.output_stride == 8
    x = torch.empty(1, 3, 321, 321, device="meta")
    assert model.scores(x).shape == (1, 21, 41, 41)
    assert model.eval()(x).shape == (1, 21, 321, 321)


def test_forward_is_the_plain_composition() -> None:
    model = small().double().eval()
    x = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    branch = model.head.branches[0]
    with torch.no_grad():
        y = model.backbone.features(x)
        y = F.conv2d(y, branch.fc6.weight, branch.fc6.bias, padding=5, dilation=5)
        y = branch.fc7(branch.norm6(y).relu())
        y = branch.fc8(branch.norm7(y).relu())
        expected = F.interpolate(y, (65, 49), mode="bilinear", align_corners=True)
        assert relative_error(model(x), expected) < 1e-12


def test_score_map_is_the_dense_sliding_evaluation() -> None:
    # fc6 with rate r is a 3x3 classifier that looks at every r-th feature, evaluated at every position: on each of the
    # r x r phases of the feature map it is an ordinary convolution.
    head = small().head.double().eval()
    (rate,) = head.rates
    features = torch.randn(1, 64, 3 * rate, 4 * rate, dtype=torch.float64)
    plain = copy.deepcopy(head)
    plain.set_rates([1])
    with torch.no_grad():
        scores = head(features)
        for i in range(rate):
            for j in range(rate):
                expected = plain(features[:, :, i::rate, j::rate])
                assert relative_error(scores[:, :, i::rate, j::rate], expected) < 1e-12


@pytest.mark.parametrize(("output_stride", "rate"), [(8, 12), (16, 6), (32, 3)])
def test_output_stride(output_stride: int, rate: int) -> None:
    model = models.build("deeplabv1_vgg16", output_stride=output_stride, device="meta")
    assert model.output_stride == model.backbone.output_stride == output_stride
    assert model.head.rates == (rate,)
    assert model.scores(torch.empty(1, 3, 321, 321, device="meta")).shape[2] == 320 // output_stride + 1


def test_switching_the_output_stride_equals_building_at_it() -> None:
    built = small(output_stride=16).eval()
    switched = copy.deepcopy(built)
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        switched.set_output_stride(8)
        assert not torch.allclose(switched(x), built(x))
        switched.set_output_stride(16)
        assert torch.equal(switched(x), built(x))
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        switched.set_output_stride(4)


@pytest.mark.parametrize("size", SIZES)
def test_any_size(size: tuple[int, int]) -> None:
    model = small().eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\)"):
        model(torch.randn(1, 4, *size))


def test_training_learns_and_reaches_every_parameter() -> None:
    model = models.build("deeplabv1_small", num_classes=3)
    labels = (torch.arange(33) // 11).expand(4, 33, 33)  # vertical stripes, told apart by colour
    x = F.one_hot(labels, 3).permute(0, 3, 1, 2) + 0.2 * torch.randn(4, 3, 33, 33)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_compile() -> None:
    model = small().train()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 33, 49)
    actual, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(x), reference(x)
    assert relative_error(actual, expected) < 1e-4
    actual.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item() + 1e-4), name
