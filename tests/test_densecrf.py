"""deeplab_kernels.densecrf: pydensecrf's interface and results; arrays of any type and layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import densecrf_cases as models
import numpy as np
import pytest
from _densecrf import assert_same, model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf
from deeplab_kernels.densecrf import utils

pytestmark = pytest.mark.usefixtures("two_densecrf_threads")

RECORDED = Path(__file__).parent / "data" / "densecrf.npz"


# pydensecrf's results.


@pytest.mark.parametrize("name", models.cases())
def test_recorded_outputs_of_pydensecrf(name: str) -> None:
    outputs = models.cases()[name](dcrf)
    with np.load(RECORDED) as recorded:
        assert {f"{name}|{key}" for key in outputs} == {key for key in recorded if key.split("|")[0] == name}
        for key, ours in outputs.items():
            theirs = recorded[f"{name}|{key}"]
            if key == "kl":
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)
            else:
                assert_same(ours, theirs / np.float64(65535))


def test_recorded_outputs_are_of_these_models(pydensecrf: ModuleType) -> None:
    """And the models still run unchanged with pydensecrf itself."""
    with np.load(RECORDED) as recorded:
        for name in ("both", "steps", "2-D, NORMALIZE_BEFORE", "unary: logistic"):
            for key, theirs in models.cases()[name](pydensecrf).items():
                if key != "kl":
                    np.testing.assert_allclose(theirs, recorded[f"{name}|{key}"] / np.float64(65535), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    labels=st.integers(2, 9),
    sxy=st.floats(0.5, 90),
    srgb=st.floats(3, 90),
    compat=st.floats(-2, 10),
    seed=st.integers(0, 1000),
    normalization=st.integers(1, 3),
)
def test_any_model_as_pydensecrf(pydensecrf, height, width, labels, sxy, srgb, compat, seed, normalization) -> None:
    arguments = {"sxy": sxy, "srgb": srgb, "compat": compat}

    def infer(module: ModuleType) -> NDArray[Any]:
        d = module.DenseCRF2D(width, height, labels)
        d.setUnaryEnergy(models.unary(labels, height * width, seed))
        d.addPairwiseGaussian(3, 3)
        d.addPairwiseBilateral(rgbim=models.image(height, width, seed), normalization=normalization, **arguments)
        return np.array(d.inference(5))

    assert_same(infer(dcrf), infer(pydensecrf))


@pytest.mark.parametrize(("name", "sxy", "srgb"), [("astronaut", 80, 13), ("coffee", 49, 5), ("chelsea", 30, 3)])
def test_photographs_as_pydensecrf(pydensecrf: ModuleType, name: str, sxy: float, srgb: float) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    photograph = np.ascontiguousarray(getattr(skimage_data, name)()[:261:2, :397:2, :3])
    height, width = photograph.shape[:2]

    def infer(module: ModuleType) -> NDArray[Any]:
        d = module.DenseCRF2D(width, height, 8)
        d.setUnaryEnergy(models.unary(8, height * width))
        d.addPairwiseGaussian(3, 3)
        d.addPairwiseBilateral(sxy, srgb, photograph, 10)
        return np.array(d.inference(10))

    assert_same(infer(dcrf), infer(pydensecrf))


# The interface.

INTERFACE = {
    "DenseCRF": "(nvar, nlabels)",
    "DenseCRF2D": "(w, h, nlabels)",
    "ConstUnary": "(u)",
    "LogisticUnary": "(L, f)",
    "DenseCRF.setUnaryEnergy": "(self, u, f=None)",
    "DenseCRF.setUnary": "(self, u)",
    "DenseCRF.addPairwiseEnergy": "(self, features, compat, kernel=1, normalization=3)",
    "DenseCRF.inference": "(self, niter)",
    "DenseCRF.startInference": "(self)",
    "DenseCRF.stepInference": "(self, Q, tmp1, tmp2)",
    "DenseCRF.klDivergence": "(self, Q)",
    "DenseCRF2D.addPairwiseGaussian": "(self, sxy, compat, kernel=1, normalization=3)",
    "DenseCRF2D.addPairwiseBilateral": "(self, sxy, srgb, rgbim, compat, kernel=1, normalization=3)",
    "utils.unary_from_labels": "(labels, n_labels, gt_prob, zero_unsure=True)",
    "utils.compute_unary": "(labels, M, GT_PROB=0.5)",
    "utils.unary_from_softmax": "(sm, scale=None, clip=1e-05)",
    "utils.softmax_to_unary": "(sm, GT_PROB=1)",
    "utils.create_pairwise_gaussian": "(sdims, shape)",
    "utils.create_pairwise_bilateral": "(sdims, schan, img, chdim=-1)",
}


@pytest.mark.parametrize(("name", "expected"), INTERFACE.items())
def test_argument_names_and_defaults(name: str, expected: str) -> None:
    function: Any = dcrf
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    # stepInference's temporary arrays may be left out.
    defaults = {p.name: p.default for p in positional if p.default is not p.empty and not p.name.startswith("tmp")}
    shown = [
        p.name + (f"={int(d) if isinstance(d, int) else d!r}" if (d := defaults.get(p.name, p)) is not p else "")
        for p in positional
    ]
    assert "(" + ", ".join(shown) + ")" == expected.replace("=True", "=1")


def test_constants_and_enums() -> None:
    assert [(k.name, k.value) for k in dcrf.KernelType] == list(zip(models.KERNELS, range(3), strict=True))
    assert [(n.name, n.value) for n in dcrf.NormalizationType] == list(
        zip(models.NORMALIZATIONS, range(4), strict=True)
    )
    for name in models.KERNELS:
        assert getattr(dcrf, name) is dcrf.KernelType[name]
    for name in models.NORMALIZATIONS:
        assert getattr(dcrf, name) is dcrf.NormalizationType[name]


def test_every_name_of_pydensecrf(pydensecrf: ModuleType) -> None:
    own = {"Number", "eigen"}  # what it imports
    for name in set(dir(pydensecrf)) - own:
        if not name.startswith("_"):
            ours, theirs = getattr(dcrf, name), getattr(pydensecrf, name)
            methods = [m for m in dir(theirs) if not m.startswith("_")] if inspect.isclass(theirs) else []
            assert [m for m in methods if not hasattr(ours, m)] == []


def test_inference_returns_probabilities() -> None:
    q = model().inference(5)
    assert isinstance(q, np.ndarray)
    assert q.shape == (4, 13 * 17)
    assert q.dtype == np.float32
    assert q.flags.f_contiguous
    assert q.flags.writeable
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("size", [(13, 17), (12, 16)])
def test_steps_are_inference(size: tuple[int, int]) -> None:
    d = model(size)
    q, tmp1, tmp2 = d.startInference()
    np.testing.assert_array_equal(q, d.inference(0))
    for _ in range(3):
        d.stepInference(q, tmp1, tmp2)
    np.testing.assert_allclose(q, d.inference(3), atol=1e-6)
    # Other layouts and types are overwritten in place as well.
    for given_q in (
        np.ascontiguousarray(d.inference(2)),
        d.inference(2).astype(np.float64),
        d.inference(2)[::-1][::-1],
    ):
        d.stepInference(given_q)
        np.testing.assert_allclose(given_q, q, atol=1e-6)


def test_a_changed_model_is_used_by_the_next_step() -> None:
    d = model()
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    before = d.klDivergence(q)
    d.addPairwiseGaussian(2, 5)
    assert d.klDivergence(q) != before
    d.setUnaryEnergy(models.unary(4, 13 * 17, 9))
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    np.testing.assert_allclose(q, d.inference(1), atol=1e-6)


def test_divergence_falls_to_the_log_partition_function_of_independent_points() -> None:
    """Without kernels the least divergence is -sum_i log sum_l exp(-u_il), at Q = softmax(-u)."""
    u = models.unary(3, 50)
    d = dcrf.DenseCRF(50, 3)
    d.setUnaryEnergy(u)
    q = d.inference(1)
    least = -np.log(np.exp(-u.astype(np.float64)).sum(0)).sum()
    assert d.klDivergence(q) == pytest.approx(least, rel=1e-6)
    assert d.klDivergence(np.full((3, 50), 1 / 3)) > least + 1


def test_the_unary_is_copied() -> None:
    u = models.unary(4, 13 * 17)
    d, unary = model(), dcrf.ConstUnary(u)
    d.setUnaryEnergy(u)
    expected = d.inference(3)
    u[:] = 0
    np.testing.assert_array_equal(d.inference(3), expected)
    for _ in range(2):  # pydensecrf's ConstUnary can be used once
        d.setUnary(unary)
        np.testing.assert_array_equal(d.inference(3), expected)


def test_progress() -> None:
    calls: list[int] = []
    q = model().inference(4, progress=calls.append)
    assert calls == [1, 2, 3, 4]
    np.testing.assert_array_equal(q, model().inference(4))

    def stop(t: int) -> None:
        raise KeyError(t)

    with pytest.raises(KeyError, match="1"):
        model().inference(4, progress=stop)


def test_subclasses() -> None:
    class Mine(dcrf.DenseCRF2D):
        def __init__(self, side: int) -> None:
            super().__init__(side, side, nlabels=2)

    d = Mine(5)
    d.addPairwiseGaussian(2, 1)
    assert d.inference(1).shape == (2, 25)


@pytest.mark.parametrize(("height", "width"), [(13, 17), (37, 211)])  # the second is visited in rectangles
def test_2d_kernels_are_general_kernels(height: int, width: int) -> None:
    image = models.image(height, width)
    general = dcrf.DenseCRF(height * width, 4)
    general.setUnaryEnergy(models.unary(4, height * width))
    general.addPairwiseEnergy(utils.create_pairwise_gaussian((3, 3), (height, width))[::-1], 3)
    order = [1, 0, 2, 3, 4]
    general.addPairwiseEnergy(utils.create_pairwise_bilateral((20, 20), (13,) * 3, image, 2)[order], 10)
    np.testing.assert_allclose(general.inference(5), model((height, width)).inference(5), atol=1e-4)


# Types and layouts.


@pytest.mark.parametrize(
    "convert",
    [
        np.float64,
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: a.astype(">f4"),
        lambda a: a.tolist(),
        lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape),
    ],
    ids=["float64", "Fortran", "strided", "negative strides", "big endian", "list", "unaligned and read-only"],
)
def test_arrays_of_any_layout(convert: Callable[[Any], Any]) -> None:
    def infer(change: Callable[[Any], Any]) -> NDArray[Any]:
        d = dcrf.DenseCRF(130, 3)
        d.setUnaryEnergy(change(models.unary(3, 130)))
        d.addPairwiseEnergy(change(models.features(4, 130)), change(models.matrix(3)))
        return d.inference(3)

    np.testing.assert_array_equal(infer(convert), infer(lambda a: a))


@pytest.mark.parametrize(
    "convert",
    [
        np.float32,
        np.float64,
        np.float16,
        np.uint16,
        np.int64,
        np.asfortranarray,
        lambda a: np.repeat(a, 3, axis=1)[:, ::3],
        lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
        lambda a: np.moveaxis(np.moveaxis(a, 2, 0).copy(), 0, 2),
        lambda a: a.astype(">u2"),
        lambda a: a.tolist(),
    ],
)
def test_images_of_any_type(convert: Callable[[Any], Any]) -> None:
    """The values count, whatever their type."""

    def infer(change: Callable[[Any], Any]) -> NDArray[Any]:
        d = dcrf.DenseCRF2D(29, 33, 2)
        d.setUnaryEnergy(models.unary(2, 29 * 33))
        d.addPairwiseBilateral(20, 13, change(models.image(33, 29)), 5)
        return d.inference(3)

    np.testing.assert_array_equal(infer(convert), infer(lambda a: a))


def test_16_bit_image() -> None:
    image = models.image(33, 29).astype(np.uint16)

    def infer(factor: int) -> NDArray[Any]:
        d = dcrf.DenseCRF2D(29, 33, 2)
        d.setUnaryEnergy(models.unary(2, 29 * 33))
        d.addPairwiseBilateral(20, 16 * factor, image * factor, 5)
        return d.inference(3)

    np.testing.assert_allclose(infer(257), infer(1), atol=1e-3)


@pytest.mark.parametrize(("points", "labels"), [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1), (3, 300)])
def test_few_points_and_labels(points: int, labels: int) -> None:
    d = dcrf.DenseCRF(points, labels)
    d.setUnaryEnergy(np.zeros((labels, points)))
    d.addPairwiseEnergy(np.zeros((2, points)), 1)
    q, tmp1, tmp2 = d.startInference()
    d.stepInference(q, tmp1, tmp2)
    assert d.klDivergence(q) == pytest.approx(-points * (np.log(labels) + 1 / labels), rel=1e-4)
    np.testing.assert_allclose(d.inference(3), np.full((labels, points), 1 / labels), atol=1e-6)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size: tuple[int, int]) -> None:
    d = dcrf.DenseCRF2D(*size, 3)
    d.setUnaryEnergy(np.zeros((3, 0)))
    d.addPairwiseGaussian(3, 3)
    d.addPairwiseBilateral(3, 3, np.zeros((size[1], size[0], 3), np.uint8), 3)
    assert d.inference(5).shape == (3, 0)
