"""Index of classification losses: a new one is a file here and a name in ``Classification``.

All are called alike: see ``binary.ClassificationLoss``.
"""

from losses.align import Align
from losses.cross_entropy import CrossEntropy
from losses.focal import Focal
from losses.ia_bce import IABCE
from losses.matchability_aware import MatchabilityAware
from losses.position_supervised import PositionSupervised
from losses.quality_focal import QualityFocal
from losses.varifocal import Varifocal

Classification = (
    Focal | IABCE | Align | QualityFocal | Varifocal | PositionSupervised | MatchabilityAware | CrossEntropy
)
"""Picked by ``name`` in a configuration."""
