"""What turns a backbone's features into a dense prediction."""

from .aspp import ASPP
from .decoder import Decoder

__all__ = ["ASPP", "Decoder"]
