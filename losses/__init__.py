"""Index of losses. Each classification loss works on plain tensors, without the rest of this code base."""

from losses.boxes import box_losses
from losses.classification import Classification
from losses.criterion import CriterionConfig, LossWeights
from losses.entries import ClassificationLoss
from losses.focal import Focal
from losses.ia_bce import IABCE

__all__ = [
    "IABCE",
    "Classification",
    "ClassificationLoss",
    "CriterionConfig",
    "Focal",
    "LossWeights",
    "box_losses",
]
