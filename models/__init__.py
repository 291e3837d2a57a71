"""Index of detectors: a new one is a file here and its config's name in ``AnyDetector``."""

from models.conditional_detr import ConditionalDETRConfig
from models.dab_detr import DABDETRConfig
from models.deformable_detr import DeformableDETRConfig
from models.detector import Detector, DetectorConfig
from models.detr import DETRConfig
from models.dino import DINO, DINOConfig
from models.dn_detr import DNDETRConfig
from models.h_detr import HDETRConfig
from models.parts.backbone import BackboneConfig
from models.parts.denoising import DenoisingConfig

AnyDetector = (
    DETRConfig | ConditionalDETRConfig | DABDETRConfig | DNDETRConfig | DeformableDETRConfig | HDETRConfig | DINOConfig
)
"""The alternatives of ``model:`` in a configuration, picked by ``name``."""

__all__ = [
    "DINO",
    "AnyDetector",
    "BackboneConfig",
    "ConditionalDETRConfig",
    "DABDETRConfig",
    "DETRConfig",
    "DINOConfig",
    "DNDETRConfig",
    "DeformableDETRConfig",
    "DenoisingConfig",
    "Detector",
    "DetectorConfig",
    "HDETRConfig",
]
