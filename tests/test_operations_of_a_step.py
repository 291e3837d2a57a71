"""How many operations a training step dispatches: on a GPU, with small batches, they are what it takes time for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import losses.binary
import matchers.cost
from benchmarks.step import Dispatched, make_batch, ours

MOST = 1500
"""Of DINO with ResNet-50; 2,936 when first counted."""


def test_operations_of_a_dino_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted with small images and few queries, on which it does not depend once a device takes them in one piece."""
    monkeypatch.setattr(matchers.cost, "_CHUNK_ELEMENTS", {})
    monkeypatch.setattr(losses.binary, "_CPU_CHUNK", 1 << 40)
    cfg = config.load("configs/dino_r50_12ep.yaml", ["model.num_queries=100"])
    call = ours(cfg, make_batch((96, 128), 2), infer=False, dtype="float32")
    call()
    with Dispatched() as seen:
        call()
    assert 1000 < seen.operations.total() <= MOST
    # Nothing is read number by number: the matching costs are copied as a whole, the norm of the gradient on its way.
    assert seen.reads == 0


@pytest.mark.parametrize("gradients", [True, False])
def test_multiplications_are_those_that_pytorch_counts(gradients):
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(gradients)
    rows = torch.randn(2, 5, 8)
    with FlopCounterMode(display=False) as theirs:
        model(rows).sum().backward() if gradients else model(rows)
    with Dispatched() as ours, torch.inference_mode(not gradients):
        model(rows).sum().backward() if gradients else model(rows)
    assert ours.flops == theirs.get_total_flops() > 0
