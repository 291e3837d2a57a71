"""Finished models run in bf16 where the processor has instructions for it, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.inference import computes_bf16, inference_precision
from engine.trainer_config import TrainerConfig
from tools.predictor import Predictor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
real_computes_bf16 = computes_bf16  # before a fixture replaces it


@pytest.fixture
def processor_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.inference.computes_bf16", lambda: True)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({}, False),
    ],
)
def test_the_processor_is_asked(capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert real_computes_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert real_computes_bf16() is False


def test_what_is_said_wins_and_a_gpu_stays_as_trained(processor_with_bf16: None) -> None:
    assert inference_precision(TrainerConfig(), CPU) == "bf16"
    assert inference_precision(TrainerConfig(inference_precision="fp32"), CPU) == "fp32"
    assert inference_precision(TrainerConfig(precision="fp16"), CPU) == "fp16"
    assert inference_precision(TrainerConfig(), CUDA) == "fp32"


def test_predictions_are_bf16s(tiny_checkpoint: Path, processor_with_bf16: None) -> None:
    image = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))
    found, full = (
        Predictor(tiny_checkpoint, device="cpu"),
        Predictor(tiny_checkpoint, device="cpu", overrides=["trainer.inference_precision=fp32"]),
    )
    assert (found.precision, full.precision) == ("bf16", "fp32")
    assert found.model.backbone.channels_last
    (ours,), (expected,) = found([image]), full([image])
    assert not torch.equal(ours.scores, expected.scores)
    torch.testing.assert_close(ours.scores, expected.scores, atol=0.02, rtol=0)
