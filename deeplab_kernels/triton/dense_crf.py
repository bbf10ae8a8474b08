"""Mean-field inference of the dense CRF: :mod:`deeplab_kernels.reference.dense_crf` over the lattice of
:mod:`deeplab_kernels.triton.permutohedral`."""

from functools import partial

from ..reference import dense_crf as reference
from .permutohedral import make

dense_crf_mean_field = partial(reference.dense_crf_mean_field, make=make)
dense_crf_mean_field_backward = partial(reference.dense_crf_mean_field_backward, make=make)
