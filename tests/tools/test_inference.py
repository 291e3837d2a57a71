"""Finished models run in the precision of training or in one that is asked for, and say what there is to know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.inference import computes_bf16
from tools.predictor import Predictor


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
    assert computes_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert computes_bf16() is False


def test_predictions_are_bf16s_where_that_is_asked_for(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.inference.computes_bf16", lambda: False)
    image = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))
    full = Predictor(tiny_checkpoint, device="cpu")
    found = Predictor(tiny_checkpoint, device="cpu", overrides=["trainer.inference_precision=bf16"])
    assert (found.precision, found.remark) == ("bf16", "computing in bf16, unlike training")
    assert (full.precision, full.remark) == ("fp32", None)
    assert found.model.backbone.channels_last
    (ours,), (expected,) = found([image]), full([image])
    assert not torch.equal(ours.scores, expected.scores)
    torch.testing.assert_close(ours.scores, expected.scores, atol=0.02, rtol=0)
    trained_in_bf16 = Predictor(tiny_checkpoint, device="cpu", overrides=["trainer.precision=bf16"])
    assert (trained_in_bf16.precision, trained_in_bf16.remark) == ("fp32", None)
    monkeypatch.setattr("engine.inference.computes_bf16", lambda: True)
    remark = Predictor(tiny_checkpoint, device="cpu").remark
    assert remark is not None
    assert remark.startswith("trainer.inference_precision=bf16 is faster on this processor")
