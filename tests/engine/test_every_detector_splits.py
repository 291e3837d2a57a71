"""Every detector of the index: the gradient of a batch, however it is split over micro-batches and processes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from tiny_training import make_batch, map_pixels
from training_processes import run_processes

from engine import distributed
from engine.optimizer import OptimizerConfig
from engine.step import OptimizerStep
from structures import Batch, BatchSize

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from family import DETECTORS, FAMILY, criterion_for


def batch(seeds: list[int]) -> Batch:
    """Images of 48 x 48 pixels; the one of seed 0 has no targets."""
    small = make_batch(seeds)
    larger = map_pixels(small, functools.partial(torch.nn.functional.interpolate, scale_factor=6.0))
    sizes = small.images.sizes * 6
    return larger._replace(images=larger.images._replace(sizes=sizes), original_sizes=sizes)


def gradients(parts: list[list[int]]) -> dict[str, dict[str, torch.Tensor]]:
    """Of a step of each detector, 4 images and 6 targets in all, with micro-batches of these seeds on this process."""
    found = {}
    for detector, name in DETECTORS.items():
        torch.manual_seed(0)
        model = FAMILY[name].build(3)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
        optimizer = OptimizerConfig().build(model)
        step = OptimizerStep(model, criterion_for(FAMILY[name]), optimizer, device=torch.device("cpu"))
        step.backward([batch(seeds) for seeds in parts], BatchSize(6, 4))
        found[detector] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return found


def gradients_of_two_processes(path: Path) -> None:
    with distributed.process_group(torch.device("cpu"), 60):
        found = gradients([[2, 3]] if distributed.rank() else [[0, 1]])
        if distributed.is_main():
            torch.save(found, path)


def test_gradients_do_not_depend_on_the_split(tmp_path: Path) -> None:
    """One batch, two micro-batches, two processes: the same sums."""
    assert sum(batch([0, 1, 2, 3]).targets.counts) == 6
    ended = run_processes(functools.partial(gradients_of_two_processes, tmp_path / "two.pth"), processes=2)
    assert [end.code for end in ended] == [0, 0], ended[0].errors
    whole, two = gradients([[0, 1, 2, 3]]), torch.load(tmp_path / "two.pth", weights_only=True)
    for other in (gradients([[0, 1], [2, 3]]), two):
        for detector, expected in whole.items():
            assert other[detector].keys() == expected.keys()
            scale = max(float(value.abs().max()) for value in expected.values())
            for key, value in expected.items():
                torch.testing.assert_close(other[detector][key], value, rtol=1e-3, atol=1e-5 * scale, msg=key)
