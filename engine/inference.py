"""In which precision a finished model runs."""

from __future__ import annotations

from typing import Any

import torch

from engine.step import Precision
from engine.trainer_config import TrainerConfig


def computes_bf16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices by instructions made for it (AVX512-BF16, AMX)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not have it
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def prepare_inference(
    model: Any, config: TrainerConfig, device: torch.device, default: Precision
) -> tuple[Precision, str | None]:
    """Put a detector on a device, laid out for the precision in which it will run.

    Returns:
        ``config.inference_precision``, or else ``default``; and what a user should know of it.
    """
    precision = config.inference_precision or default
    if device.type == "cpu" and precision == "bf16":
        model.backbone.set_channels_last()  # 16-bit convolutions of CPUs expect it
    model.to(device)
    if precision not in (default, config.precision):
        return precision, f"computing in {precision}, unlike training"
    if device.type == "cpu" and precision == "fp32" and computes_bf16():
        return precision, "trainer.inference_precision=bf16 is faster on this processor, and moves AP by a tenth or two"
    return precision, None
