"""What turns a backbone's features into a dense prediction."""

from .aspp import ASPP
from .atrous_scores import AtrousScores, FullyConnected, ScoreBranch
from .decoder import Decoder
from .fcn import FCNHead
from .hypercolumn import Hypercolumn
from .pyramid_pooling import PyramidPooling

__all__ = [
    "ASPP",
    "AtrousScores",
    "Decoder",
    "FCNHead",
    "FullyConnected",
    "Hypercolumn",
    "PyramidPooling",
    "ScoreBranch",
]
