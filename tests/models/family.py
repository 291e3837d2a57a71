"""Every detector in a size for tests; a detector that is in the index and not here is a red test."""

from __future__ import annotations

import typing

import pytest

from losses import Criterion, CrossEntropy
from matchers import Hungarian, Mixed, SoftmaxCost
from models import (
    AnyDetector,
    BackboneConfig,
    ConditionalDETRConfig,
    DABDETRConfig,
    DeformableDETRConfig,
    DenoisingConfig,
    DETRConfig,
    DINOConfig,
    DNDETRConfig,
    HDETRConfig,
)

SIZE: dict[str, typing.Any] = {
    "embed_dim": 64,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 96,
    "num_queries": 12,
    "dropout": 0.0,
    "detections_per_image": 20,
}


def backbone(*strides: int) -> BackboneConfig:
    return BackboneConfig(model="test_resnet", pretrained=False, norm="group", frozen_stages=0, strides=strides)


SINGLE = {**SIZE, "backbone": backbone(16)}
MULTI = {**SIZE, "backbone": backbone(8, 16), "num_levels": 3, "num_points": 2}
FAMILY: dict[str, AnyDetector] = {
    "detr": DETRConfig(**SINGLE),
    "conditional_detr": ConditionalDETRConfig(**SINGLE),
    "dab_detr": DABDETRConfig(**SINGLE),
    "dn_detr": DNDETRConfig(**SINGLE),
    "deformable_detr": DeformableDETRConfig(**MULTI),
    "deformable_detr, refined": DeformableDETRConfig(**MULTI, box_refinement=True),
    "deformable_detr, two stages": DeformableDETRConfig(**MULTI, box_refinement=True, two_stage=True),
    "h_detr": HDETRConfig(**MULTI, one_to_many_queries=18),
    "dino": DINOConfig(**MULTI, denoising=DenoisingConfig(queries=6)),
}
"""Every detector, in each of its forms."""
DETECTORS = {config.name: name for name, config in FAMILY.items()}
"""Of each detector the last of its forms, which has the most parts."""


def forms(*quick: str) -> list[typing.Any]:
    """All names of FAMILY as parameters of a test, of which those that are not ``quick`` are left to thorough runs."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in FAMILY]


def criterion_for(config: AnyDetector) -> Criterion:
    """A criterion that suits the detector's scores, with several queries a target where that is possible."""
    if config.no_object:
        return Criterion(classification=CrossEntropy(), matcher=Hungarian(cost=SoftmaxCost()))
    return Criterion(matcher=Mixed(candidates=2), prime_sample_tau=1.5)
