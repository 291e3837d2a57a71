"""Index of detectors: a new one is a file here and its config's name in ``AnyDetector``."""

from models.detector import Detector, DetectorConfig
from models.dino import DINO, DINOConfig
from models.parts.backbone import BackboneConfig
from models.parts.denoising import DenoisingConfig

AnyDetector = DINOConfig
"""The alternatives of ``model:`` in a configuration, picked by ``name``."""

__all__ = [
    "DINO",
    "AnyDetector",
    "BackboneConfig",
    "DINOConfig",
    "DenoisingConfig",
    "Detector",
    "DetectorConfig",
]
