"""How good a segmentation is: mean IoU, the same near boundaries, and the evaluation of a model on a dataset."""

from .evaluate import Evaluation, Quality, evaluate
from .metrics import ConfusionMatrix
from .trimap import PAPER_WIDTHS, TrimapCurve, boundary_distance, trimap_miou

__all__ = [
    "PAPER_WIDTHS",
    "ConfusionMatrix",
    "Evaluation",
    "Quality",
    "TrimapCurve",
    "boundary_distance",
    "evaluate",
    "trimap_miou",
]
