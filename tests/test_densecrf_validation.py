"""deeplab_kernels.densecrf: what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _densecrf import model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deeplab_kernels.densecrf as dcrf
from deeplab_kernels.densecrf import eigen, utils

pytestmark = pytest.mark.usefixtures("two_densecrf_threads")


def crf() -> Any:
    return dcrf.DenseCRF2D(5, 4, 3)


IMAGE = np.zeros((4, 5, 3), np.uint8)
NAN_IMAGE = np.where(np.arange(60).reshape(4, 5, 3) == 37, np.nan, 0)
UNARY = np.zeros((3, 20))
NAN_UNARY = np.where(np.arange(60).reshape(3, 20) == 27, np.nan, 0)
FEATURES = np.zeros((2, 20))

BAD = {
    "nvar": (lambda: dcrf.DenseCRF(-1, 2), ValueError, "nvar must be at least 0, got -1"),
    "nvar type": (lambda: dcrf.DenseCRF(2.5, 2), TypeError, "nvar must be an integer, got 2.5"),
    "nlabels": (lambda: dcrf.DenseCRF(5, 0), ValueError, "nlabels must be at least 1, got 0"),
    "w": (lambda: dcrf.DenseCRF2D(-3, 5, 2), ValueError, "w must be at least 0, got -3"),
    "h type": (lambda: dcrf.DenseCRF2D(3, "5", 2), TypeError, "h must be an integer, got '5'"),
    "unary shape": (lambda: crf().setUnaryEnergy(UNARY[:, :19]), ValueError, r"u must .*\(3, 20\), got \(3, 19\)"),
    "unary labels": (lambda: crf().setUnaryEnergy(UNARY[:2]), ValueError, r"u must .*\(3, 20\), got \(2, 20\)"),
    "unary image": (lambda: crf().setUnaryEnergy(UNARY.reshape(3, 4, 5)), ValueError, r"u must have 2 .*\(3, 4, 5\)"),
    "unary type": (lambda: crf().setUnaryEnergy(UNARY.astype(complex)), TypeError, "u must hold real .*complex128"),
    "unary None": (lambda: crf().setUnaryEnergy(None), TypeError, "u must hold real numbers"),
    "unary NaN": (lambda: crf().setUnaryEnergy(NAN_UNARY), ValueError, r"u is NaN or -infinity at \[1, 7\]"),
    "unary -inf": (lambda: crf().setUnaryEnergy(UNARY - np.inf), ValueError, r"u is NaN or -infinity at \[0, 0\]"),
    "unary inf": (lambda: crf().setUnaryEnergy(UNARY + np.inf), ValueError, "u is .infinity for all labels of point 0"),
    "unary huge": (lambda: crf().setUnaryEnergy(UNARY - 1e300), ValueError, "u is NaN or -infinity"),
    "unary product": (
        lambda: crf().setUnaryEnergy(np.zeros((3, 4)), np.zeros((5, 20))),
        ValueError,
        r"u @ f needs .*\(3, 4\) and \(5, 20\)",
    ),
    "unary product NaN": (
        lambda: crf().setUnaryEnergy(np.full((3, 4), np.nan), np.zeros((4, 20))),
        ValueError,
        "u @ f is NaN",
    ),
    "const unary": (lambda: dcrf.ConstUnary(np.zeros(5)), ValueError, r"u must have 2 dimensions, got shape \(5,\)"),
    "const unary size": (
        lambda: crf().setUnary(dcrf.ConstUnary(UNARY[:, 1:])),
        ValueError,
        r"u must have shape .*\(3, 20\), got \(3, 19\)",
    ),
    "logistic unary": (
        lambda: dcrf.LogisticUnary(np.zeros((3, 4)), np.zeros((3, 20))),
        ValueError,
        r"L @ f needs .*\(3, 4\) and \(3, 20\)",
    ),
    "unary object": (lambda: crf().setUnary(UNARY), TypeError, "ConstUnary or LogisticUnary, got ndarray"),
    "plain unary": (dcrf.Unary, TypeError, "use ConstUnary"),
    "features shape": (
        lambda: crf().addPairwiseEnergy(FEATURES[:, 1:], 1),
        ValueError,
        r"features must have shape \(d, 20\) with d = 1 to 16, got \(2, 19\)",
    ),
    "no features": (lambda: crf().addPairwiseEnergy(FEATURES[:0], 1), ValueError, r"got \(0, 20\)"),
    "17 features": (lambda: crf().addPairwiseEnergy(np.zeros((17, 20)), 1), ValueError, r"got \(17, 20\)"),
    "features vector": (
        lambda: crf().addPairwiseEnergy(FEATURES[0], 1),
        ValueError,
        r"2 dimensions, got shape \(20,\)",
    ),
    "features NaN": (
        lambda: crf().addPairwiseEnergy(FEATURES + np.eye(2, 20) * np.nan, 1),
        ValueError,
        r"features is NaN or infinite at \[0, 0\]",
    ),
    "features inf": (
        lambda: crf().addPairwiseEnergy(np.where(np.arange(40).reshape(2, 20) == 33, -np.inf, 0), 1),
        ValueError,
        r"features is NaN or infinite at \[1, 13\]",
    ),
    "features far": (
        lambda: crf().addPairwiseEnergy(np.where(np.arange(40).reshape(2, 20) == 33, 1e9, 0), 1),
        ValueError,
        r"features is too far from 0 .* at \[1, 13\]: .* below about",
    ),
    "features beyond float32": (
        lambda: crf().addPairwiseEnergy(FEATURES + 1e300, 1),
        ValueError,
        "features is NaN or inf",
    ),
    "compat shape": (
        lambda: crf().addPairwiseGaussian(3, np.zeros(4)),
        ValueError,
        r"compat must be a number or have shape \(3,\) or \(3, 3\) .* got shape \(4,\)",
    ),
    "compat matrix": (lambda: crf().addPairwiseGaussian(3, np.zeros((3, 4))), ValueError, r"got shape \(3, 4\)"),
    "compat cube": (lambda: crf().addPairwiseGaussian(3, np.zeros((3, 3, 3))), ValueError, r"got shape \(3, 3, 3\)"),
    "compat NaN": (lambda: crf().addPairwiseGaussian(3, np.nan), ValueError, "compat must be finite"),
    "compat huge": (lambda: crf().addPairwiseGaussian(3, 1e300), ValueError, "compat must be finite"),
    "compat type": (lambda: crf().addPairwiseGaussian(3, "3"), TypeError, "compat must hold real numbers"),
    "compat None": (lambda: crf().addPairwiseEnergy(FEATURES, None), TypeError, "compat must hold real numbers"),
    "kernel": (
        lambda: crf().addPairwiseGaussian(3, 3, kernel=3),
        ValueError,
        r"kernel must be .*FULL_KERNEL \(2\), got 3",
    ),
    "normalization": (
        lambda: crf().addPairwiseGaussian(3, 3, normalization="symmetric"),
        ValueError,
        r"normalization must be one of NO_NORMALIZATION \(0\), .* got 'symmetric'",
    ),
    "sxy 0": (lambda: crf().addPairwiseGaussian(0, 3), ValueError, "sxy must be greater than 0, got 0"),
    "sxy negative": (lambda: crf().addPairwiseGaussian((3, -1), 3), ValueError, r"sxy must be greater .* \(3, -1\)"),
    "sxy NaN": (lambda: crf().addPairwiseGaussian(np.nan, 3), ValueError, "sxy must be greater than 0, got nan"),
    "sxy underflow": (lambda: crf().addPairwiseGaussian(1e-300, 3), ValueError, "sxy must be greater than 0"),
    "sxy tiny": (lambda: crf().addPairwiseGaussian(1e-30, 3), ValueError, "sxy is too far .* row 0, column 1"),
    "sxy count": (lambda: crf().addPairwiseGaussian((3, 3, 3), 3), ValueError, r"sxy must be a number or 2 numbers"),
    "sxy type": (lambda: crf().addPairwiseGaussian("3", 3), TypeError, "sxy must hold real numbers"),
    "srgb 0": (lambda: crf().addPairwiseBilateral(3, (3, 0, 3), IMAGE, 3), ValueError, "srgb must be greater than 0"),
    "srgb count": (lambda: crf().addPairwiseBilateral(3, (3, 3), IMAGE, 3), ValueError, "srgb must be a number or 3"),
    "image size": (
        lambda: crf().addPairwiseBilateral(3, 3, IMAGE.transpose(1, 0, 2), 3),
        ValueError,
        r"rgbim must have shape \(h, w, 3\) = \(4, 5, 3\), got \(5, 4, 3\)",
    ),
    "image channels": (
        lambda: crf().addPairwiseBilateral(3, 3, np.zeros((4, 5, 4), np.uint8), 3),
        ValueError,
        r"got \(4, 5, 4\); .*create_pairwise_bilateral",
    ),
    "grey image": (lambda: crf().addPairwiseBilateral(3, 3, IMAGE[..., 0], 3), ValueError, r"got \(4, 5\)"),
    "image NaN": (
        lambda: crf().addPairwiseBilateral(3, 3, NAN_IMAGE, 3),
        ValueError,
        "rgbim is NaN or infinite at row 2, column 2, channel 1",
    ),
    "image far": (
        lambda: crf().addPairwiseBilateral(3, 1e-9, IMAGE + 200, 3),
        ValueError,
        "rgbim / srgb is too far from 0 .* at row 0, column 0, channel 0",
    ),
    "image type": (lambda: crf().addPairwiseBilateral(3, 3, IMAGE * 1j, 3), TypeError, "rgbim must hold real numbers"),
    "niter": (lambda: crf().inference(-1), ValueError, "niter must be at least 0, got -1"),
    "niter type": (lambda: crf().inference(2.5), TypeError, "niter must be an integer, got 2.5"),
    "Q shape": (lambda: crf().stepInference(UNARY.T), ValueError, r"Q must have shape .*\(3, 20\), got \(20, 3\)"),
    "Q type": (lambda: crf().stepInference(UNARY.tolist()), TypeError, "Q must be an array of floating .* got list"),
    "Q integers": (lambda: crf().stepInference(UNARY.astype(int)), TypeError, "Q must be .* got an array of int64"),
    "Q NaN": (lambda: crf().stepInference(NAN_UNARY.copy()), ValueError, "Q holds NaN or infinity"),
    "Q read-only": (lambda: crf().stepInference(np.broadcast_to(0.5, (3, 20))), ValueError, "Q is read-only"),
    "divergence of NaN": (lambda: crf().klDivergence(NAN_UNARY), ValueError, "Q holds NaN or infinity"),
    "threads": (lambda: dcrf.set_num_threads(0), ValueError, "threads must be 1 to 1024, got 0"),
    "threads type": (lambda: dcrf.set_num_threads("2"), TypeError, "threads must be an integer, got '2'"),
    "labels": (lambda: utils.unary_from_labels([0, 4], 3, 0.5), ValueError, "labels must be 0 to 3 .* got 4"),
    "label -1": (lambda: utils.unary_from_labels([-1], 3, 0.5), ValueError, "labels must be 0 to 3 .* got -1"),
    "sure labels": (lambda: utils.unary_from_labels([3], 3, 0.5, False), ValueError, "labels must be 0 to 2 .* got 3"),
    "float labels": (lambda: utils.unary_from_labels([0.0], 3, 0.5), TypeError, "labels must be integers"),
    "n_labels": (lambda: utils.unary_from_labels([0], 0, 0.5), ValueError, "n_labels must be at least 1"),
    "gt_prob": (lambda: utils.unary_from_labels([0], 3, 1), ValueError, "gt_prob must be between 0 and 1"),
    "softmax NaN": (lambda: utils.unary_from_softmax(NAN_UNARY), ValueError, "sm must be finite"),
    "softmax shape": (lambda: utils.unary_from_softmax(0.5), ValueError, r"sm must have the labels .* shape \(\)"),
    "scale": (lambda: utils.unary_from_softmax(UNARY, 1.5), ValueError, "scale must be greater than 0 and at most 1"),
    "sdims": (lambda: utils.create_pairwise_gaussian((3, 3), (4, 5, 6)), ValueError, "sdims must be .* 3 numbers"),
    "sdims 0": (lambda: utils.create_pairwise_gaussian((3, 0), (4, 5)), ValueError, "sdims must be greater than 0"),
    "chdim": (lambda: utils.create_pairwise_bilateral((3, 3), 3, IMAGE, 3), ValueError, "chdim must be .* got 3"),
    "schan": (
        lambda: utils.create_pairwise_bilateral((3, 3), (3,), IMAGE, 2),
        ValueError,
        "schan must be .* 3 numbers",
    ),
    "eigen": (lambda: eigen.matrixXf(np.zeros(3)), ValueError, r"arr must have 2 dimension\(s\), got shape \(3,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_argument_leaves_the_model_as_it_was() -> None:
    d = model()
    expected = d.inference(2)
    for bad in (lambda: d.setUnaryEnergy(NAN_UNARY), lambda: d.addPairwiseGaussian(0, 3)):
        with pytest.raises(ValueError, match="must"):
            bad()
    np.testing.assert_array_equal(d.inference(2), expected)


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
usual_numbers = st.floats(-100, 100, width=32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_right_or_refused(data: st.DataObject) -> None:
    """Whatever the shapes and values: probabilities, or an error that says why not."""
    points, labels, d = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 16))

    def array(*shape: int) -> NDArray[Any]:
        if data.draw(st.integers(0, 9)) == 0:
            shape = tuple(data.draw(st.integers(0, 5)) for _ in range(data.draw(st.integers(0, 3))))
        elements = numbers if data.draw(st.integers(0, 4)) == 0 else usual_numbers
        size = int(np.prod(shape))
        values = np.array(data.draw(st.lists(elements, min_size=size, max_size=size)), np.float64).reshape(shape)
        dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, np.int32, np.uint8]))
        with np.errstate(invalid="ignore", over="ignore"):
            values = values.astype(dtype)
        return data.draw(st.sampled_from([values, values[::-1] if values.ndim else values, np.asfortranarray(values)]))

    model = dcrf.DenseCRF(points, labels)
    try:
        model.setUnaryEnergy(array(labels, points))
        compat = array(*data.draw(st.sampled_from([(), (labels,), (labels, labels)])))
        model.addPairwiseEnergy(array(d, points), compat, normalization=data.draw(st.integers(0, 3)))
    except ValueError as error:
        assert any(name in str(error) for name in ("u ", "features ", "compat "))  # noqa: PT017
        return
    q = model.inference(data.draw(st.integers(0, 3)))
    assert q.shape == (labels, points)
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-4)
    assert np.isfinite(model.klDivergence(q))
