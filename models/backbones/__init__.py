"""Feature extractors: image -> (low-level feature at stride 4, feature at the output stride)."""

from .vgg import VGG, vgg16, vgg16_bn, vgg_small
from .xception import Xception, xception41, xception65, xception71, xception_small

__all__ = [
    "VGG",
    "Xception",
    "vgg16",
    "vgg16_bn",
    "vgg_small",
    "xception41",
    "xception65",
    "xception71",
    "xception_small",
]
