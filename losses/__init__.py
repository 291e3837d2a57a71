"""Index of losses. Each classification loss works on plain tensors, without the rest of this code base."""

from losses.align import Align
from losses.binary import ClassificationLoss
from losses.boxes import box_losses
from losses.classification import Classification
from losses.criterion import Criterion, GroupSupervision, LossWeights
from losses.cross_entropy import CrossEntropy
from losses.focal import Focal
from losses.ia_bce import IABCE
from losses.matchability_aware import MatchabilityAware
from losses.position_supervised import PositionSupervised
from losses.quality_focal import QualityFocal
from losses.ranking import prime_sample_weights, rank_within
from losses.varifocal import Varifocal

__all__ = [
    "IABCE",
    "Align",
    "Classification",
    "ClassificationLoss",
    "Criterion",
    "CrossEntropy",
    "Focal",
    "GroupSupervision",
    "LossWeights",
    "MatchabilityAware",
    "PositionSupervised",
    "QualityFocal",
    "Varifocal",
    "box_losses",
    "prime_sample_weights",
    "rank_within",
]
