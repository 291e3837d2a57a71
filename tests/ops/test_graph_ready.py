"""Whole models could be captured as CUDA graphs: nothing on the way asks the host. Seen on fake CUDA tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import BackboneConfig, DINOConfig
from ops.ms_deform_attn import backends
from structures import Images

COPIES_FROM_THE_HOST = 3
"""As of now: the order of a box's coordinates, once a decoder layer, and the anchor of pixels that may not propose."""


class Watch(TorchDispatchMode):
    """Keeps what is dispatched, and what has come from another device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        devices = {a.device.type for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and devices and result.device.type not in devices:
            self.copies.append(f"{func} {result.shape}")
        return result


def test_inference_asks_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shapes, no number read back, the op as a kernel, and no more copies from the host than are known."""
    monkeypatch.setattr(backends, "_failures", {"cuda": None, "cpu": None})
    config = DINOConfig(
        backbone=BackboneConfig(model="resnet10t", pretrained=False, norm="group", frozen_stages=0),
        embed_dim=64,
        num_heads=4,
        num_points=2,
        encoder_layers=1,
        decoder_layers=2,
        ffn_dim=96,
        num_queries=20,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = config.build(5).eval()
            images = Images(torch.randn(2, 3, 96, 128), torch.tensor([(96, 128), (80, 100)]))
        with torch.no_grad(), Watch() as watch:
            model(images)
        assert sum("ms_deform_attn" in name for name in watch.operations) == 3
        assert len(watch.copies) <= COPIES_FROM_THE_HOST, watch.copies
        with pytest.raises(DataDependentOutputException):  # this is how a read would show
            images.sizes.sum().item()
