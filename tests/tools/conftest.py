"""A checkpoint of a detector that is small, random, and confident enough to find something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import config as configuration
from engine import checkpoint

CATEGORIES = [[1, "ant"], [4, "bee"], [9, "cat"]]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes; images are resized to a short side of 64."""
    config = configuration.from_dict(
        {
            "model": {
                "backbone": {
                    "model": "resnet10t",
                    "pretrained": False,
                    "strides": [16, 32],
                    "norm": "group",
                    "frozen_stages": 0,
                },
                "num_levels": 3,
                "embed_dim": 64,
                "num_heads": 4,
                "num_points": 2,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "ffn_dim": 96,
                "num_queries": 20,
                "detections_per_image": 30,
            },
            "data": {
                "train": {"images": "images", "annotations": "train.json"},
                "val": {
                    "images": "images",
                    "annotations": "val.json",
                    "transforms": [{"name": "resize", "short_side": 64, "max_long_side": 128}],
                },
            },
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.model.build(len(CATEGORIES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            for name, parameter in model.named_parameters():
                if name.endswith("class_head.weight"):
                    parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("tiny") / "checkpoint.pth"
    state = {
        "format": checkpoint.FORMAT,
        "weights": model.state_dict(),
        "ema": None,
        "config": configuration.to_dict(config),
        "categories": CATEGORIES,
        "position": {"step": 0, "steps_per_epoch": 1, "evaluated_step": 0},
    }
    torch.save(state, path)
    return path
