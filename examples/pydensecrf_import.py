"""A program written for pydensecrf: only its import lines were changed. Imports no torch.

python examples/pydensecrf_import.py
"""

from __future__ import annotations

import numpy as np

import deeplab_kernels.densecrf as dcrf  # was: import pydensecrf.densecrf as dcrf
from deeplab_kernels.densecrf.utils import unary_from_labels  # was: from pydensecrf.utils import unary_from_labels


def main() -> None:
    height, width = 60, 80
    image = np.full((height, width, 3), 50, np.uint8)
    image[15:45, 20:60] = (190, 120, 40)
    image += np.random.default_rng(0).integers(0, 20, image.shape).astype(np.uint8)
    annotation = np.ones((height, width), int)  # 1: background, 2: object, 0: unknown
    annotation[5:40, 28:70] = 2  # a rectangle, put down carelessly
    annotation[::7] = 0

    d = dcrf.DenseCRF2D(width, height, 2)
    d.setUnaryEnergy(unary_from_labels(annotation, 2, gt_prob=0.7, zero_unsure=True))
    d.addPairwiseGaussian(sxy=3, compat=3, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
    d.addPairwiseBilateral(sxy=40, srgb=13, rgbim=image, compat=10)

    q, tmp1, tmp2 = d.startInference()
    for i in range(5):
        print(f"iteration {i}: KL divergence {d.klDivergence(q):.1f}")
        d.stepInference(q, tmp1, tmp2)
    refined = np.argmax(q, axis=0).reshape(height, width)

    truth = np.zeros((height, width), int)
    truth[15:45, 20:60] = 1
    print(f"pixels right: annotation {np.mean(annotation - 1 == truth):.4f}, refined {np.mean(refined == truth):.4f}")


if __name__ == "__main__":
    main()
