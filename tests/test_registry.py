"""models.build and models.list_models."""

from __future__ import annotations

import time

import pytest
import torch
from _processes import run_python

from deeplab_kernels import models

NAMES = ["deeplabv3_resnet101", "deeplabv3plus_small", "deeplabv3plus_xception65"]


def test_list_models() -> None:
    assert set(NAMES) <= set(models.list_models())
    assert models.list_models() == sorted(models.list_models())


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_builds_and_gives_logits_of_the_image_size(name: str) -> None:
    model = models.build(name, num_classes=7, device="meta").eval()
    assert model.num_classes == 7
    assert model.output_stride in (8, 16, 32)
    assert model(torch.empty(2, 3, 65, 97, device="meta")).shape == (2, 7, 65, 97)
    assert models.madds(model, 65) >= models.madds(model, 65, "true") > 0


def test_unknown_name_gives_close_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'deeplabv3plus_xception_65'; did you mean 'deeplabv3plus_xception65'"):
        models.build("deeplabv3plus_xception_65")
    with pytest.raises(ValueError, match=r"there are .*deeplabv3plus_small"):
        models.build("zzz")
    with pytest.raises(ValueError, match="name must be"):
        models.build(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got 2.0"),
        ({"output_stride": 4}, ValueError, "output_stride must be 8, 16 or 32, got 4"),
        ({"output_stride": "16"}, ValueError, "output_stride must be 8, 16 or 32, got '16'"),
        ({"backbone": "vgg"}, TypeError, "has no option 'backbone'; it has num_classes, output_stride, decoder"),
        ({"colour": 1}, TypeError, "has no option 'colour'"),
        ({"multi_grid": (1, 2)}, ValueError, r"multi_grid must be 3 positive ints, got \(1, 2\)"),
        ({"multi_grid": 2}, ValueError, "multi_grid must be 3 positive ints, got 2"),
        ({"atrous_rates": (6, 0, 18)}, ValueError, r"atrous_rates must be positive ints, got \(6, 0, 18\)"),
        ({"atrous_rates": 6}, ValueError, "atrous_rates must be positive ints, got 6"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating point dtype, got torch.int32"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.build("deeplabv3plus_small", **{"device": "meta", **options})


def test_every_model_takes_a_crf_as_last_stage() -> None:
    for name in ("deeplabv3plus_small", "deeplabv1_small"):  # of the registry, and the system's own option
        model = models.build(name, 3, crf={"iterations": 2}, device="meta")
        assert model.crf.iterations == 2
        assert model.num_classes == 3
        assert models.build(name, 3, device="meta").state_dict().keys() == model.model.state_dict().keys()


def test_dtype_and_device() -> None:
    model = models.build("deeplabv3plus_small", device="meta", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.get_default_device().type == "cpu"


def test_xception65_builds_in_under_three_seconds() -> None:
    # Processor time of this thread: the bar is not about what else the machine does.
    start = time.thread_time()
    models.build("deeplabv3plus_xception65")
    assert time.thread_time() - start < 3


def test_seed_decides_the_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.build("deeplabv3plus_small").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_import_builds_nothing() -> None:
    code = (
        "import torch; made = []; old = torch.nn.Module.__init__\n"
        "torch.nn.Module.__init__ = lambda self, *a, **k: (made.append(type(self).__name__), old(self, *a, **k))[1]\n"
        "import deeplab_kernels.models\n"
        "assert not made, made"
    )
    run_python(code)
