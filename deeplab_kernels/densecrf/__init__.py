"""Dense CRF and permutohedral lattice for numpy users. Importing this package does not import torch.

The interface is pydensecrf's, and so are the results; code written for it runs after a change of its imports:

    import deeplab_kernels.densecrf as dcrf                      # import pydensecrf.densecrf as dcrf
    from deeplab_kernels.densecrf.utils import unary_from_softmax  # from pydensecrf.utils import unary_from_softmax

    d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], probabilities.shape[0])
    d.setUnaryEnergy(unary_from_softmax(probabilities))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    labels = np.argmax(d.inference(10), axis=0).reshape(image.shape[:2])

(Kraehenbuehl, Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NIPS 2011.)
"""

from . import utils
from .crf import (
    CONST_KERNEL,
    DIAG_KERNEL,
    FULL_KERNEL,
    NO_NORMALIZATION,
    NORMALIZE_AFTER,
    NORMALIZE_BEFORE,
    NORMALIZE_SYMMETRIC,
    ConstUnary,
    DenseCRF,
    DenseCRF2D,
    KernelType,
    LogisticUnary,
    NormalizationType,
    Unary,
)
from .lattice import lattice_embed
from .threads import get_num_threads, set_num_threads

__all__ = [
    "CONST_KERNEL",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "ConstUnary",
    "DenseCRF",
    "DenseCRF2D",
    "KernelType",
    "LogisticUnary",
    "NormalizationType",
    "Unary",
    "get_num_threads",
    "lattice_embed",
    "set_num_threads",
    "utils",
]
