"""The dense CRF as the last stage of a network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deeplab_kernels import models
from deeplab_kernels.models.crf_stage import DEEPLAB_CRF, DenseCRFStage, with_crf
from deeplab_kernels.models.system import IMAGENET
from deeplab_kernels.nn import DenseCRF


def small(**options: object) -> nn.Module:
    return models.build("deeplabv1_small", 4, **options)


def image(*size: int) -> Tensor:
    return torch.rand(2, 3, *size) * 2 - 1


def test_equals_the_layer_called_by_hand() -> None:
    model = small().eval()
    model.normalization = IMAGENET
    crf = DenseCRF(4, iterations=3, appearance_sigma=9.0, color_sigma=20.0)
    rgb = torch.rand(2, 3, 33, 21) * 255
    x = IMAGENET.apply(rgb)
    with torch.no_grad():
        actual = with_crf(model, crf)(x)
        assert torch.allclose(actual, crf(model(x), rgb), atol=1e-4)
        assert not torch.allclose(actual, model(x), atol=1e-2)


def test_options_reach_the_layer() -> None:
    stage = with_crf(small(), iterations=2, filter="local", window=3, trainable=["smoothness_weight"])
    assert isinstance(stage, DenseCRFStage)
    assert (stage.crf.iterations, stage.crf.filter, stage.crf.window) == (2, "local", 3)
    assert [n for n, p in stage.crf.named_parameters() if p.requires_grad] == ["smoothness_weight"]
    papers = models.build("deeplabv1_small", crf=True).crf
    assert papers.appearance_sigma.item() == pytest.approx(DEEPLAB_CRF["appearance_sigma"])
    assert not any(p.requires_grad for p in papers.parameters())
    assert models.build("deeplabv1_small", crf={"iterations": 7}).crf.iterations == 7
    assert not isinstance(models.build("deeplabv1_small", crf=False), DenseCRFStage)
    model = small()
    assert with_crf(model, False) is model


def test_attributes_are_those_of_the_model() -> None:
    model = small()
    stage = with_crf(model)
    stage.set_output_stride(16)
    assert stage.output_stride == model.output_stride == 16
    assert stage.num_classes == 4
    stage.normalization = IMAGENET
    assert model.normalization is stage.normalization is IMAGENET


def test_loads_the_state_of_the_model_alone_and_its_own() -> None:
    model = small()
    stage = with_crf(small(), iterations=1)
    with torch.no_grad():
        stage.crf.appearance_weight.fill_(7)
    outer = nn.Sequential(copy.deepcopy(stage))
    stage.load_state_dict(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in stage.model.state_dict().items())
    assert stage.crf.appearance_weight.item() == 7
    outer.load_state_dict({f"0.{k}": v for k, v in model.state_dict().items()})
    assert torch.equal(outer[0].model.head.branches[0].fc8.weight, model.head.branches[0].fc8.weight)
    other = with_crf(small())
    other.load_state_dict(stage.state_dict())
    assert other.crf.appearance_weight.item() == 7
    with pytest.raises(RuntimeError, match="Missing key"):
        stage.load_state_dict({k: v for k, v in model.state_dict().items() if "fc8" not in k})


def test_trains_network_and_crf_together() -> None:
    stage = with_crf(small(), iterations=2, trainable=True).train()
    stage(image(33, 33)).square().sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert stage.crf.appearance_weight.grad != 0


def test_auxiliary_logits_pass_by_the_crf() -> None:
    stage = with_crf(models.build("pspnet_small", 4, auxiliary=True), iterations=1).train()
    refined, auxiliary = stage(image(33, 33))
    assert refined.shape == auxiliary.shape == (2, 4, 33, 33)
    assert stage.eval()(image(33, 33)).shape == refined.shape


@pytest.mark.filterwarnings("ignore")
def test_compiles_and_takes_one_pixel() -> None:
    stage = with_crf(small(), iterations=2).eval()
    with torch.no_grad():
        assert stage(image(1, 1)).shape == (2, 4, 1, 1)
        x = image(33, 21)
        assert torch.allclose(torch.compile(stage, backend="aot_eager", fullgraph=True)(x), stage(x), atol=1e-3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="crf must have the 4 classes of the model, got 5"):
        with_crf(small(), DenseCRF(5))
    with pytest.raises(TypeError, match="options of a CRF that is already built: iterations"):
        with_crf(small(), DenseCRF(4), iterations=3)
    with pytest.raises(TypeError, match="crf must be a DenseCRF, its options, or a bool, got 5"):
        with_crf(small(), 5)  # type: ignore[arg-type]
