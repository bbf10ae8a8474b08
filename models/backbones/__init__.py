"""Feature extractors: image -> (low-level feature at stride 4, feature at the output stride)."""

from .xception import Xception, xception41, xception65, xception71, xception_small

__all__ = ["Xception", "xception41", "xception65", "xception71", "xception_small"]
