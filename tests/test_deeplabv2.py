"""DeepLab v2: ASPP by summed scores, and the fusion of scales."""

from __future__ import annotations

import pytest
import torch
from _models import randomise, relative_error
from _systems import check_any_size, check_compile, check_training
from torch import nn
from torch.nn import functional as F

from deeplab_kernels import models
from deeplab_kernels.models.deeplabv2 import ASPP_L, ASPP_S
from deeplab_kernels.models.layers import resize_bilinear
from deeplab_kernels.models.multi_scale import max_over_scales, scaled_size, score_maps


def small(**options: object) -> nn.Module:
    return randomise(models.build("deeplabv2_aspp_s_small", 5, **options)).eval()


@pytest.mark.parametrize(("kind", "rates"), [("s", (2, 4, 8, 12)), ("l", (6, 12, 18, 24))])
def test_the_papers_networks(kind: str, rates: tuple[int, ...]) -> None:
    assert rates == {"s": ASPP_S, "l": ASPP_L}[kind]
    model = models.build(f"deeplabv2_aspp_{kind}_vgg16", device="meta")
    assert model.head.rates == rates
    for branch, rate in zip(model.head.branches, rates, strict=True):
        assert branch.fc6.dilation == branch.fc6.padding == (rate, rate)
        assert branch.fc6.weight.shape == (1024, 512, 3, 3)
        assert branch.fc8.weight.shape == (21, 1024, 1, 1)
    large_fov = models.build("deeplabv1_vgg16", device="meta")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, large_fov.head, large_fov.backbone)]
    assert sizes[0] == 4 * sizes[1] + sizes[2] == 37_877_652
    model.set_output_stride(16)
    assert model.head.rates == tuple(r // 2 for r in rates)
    assert model.scores(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 21, 21)


def test_scores_of_the_branches_are_summed() -> None:
    model = small().double()
    x = torch.randn(1, 3, 65, 49, dtype=torch.float64)
    with torch.no_grad():
        features = model.backbone(x).output
        expected = sum(branch(features) for branch in model.head.branches)
        assert relative_error(model.scores(x), expected) < 1e-12
        assert relative_error(model(x), resize_bilinear(expected, (65, 49))) < 1e-12


def test_fusion_of_scales_is_the_plain_composition() -> None:
    model = small(scales=(0.5, 0.75, 1.0)).double()
    x = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    with torch.no_grad():
        maps = [model.scores(resize_bilinear(x, size)) for size in ((49, 33), (73, 49))] + [model.scores(x)]
        size = maps[-1].shape[2:]
        expected = torch.stack([resize_bilinear(m, size) for m in maps]).amax(0)
        assert relative_error(model(x), resize_bilinear(expected, (97, 65))) < 1e-12
        model.scales = (1.0,)
        assert relative_error(model(x), resize_bilinear(maps[-1], (97, 65))) < 1e-12


def test_fusion_shares_weights_and_reaches_them_from_every_scale() -> None:
    plain, fused = (models.build("deeplabv2_aspp_l_small", scales=s) for s in ((1.0,), (0.5, 0.75, 1.0)))
    assert list(plain.state_dict()) == list(fused.state_dict())
    x = torch.randn(1, 3, 33, 33, requires_grad=True)
    calls: list[torch.Size] = []

    def scores(image: torch.Tensor) -> torch.Tensor:
        calls.append(image.shape[2:])
        return image * (2.0 if len(calls) == 1 else 1.0)

    fused_map = max_over_scales(score_maps(scores, x, (0.5, 1.0)))
    assert calls == [(17, 17), (33, 33)]
    assert (fused_map >= x).all()
    assert not torch.equal(fused_map, x)
    assert max_over_scales(score_maps(lambda image: image, x, (0.5, 0.75))).shape == (1, 3, 25, 25)


def test_a_loss_at_each_scale() -> None:
    model = small(scales=(0.5, 1.0), scale_losses=True)
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        fused = model(x)
        maps = [resize_bilinear(scores, (33, 33)) for scores in score_maps(model.scores, x, (0.5, 1.0)).values()]
        model.training = True  # the flag alone, so that batch normalisation stays the same
        outputs = model(x)
        model.scales = (1.0,)
        assert torch.equal(model(x), maps[1])  # nothing is fused
    assert len(outputs) == 3
    assert all(map(torch.equal, outputs, [fused, *maps]))
    trained = models.build("deeplabv2_aspp_s_small", 3, scales=(0.5, 1.0), scale_losses=True)
    check_training(trained, loss_of=lambda outputs, labels: sum(F.cross_entropy(o, labels) for o in outputs))


@pytest.mark.parametrize(("size", "scaled"), [((321, 321), (161, 161)), ((1, 2), (1, 1)), ((65, 33), (33, 17))])
def test_scaled_size_keeps_corners(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert scaled_size(size, 0.5) == scaled


@pytest.mark.parametrize("scales", [(), (0.5, 0.0), 0.5, (float("inf"),), "1"])
def test_bad_scales_are_named(scales: object) -> None:
    with pytest.raises(ValueError, match="scales must be positive numbers, got"):
        models.build("deeplabv2_aspp_s_small", scales=scales, device="meta")


def test_any_size_training_and_compilation() -> None:
    check_any_size(small(scales=(0.5, 0.75, 1.0)))
    check_training(models.build("deeplabv2_aspp_l_small", 3))
    check_compile(small(scales=(0.5, 1.0)), (17, 21))


def test_on_resnet101() -> None:
    model = models.build("deeplabv2_aspp_l_resnet101", device="meta")
    assert [b.dilation[0] for b in model.head.branches] == list(ASPP_L)
    assert {b.weight.shape for b in model.head.branches} == {(21, 2048, 3, 3)}
    assert [p.dilation[0] for p in models.build("deeplabv2_aspp_s_resnet101", device="meta").head.branches] == list(
        ASPP_S
    )
    assert model.scores(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 41, 41)


def test_crf_is_the_last_stage() -> None:
    stage = models.build("deeplabv2_aspp_s_small", 5, crf={"iterations": 1}, scales=(0.5, 1.0)).eval()
    with torch.no_grad():
        assert stage(torch.rand(1, 3, 33, 21) * 2 - 1).shape == (1, 5, 33, 21)
    assert stage.model.scales == (0.5, 1.0)
