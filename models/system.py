"""What every semantic segmentation network here has in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbones.features import Backbone


@dataclass(frozen=True)
class Normalization:
    """How 8-bit RGB becomes a network's input: (value / 255 - mean) / std, for each channel.

    The default maps 0..255 to [-1, 1], as the official DeepLab code does.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"{name} must have three values, got {value!r}")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def apply(self, rgb: Tensor) -> Tensor:
        """(..., 3, H, W) in 0..255 -> floating-point input of a network."""
        mean, std = self._constants(rgb)
        return (rgb - mean) / std

    def invert(self, x: Tensor) -> Tensor:
        """Input of a network (..., 3, H, W) -> RGB in 0..255, in the same floating-point dtype: a CRF's guide image."""
        mean, std = self._constants(x)
        return x * std + mean

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        mean, std = (
            torch.tensor(v, dtype=dtype, device=like.device).view(3, 1, 1) * 255 for v in (self.mean, self.std)
        )
        return mean, std


SYMMETRIC = Normalization()
# What torchvision, timm's ResNets and segmentation_models_pytorch train with.
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class SegmentationModel(nn.Module):
    """Base of the systems. forward: (N, 3, H, W) -> logits (N, num_classes, H, W), any H, W >= 1.

    Attributes:
        num_classes: channels of the logits.
        normalization: what the weights expect of their input; loading weights of another origin changes it.
        output_stride: input pixels per pixel of the deepest feature map.
    """

    num_classes: int
    normalization: Normalization = SYMMETRIC

    @property
    def output_stride(self) -> int:
        raise NotImplementedError

    def set_output_stride(self, output_stride: int) -> None:
        """Changes strides and rates of the built model in place; the state_dict stays the same.

        Raises:
            ValueError: the system does not exist at this output stride.
        """
        raise NotImplementedError


class BackboneModel(SegmentationModel):
    """Base of the systems on a backbone: their output stride is the backbone's."""

    backbone: Backbone

    @property
    def output_stride(self) -> int:
        """Input pixels per pixel of the backbone's deepest feature map: 8, 16 or 32."""
        return self.backbone.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Changes strides and rates of the built model in place. The state_dict is the same at every output stride, so
        that a model trained at 16 can be evaluated at 8.

        Raises:
            ValueError: ``output_stride`` is not 8, 16 or 32.
        """
        self.backbone.set_output_stride(output_stride)


def check_images(x: Tensor) -> None:
    """Raises ValueError unless ``x`` is (N, 3, H, W) with H, W >= 1."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"x must have shape (N, 3, H, W), got {tuple(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have a height and a width of at least 1, got {tuple(x.shape)}")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards those that were in training mode are again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
