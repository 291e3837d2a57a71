"""Detectors. To add one: a file with its config dataclass (a ``name`` and ``build``), and its name in ``Detector``."""

from models.dino import DINO, DINOConfig
from models.parts.backbone import BackboneConfig
from models.parts.denoising import DenoisingConfig
from models.parts.postprocess import postprocess

# The alternatives of `model:` in a configuration; with a second detector this becomes a union, picked by `name`.
Detector = DINOConfig

__all__ = ["DINO", "BackboneConfig", "DINOConfig", "DenoisingConfig", "Detector", "postprocess"]
