"""Training as the DeepLab papers do it: from a function for a network and scenes to whole runs in a folder."""

from ..losses import segmentation_loss
from .config import Stage, TrainingConfig, poly_learning_rate
from .optimiser import WeightAverage, freeze_batch_norm, parameter_groups, start_near_identity
from .trainer import Trainer, TrainingResult, train

__all__ = [
    "Stage",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "WeightAverage",
    "freeze_batch_norm",
    "parameter_groups",
    "poly_learning_rate",
    "segmentation_loss",
    "start_near_identity",
    "train",
]
