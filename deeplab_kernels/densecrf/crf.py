"""DenseCRF and DenseCRF2D: pydensecrf's classes over the package's own lattice and mean-field kernels."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _densecrf
from . import _validation as check


class KernelType(enum.IntEnum):
    """Which parameters of a kernel could be learned in pydensecrf's C++; inference is the same with each."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(enum.IntEnum):
    """How a kernel matrix K is normalised with n = K 1: K, K diag(1/n), diag(1/n) K, or diag(n)^-1/2 K diag(n)^-1/2."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType


class Unary:
    """Unary energies for `DenseCRF.setUnary`: a `ConstUnary` or a `LogisticUnary`."""

    def __init__(self) -> None:
        raise TypeError("Unary has no energies of its own: use ConstUnary or LogisticUnary")

    _energies: NDArray[np.float32]


class ConstUnary(Unary):
    """Given unary energies ``u``, (nlabels, points)."""

    def __init__(self, u: ArrayLike) -> None:
        self._energies = _matrix("u", u).copy()


class LogisticUnary(Unary):
    """Unary energies ``L @ f`` of a logistic regression: ``L`` (nlabels, features), ``f`` (features, points)."""

    def __init__(self, L: ArrayLike, f: ArrayLike) -> None:
        self._energies = _product("L", L, f)


def _matrix(name: str, value: ArrayLike) -> NDArray[np.float32]:
    array = check.float_array(name, value)
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {array.shape}")
    return array


def _product(name: str, left: ArrayLike, right: ArrayLike) -> NDArray[np.float32]:
    first, second = _matrix(name, left), _matrix("f", right)
    if first.shape[1] != second.shape[0]:
        raise ValueError(
            f"{name} @ f needs as many columns of {name} as rows of f, got {first.shape} and {second.shape}"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # reported where the energies are used
        return first @ second


def _enumerator(name: str, value: Any, kind: type[enum.IntEnum]) -> int:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(f"{member.name} ({member.value})" for member in kind)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}") from None


class DenseCRF:
    """Fully connected CRF over ``nvar`` points with ``nlabels`` labels.

    Its energy is E(x) = sum_i U_i(x_i) + sum_{i<j} sum_m mu_m(x_i, x_j) k_m(f_i, f_j) with Gaussian kernels
    k_m = exp(-|f_i - f_j|^2 / 2), evaluated on the permutohedral lattice. (Kraehenbuehl, Koltun, NIPS 2011.)

    Several threads may infer at the same time, with the same model too; computations release the GIL.

    Raises:
        TypeError, ValueError: ``nvar`` is no integer or negative, ``nlabels`` is no integer or less than 1.
    """

    def __init__(self, nvar: int, nlabels: int) -> None:
        self._nvar = check.integer("nvar", nvar, 0)
        self._row = 0  # points of one row, where they are pixels
        self._nlabels = check.integer("nlabels", nlabels, 1)
        self._unary: _densecrf.Unary | None = None
        self._terms: list[_densecrf.Term] = []
        self._stepper: _densecrf.Inference | None = None

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Sets the unary energies (negative log-probabilities) to a copy of ``u``, (nlabels, nvar); used as float32.

        With ``f`` (features, nvar) they are ``u @ f``, and u has shape (nlabels, features). +infinity forbids a label.

        Raises:
            TypeError: u or f holds no real numbers.
            ValueError: a wrong shape; NaN or -infinity; a point whose labels are all forbidden.
        """
        energies = _matrix("u", u) if f is None else _product("u", u, f)
        self._set("u" if f is None else "u @ f", energies)

    def setUnary(self, u: Unary) -> None:
        """Sets the unary energies to those of a `ConstUnary` or `LogisticUnary`; errors as in `setUnaryEnergy`."""
        if not isinstance(u, Unary):
            raise TypeError(f"u must be a ConstUnary or LogisticUnary, got {type(u).__name__}")
        self._set("u", u._energies)

    def _set(self, name: str, energies: NDArray[np.float32]) -> None:
        allowed = (self._nlabels, self._nvar)
        if energies.shape != allowed:
            raise ValueError(f"{name} must have shape (nlabels, points) = {allowed}, got {energies.shape}")
        unary = _densecrf.Unary(energies)
        if unary.problem is not None:
            label, point = unary.problem
            if label == self._nlabels:
                raise ValueError(f"{name} is +infinity for all labels of point {point}")
            raise ValueError(f"{name} is NaN or -infinity at [{label}, {point}]")
        self._unary = unary
        self._stepper = None

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a kernel over ``features`` (d, nvar), in units of its standard deviation; d = 1 to 16, used as float32.

        compat: a number w for Potts (a positive w favours equal labels), (nlabels,) for the diagonal of mu, whose
            positive entries are penalties, or (nlabels, nlabels) for mu itself, of which the symmetric part is used.
        kernel: one of `KernelType`; inference does not depend on it.
        normalization: one of `NormalizationType`.

        Raises:
            TypeError: features or compat holds no real numbers.
            ValueError: a wrong shape, NaN or infinity, a feature too far from 0 for the lattice, no such kernel or
                normalization.
        """
        kernel, normalization = self._kinds(kernel, normalization)
        matrix = check.compatibility(compat, self._nlabels)
        array = _matrix("features", features)
        if array.shape[1] != self._nvar or not 1 <= array.shape[0] <= _densecrf.MAX_DIMENSION:
            raise ValueError(
                f"features must have shape (d, {self._nvar}) with d = 1 to {_densecrf.MAX_DIMENSION}, got {array.shape}"
            )
        lattice = check.usable(
            _densecrf.Lattice(array, self._row),
            [("features",)] * array.shape[0],
            lambda axis, point: f"[{axis}, {point}]",
        )
        self._add(lattice, matrix, normalization)

    @staticmethod
    def _kinds(kernel: Any, normalization: Any) -> tuple[int, int]:
        return (
            _enumerator("kernel", kernel, KernelType),
            _enumerator("normalization", normalization, NormalizationType),
        )

    def _add(self, lattice: _densecrf.Lattice, compatibility: NDArray[np.float32], normalization: int) -> None:
        self._terms.append(_densecrf.Term(lattice, normalization, compatibility))
        self._stepper = None

    def _inference(self) -> _densecrf.Inference:
        return _densecrf.Inference(self._nlabels, self._nvar, self._unary, self._terms)

    def inference(self, niter: int, *, progress: Callable[[int], object] | None = None) -> NDArray[np.float32]:
        """Label probabilities Q (nlabels, nvar) after ``niter`` mean-field iterations; 0 gives softmax(-u).

        ``progress(t)`` is called after each iteration t = 1 ... niter. Q is float32, in Fortran order.
        """
        return self._inference().run(check.integer("niter", niter, 0), progress)

    def startInference(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Q = softmax(-u) to begin `stepInference` with (0 without unary energies), and two empty arrays.

        The empty arrays stand for pydensecrf's temporary storage; nothing is kept in them.
        """
        q = self._inference().start()
        if self._unary is None:
            q[:] = 0
        return q, np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)

    def stepInference(self, Q: NDArray[Any], tmp1: Any = None, tmp2: Any = None) -> None:
        """One mean-field iteration: overwrites ``Q`` (nlabels, nvar) with the next Q. tmp1 and tmp2 are not used.

        Raises:
            TypeError: Q is no array of floating point numbers.
            ValueError: Q has a wrong shape, is read-only, or holds NaN or infinity.
        """
        if not isinstance(Q, np.ndarray) or Q.dtype.kind != "f":
            given = f"an array of {Q.dtype}" if isinstance(Q, np.ndarray) else type(Q).__name__
            raise TypeError(f"Q must be an array of floating point numbers, which is overwritten; got {given}")
        if not Q.flags.writeable:
            raise ValueError("Q is read-only, but it is to be overwritten")
        q = self._marginals(Q)
        self._steps().step(q)
        if q is not Q:
            Q[:] = q

    def klDivergence(self, Q: ArrayLike) -> float:
        """sum_i sum_l Q_il (log Q_il + u_il) + sum_m sum_i Q_i . (C_m F_m Q)_i, for Q (nlabels, nvar).

        Up to a constant (and twice the weight of the pairwise terms, as pydensecrf has it) the Kullback-Leibler
        divergence of the marginals Q from the CRF's distribution.

        Raises:
            TypeError, ValueError: Q holds no real numbers, has a wrong shape, or holds NaN or infinity.
        """
        return self._steps().kl_divergence(self._marginals(Q))

    def _marginals(self, Q: ArrayLike) -> NDArray[np.float32]:
        array = check.float_array("Q", Q)
        if array.shape != (self._nlabels, self._nvar):
            raise ValueError(f"Q must have shape (nlabels, points) = {(self._nlabels, self._nvar)}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("Q holds NaN or infinity")
        unsuitable = not array.flags.writeable or not array.flags.aligned or any(s % 4 for s in array.strides)
        return array.copy() if unsuitable else array

    def _steps(self) -> _densecrf.Inference:
        # Kept from step to step: it holds the unary energies as the kernels want them.
        if self._stepper is None:
            self._stepper = self._inference()
        return self._stepper


class DenseCRF2D(DenseCRF):
    """`DenseCRF` over the pixels of an image ``w`` pixels wide and ``h`` high; pixel (x, y) is point y * w + x.

    Raises:
        TypeError, ValueError: ``w`` or ``h`` is no integer or negative, ``nlabels`` is no integer or less than 1.
    """

    def __init__(self, w: int, h: int, nlabels: int) -> None:
        self._w, self._h = check.integer("w", w, 0), check.integer("h", h, 0)
        super().__init__(self._w * self._h, nlabels)
        self._row = self._w

    def addPairwiseGaussian(
        self, sxy: Any, compat: Any, kernel: int = DIAG_KERNEL, normalization: int = NORMALIZE_SYMMETRIC
    ) -> None:
        """Adds the smoothness kernel exp(-|p_i - p_j|^2 / (2 sxy^2)) over pixel positions p.

        sxy: standard deviation in pixels, or two: along x and along y. The rest as in `addPairwiseEnergy`.
        """
        kernel, normalization = self._kinds(kernel, normalization)
        sx, sy = check.sigmas("sxy", sxy, 2)
        matrix = check.compatibility(compat, self._nlabels)
        lattice = _densecrf.Lattice.gaussian((self._h, self._w), (sx, sy))
        self._add(check.usable(lattice, [("sxy",)] * 2, self._pixel), matrix, normalization)

    def addPairwiseBilateral(
        self,
        sxy: Any,
        srgb: Any,
        rgbim: ArrayLike,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds the appearance kernel exp(-|p_i - p_j|^2 / (2 sxy^2) - |I_i - I_j|^2 / (2 srgb^2)), colours I.

        sxy: standard deviation in pixels, or two: along x and along y.
        srgb: standard deviation in units of the image's values, or three: one for each channel.
        rgbim: (h, w, 3), any real type; the values count as they are, whatever the type.
        The rest as in `addPairwiseEnergy`. For images with other numbers of channels there is
        `utils.create_pairwise_bilateral`.
        """
        kernel, normalization = self._kinds(kernel, normalization)
        sx, sy = check.sigmas("sxy", sxy, 2)
        channel_sigmas = check.sigmas("srgb", srgb, 3)
        matrix = check.compatibility(compat, self._nlabels)
        image = check.real_array("rgbim", rgbim)
        if image.shape != (self._h, self._w, 3):
            raise ValueError(
                f"rgbim must have shape (h, w, 3) = {(self._h, self._w, 3)}, got {image.shape}; for other numbers of "
                "channels see utils.create_pairwise_bilateral"
            )
        if image.dtype not in (np.uint8, np.uint16) or not image.dtype.isnative:
            image = check.float_array("rgbim", image)
        lattice = _densecrf.Lattice.bilateral((self._h, self._w), (sx, sy), image, channel_sigmas)
        names = [("sxy",)] * 2 + [("rgbim", "srgb")] * 3
        self._add(check.usable(lattice, names, self._pixel), matrix, normalization)

    def _pixel(self, axis: int, point: int) -> str:
        y, x = divmod(point, self._w)
        return f"row {y}, column {x}" + (f", channel {axis - 2}" if axis >= 2 else "")
