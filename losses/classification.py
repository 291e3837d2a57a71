"""Index of classification losses: a new one is a file here and a name in ``Classification``.

All are called alike: see ``entries.ClassificationLoss``.
"""

from losses.focal import Focal
from losses.ia_bce import IABCE

Classification = Focal | IABCE
"""Picked by ``name`` in a configuration."""
