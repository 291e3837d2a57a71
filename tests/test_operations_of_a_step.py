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
def test_multiplications_are_those_that_pytorch_counts(gradients: bool) -> None:
    convolution, linear, rows = torch.nn.Conv1d(4, 4, 1), torch.nn.Linear(8, 8), torch.randn(2, 4, 8)

    def call() -> None:
        attended = torch.nn.functional.scaled_dot_product_attention(*[linear(convolution(rows))[:, None]] * 3)
        if gradients:
            attended.sum().backward()

    with FlopCounterMode(display=False) as theirs:
        call()
    with Dispatched() as seen, torch.inference_mode(not gradients):
        call()
    assert seen.flops == theirs.get_total_flops() > 0
