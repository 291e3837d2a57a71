"""A DINO small enough for tests, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from models import BackboneConfig, DenoisingConfig, DINOConfig
from structures import Batch, Images, Targets


@pytest.fixture(scope="session")
def tiny_config() -> DINOConfig:
    return DINOConfig(
        backbone=BackboneConfig(model="resnet10t", pretrained=False, norm="group", frozen_stages=0),
        embed_dim=64,
        num_heads=4,
        num_points=2,
        encoder_layers=2,
        decoder_layers=3,
        ffn_dim=96,
        num_queries=20,
        denoising=DenoisingConfig(queries=6),
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    def make(
        sizes: Sequence[tuple[int, int]] = ((96, 128), (80, 100)),
        counts: Sequence[int] = (3, 0),
        padded: tuple[int, int] | None = None,
        num_classes: int = 5,
    ) -> Batch:
        height, width = padded or (max(h for h, _ in sizes), max(w for _, w in sizes))
        images = torch.zeros(len(sizes), 3, height, width)
        generator = torch.Generator().manual_seed(3)
        for image, (h, w) in zip(images, sizes, strict=True):
            image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
        total = sum(counts)
        boxes = torch.rand(total, 4, generator=generator) * 0.3 + 0.3
        labels = torch.randint(num_classes, (total,), generator=generator)
        size_tensor = torch.tensor(sizes)
        targets = Targets(labels, boxes, tuple(counts), seeds=tuple(range(len(sizes))))
        return Batch(Images(images, size_tensor), targets, torch.arange(len(sizes)), size_tensor * 2)

    return make
