"""What turns a backbone's features into a dense prediction."""

from .aspp import ASPP
from .atrous_scores import AtrousScores
from .decoder import Decoder

__all__ = ["ASPP", "AtrousScores", "Decoder"]
