"""The fully connected CRF of DeepLab v1 and v2 as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import _validation, dense_crf_mean_field
from ..ops.dense_crf import check_filter

TRAINABLE = (
    "appearance_weight", "appearance_sigma", "color_sigma", "smoothness_weight", "smoothness_sigma", "compatibility",
)  # fmt: skip
_SIGMAS = ("appearance_sigma", "color_sigma", "smoothness_sigma")
COMPATIBILITIES = ("potts", "per_label", "full")


class DenseCRF(nn.Module):
    """Refines logits with an image, by mean-field inference of a fully connected CRF; every step is differentiable.

        k(i, j) = appearance_weight  exp(-|p_i - p_j|^2 / (2 appearance_sigma^2) - |I_i - I_j|^2 / (2 color_sigma^2))
                + smoothness_weight  exp(-|p_i - p_j|^2 / (2 smoothness_sigma^2))

    (Kraehenbuehl, Koltun: arXiv:1210.5644; as a trained layer Zheng et al.: arXiv:1502.03240.) The parameters have
    pydensecrf's meaning: ``addPairwiseBilateral(sxy=appearance_sigma, srgb=color_sigma, compat=appearance_weight)`` and
    ``addPairwiseGaussian(sxy=smoothness_sigma, compat=smoothness_weight)``, logits being minus the unary energies.

    Args:
        num_classes: L, the labels, at least 1.
        iterations: T >= 0 mean-field updates; may be changed later (``crf.iterations = 5`` while training).
        appearance_weight, smoothness_weight: weights of the two kernels; positive ones favour equal labels. None
            leaves the kernel out.
        appearance_sigma, smoothness_sigma: standard deviations in pixels; ``color_sigma``: in units of the image.
            Positive. Kept as logarithms (``log_appearance_sigma`` ...), so that they stay positive when trained.
        compatibility: "potts": all labels alike; "per_label": one factor for each label, 1 at first; "full": a cost
            mu(x_i, x_j) for each pair of labels, minus the identity at first (which is Potts). Or a tensor, (L,) or
            (L, L), of such factors or costs. Both kernels share it.
        normalization: of both kernels: "none", "before", "after" or "symmetric".
        filter: "permutohedral" (linear in the pixels), "exact" (quadratic), or "local": the sum over a window of
            (2 * window + 1)^2 pixels, the short-range CRF; images (B, 3, H, W) only.
        window: radius in pixels of ``filter="local"``.
        trainable: names of the parameters that require a gradient: "appearance_weight", "appearance_sigma",
            "color_sigma", "smoothness_weight", "smoothness_sigma", "compatibility"; True for all, False for none. By
            default the weights and the compatibility; the sigmas make backward slower, since their gradients pass
            through the lattice. The others are parameters as well, with ``requires_grad=False``.
        recompute: saves memory at the price of time in training: see
            :func:`deeplab_kernels.ops.dense_crf_mean_field`.

    Shapes:
        logits (B, L, H, W) or (B, L, D, H, W), float32, float64, float16 or bfloat16, finite or -infinity where a label
        is forbidden; image (B, C, H, W) or
        (B, C, D, H, W) with values in 0..255 (C is usually 3), uint8 or any of those dtypes; mask (B, H, W) or
        (B, D, H, W) bool or None. Returns logits of the same shape and dtype; ``softmax(1)`` of them is Q. Gradients
        reach the logits, the image and the parameters.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        iterations: int = 10,
        appearance_weight: float | None = 10.0,
        appearance_sigma: float = 80.0,
        color_sigma: float = 13.0,
        smoothness_weight: float | None = 3.0,
        smoothness_sigma: float = 3.0,
        compatibility: str | Tensor = "potts",
        normalization: str = "symmetric",
        filter: str = "permutohedral",
        window: int = 5,
        trainable: bool | Sequence[str] = ("appearance_weight", "smoothness_weight", "compatibility"),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("iterations", iterations, 0),
            ("window", window, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        _validation.normalization_code(normalization)
        check_filter(filter)
        # Annotated, since register_parameter tells type checkers nothing.
        self.appearance_weight: nn.Parameter | None
        self.smoothness_weight: nn.Parameter | None
        self.log_appearance_sigma: nn.Parameter
        self.log_color_sigma: nn.Parameter
        self.log_smoothness_sigma: nn.Parameter
        self.compatibility: nn.Parameter | None
        self.num_classes = num_classes
        self.iterations = iterations
        self.normalization = normalization
        self.filter = filter
        self.window = window
        self.recompute = recompute
        chosen = _chosen(trainable)
        weights = {"appearance_weight": appearance_weight, "smoothness_weight": smoothness_weight}
        sigmas = {
            "appearance_sigma": None if appearance_weight is None else appearance_sigma,
            "color_sigma": None if appearance_weight is None else color_sigma,
            "smoothness_sigma": None if smoothness_weight is None else smoothness_sigma,
        }
        for name, weight in weights.items():
            self.register_parameter(name, _scalar(name, weight, name in chosen))
        for name, sigma in sigmas.items():
            self.register_parameter(f"log_{name}", _scalar(name, sigma, name in chosen, logarithm=True))
        initial = _initial_compatibility(compatibility, num_classes)
        self.register_parameter(
            "compatibility", None if initial is None else nn.Parameter(initial, requires_grad="compatibility" in chosen)
        )

    @property
    def appearance_sigma(self) -> Tensor:
        return self.log_appearance_sigma.exp()

    @property
    def color_sigma(self) -> Tensor:
        return self.log_color_sigma.exp()

    @property
    def smoothness_sigma(self) -> Tensor:
        return self.log_smoothness_sigma.exp()

    def forward(self, logits: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Refined logits; ``image`` may be None where there is no appearance kernel. Pixels where ``mask`` is False
        send and receive nothing, and keep their logits."""
        _validation.floating(logits, "logits")
        if logits.dim() not in (4, 5) or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have shape (B, {self.num_classes}, H, W) or (B, {self.num_classes}, D, H, W), "
                f"got {tuple(logits.shape)}"
            )
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        positions = _positions(logits, dtype)
        features: list[Tensor] = []
        strengths: list[Tensor] = []
        if self.appearance_weight is not None:
            colors = _colors(image, logits, dtype)
            appearance = positions / self.appearance_sigma.to(dtype), colors / self.color_sigma.to(dtype)
            features.append(torch.cat(appearance, 1))
            strengths.append(self.appearance_weight)
        if self.smoothness_weight is not None:
            features.append(positions / self.smoothness_sigma.to(dtype))
            strengths.append(self.smoothness_weight)
        return dense_crf_mean_field(
            -logits,
            features,
            [w.to(dtype) if self.compatibility is None else (w * self.compatibility).to(dtype) for w in strengths],
            iterations=self.iterations,
            normalization=self.normalization,
            filter=self.filter,
            mask=mask,
            window=self.window if self.filter == "local" else None,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.num_classes}", f"iterations={self.iterations}"]
        for name in TRAINABLE[:-1]:
            value = getattr(self, f"log_{name}" if name in _SIGMAS else name)
            if value is not None:
                parts.append(f"{name}={math.exp(value.item()) if name in _SIGMAS else value.item():.4g}")
        kind = {None: "potts", 1: "per_label", 2: "full"}[
            None if self.compatibility is None else self.compatibility.dim()
        ]
        parts += [f"compatibility={kind}", f"normalization={self.normalization}", f"filter={self.filter}"]
        return ", ".join(parts + ([f"window={self.window}"] if self.filter == "local" else []))


def _chosen(trainable: bool | Sequence[str]) -> set[str]:
    if isinstance(trainable, bool):
        return set(TRAINABLE) if trainable else set()
    if isinstance(trainable, str) or not isinstance(trainable, (Sequence, set, frozenset)):
        raise TypeError(f"trainable must be a bool or a sequence of names, got {trainable!r}")
    if unknown := sorted(set(trainable) - set(TRAINABLE)):
        raise ValueError(f"trainable must be names among {', '.join(TRAINABLE)}, got {unknown}")
    return set(trainable)


def _scalar(name: str, value: float | None, trainable: bool, logarithm: bool = False) -> nn.Parameter | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or (logarithm and value <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if logarithm else ''}, got {value!r}")
    return nn.Parameter(torch.tensor(math.log(value) if logarithm else float(value)), requires_grad=trainable)


def _initial_compatibility(compatibility: str | Tensor, labels: int) -> Tensor | None:
    if isinstance(compatibility, Tensor):
        _validation.floating(compatibility, "compatibility")
        if compatibility.shape not in ((labels,), (labels, labels)):
            raise ValueError(
                f"compatibility must have shape ({labels},) or ({labels}, {labels}), got {tuple(compatibility.shape)}"
            )
        return compatibility.detach().clone()
    if not isinstance(compatibility, str):
        raise TypeError(f"compatibility must be a string or a tensor, got {compatibility!r}")
    if compatibility not in COMPATIBILITIES:
        allowed = ", ".join(f'"{name}"' for name in COMPATIBILITIES)
        raise ValueError(f"compatibility must be {allowed} or a tensor, got {compatibility!r}")
    if compatibility == "potts":
        return None
    return torch.ones(labels) if compatibility == "per_label" else -torch.eye(labels)


def _positions(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixel coordinates (B, axes, *image): x, y and, for volumes, z."""
    axes = [torch.arange(n, dtype=dtype, device=logits.device) for n in logits.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])
    return grid.expand(logits.shape[0], *grid.shape)


def _colors(image: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    if image is None:
        raise TypeError("image must be given for the appearance kernel (appearance_weight=None leaves the kernel out)")
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 and image.dtype not in _validation.DTYPES:
        raise TypeError(f"image must be uint8, float32, float64, float16 or bfloat16, got {image.dtype}")
    if image.dim() != logits.dim() or image.shape[0] != logits.shape[0] or image.shape[2:] != logits.shape[2:]:
        raise ValueError(
            f"image must have the batch and size of logits {tuple(logits.shape)}, got {tuple(image.shape)}"
        )
    if image.device != logits.device:
        raise ValueError(f"image must be on the device of logits, {logits.device}, got {image.device}")
    return image.to(dtype)
