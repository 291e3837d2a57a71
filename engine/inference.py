"""In which precision a finished model runs."""

from __future__ import annotations

from typing import Any

import torch

from engine.step import Precision
from engine.trainer_config import TrainerConfig

OTHER_PRECISION = "computing in {}, unlike training; trainer.inference_precision={} computes as training did"
"""What to say where the two precisions differ."""


def computes_bf16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices by instructions made for it (AVX512-BF16, AMX)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not have it
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def inference_precision(config: TrainerConfig, device: torch.device) -> Precision:
    """Return ``config.inference_precision``, or what its default means on this device."""
    if config.inference_precision is not None:
        return config.inference_precision
    return "bf16" if device.type == "cpu" and config.precision == "fp32" and computes_bf16() else config.precision


def prepare_inference(model: Any, config: TrainerConfig, device: torch.device) -> Precision:
    """Put a detector on a device, laid out for the precision in which it will run, which is returned."""
    precision = inference_precision(config, device)
    if device.type == "cpu" and precision == "bf16":
        model.backbone.set_channels_last()  # 16-bit convolutions of CPUs expect it
    model.to(device)
    return precision
