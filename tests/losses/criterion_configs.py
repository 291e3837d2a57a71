"""The criteria that tests of the criterion go through."""

from __future__ import annotations

import pytest

from losses import IABCE, Criterion, PositionSupervised
from matchers import Mixed

ALIGN_DETR = Criterion(classification=IABCE(), matcher=Mixed(candidates=2), prime_sample_tau=1.5)
CONFIGS = [Criterion(), ALIGN_DETR, Criterion(classification=PositionSupervised(), overlap="ciou")]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["dino", "align_detr", "stable_dino"])
