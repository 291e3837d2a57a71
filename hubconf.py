"""Entry points of torch.hub, from a clone or by its address.

torch.hub.load("path/to/align-detr", "align_dino_r50", source="local", checkpoint="runs/k3/checkpoint_best.pth")
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

dependencies = ["torch", "torchvision", "timm", "yaml", "msgspec", "scipy", "pycocotools", "PIL", "safetensors"]

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:  # torch.hub takes it away after loading, but some modules are imported when needed
    sys.path.append(str(ROOT))


def detector(checkpoint: str, **options: Any) -> Any:
    """Load any detector of this project; a ``tools.predictor.Predictor``, which is called with images.

    Args:
        checkpoint: of training, of ``tools.import_checkpoint``, or weights as safetensors; its configuration is inside.
        options: ``device``, ``batch_size`` and ``overrides`` of ``Predictor``.

    Raises:
        ValueError: the file is no checkpoint, or an option is wrong.
    """
    from tools.predictor import Predictor

    return Predictor(checkpoint, **options)


def align_dino_r50(checkpoint: str | None = None, num_classes: int = 80, **options: Any) -> Any:
    """Load Align-DETR on DINO with a ResNet-50, as :func:`detector` does, or make the untrained model.

    Args:
        checkpoint: see :func:`detector`; None: a ``torch.nn.Module`` with random weights.
        num_classes: of the untrained model.
        options: see :func:`detector`.

    Raises:
        ValueError: the file is no checkpoint, or one of another detector.
    """
    if checkpoint is None:
        import config

        return config.load(ROOT / "configs/align_dino.yaml").model.build(num_classes, load_backbone=False)
    found = detector(checkpoint, **options)
    if found.config.model.name != "dino":
        raise ValueError(f"{checkpoint}: is a {found.config.model.name}, no dino: load it with 'detector'")
    return found
