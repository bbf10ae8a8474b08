"""Inputs of the dense CRF's benchmarks: scikit-image's bundled photographs, and unary energies from a seed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


def photograph(name: str, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3), the whole picture resized."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("the photographs come with scikit-image: pip install -r requirements/bench.txt")
    with Image.open(Path(spec.origin).parent / "data" / f"{name}.png") as picture:
        return np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def unary(labels: int, height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """(labels, height * width): smooth scores, as a network of output stride 16 gives them, and a little noise."""
    random = np.random.default_rng(seed)
    energies = np.empty((labels, height, width), np.float32)
    for energy in energies:
        coarse = random.normal(scale=2, size=(height // 16 + 2, width // 16 + 2)).astype(np.float32)
        energy[:] = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
        energy += random.normal(scale=0.5, size=energy.shape).astype(np.float32)
    return energies.reshape(labels, -1)


def pydensecrf() -> ModuleType | None:
    try:
        import pydensecrf.densecrf as module
    except ImportError:
        return None
    return module


def model(
    module: ModuleType,
    image: NDArray[np.uint8],
    energies: NDArray[np.float32],
    appearance: tuple[float, float, float] | None,
    smoothness: tuple[float, float] | None,
) -> Any:
    """A DenseCRF2D of either module; appearance is (weight, sxy, srgb), smoothness (weight, sxy)."""
    d = module.DenseCRF2D(image.shape[1], image.shape[0], energies.shape[0])
    d.setUnaryEnergy(energies)
    if smoothness is not None:
        d.addPairwiseGaussian(sxy=smoothness[1], compat=smoothness[0])
    if appearance is not None:
        d.addPairwiseBilateral(sxy=appearance[1], srgb=appearance[2], rgbim=image, compat=appearance[0])
    return d


def monai_crf(
    appearance: tuple[float, float, float], smoothness: tuple[float, float] | None, iterations: int
) -> tuple[Any, str]:
    """(MONAI's CRF block, "") with these parameters, or (None, why there is none).

    It is the one other that runs on PyTorch. Its update rule is its own (messages are averaged over the kernels and not
    normalised by their mass), so its labels are not compared with ours, only its time.
    """
    try:
        import monai
    except ImportError:
        return None, "not installed (its wheels, 1.6.1 for one, lack the compiled extension that its CRF needs)"
    try:
        import monai._C
        from monai.networks.blocks import CRF
    except ImportError:
        return None, f"{monai.__version__} lacks the compiled extension that its CRF needs (BUILD_MONAI=1)"
    weight, sxy, srgb = appearance
    return CRF(
        bilateral_weight=weight,
        gaussian_weight=smoothness[0] if smoothness else 0.0,
        bilateral_spatial_sigma=sxy,
        bilateral_color_sigma=srgb,
        gaussian_spatial_sigma=smoothness[1] if smoothness else 1.0,
        iterations=iterations,
    ), ""
