"""Curves of a run, as far as numbers can say it; the pictures themselves are looked at by people."""

import json
import random
from pathlib import Path

import pytest
from torchvision.io import decode_image

from engine.pictures import _smooth, draw_curves


def test_smoothing_neither_lags_behind_nor_moves_a_straight_line() -> None:
    ramp = [0.5 * i for i in range(100)]
    assert _smooth(ramp) == pytest.approx(ramp)
    generator = random.Random(0)
    noisy = [value + generator.gauss(0, 1) for value in ramp]
    before, after = (
        sum((value - true) ** 2 for value, true in zip(values, ramp, strict=True)) for values in (noisy, _smooth(noisy))
    )
    assert after < before / 3
    assert (_smooth([]), _smooth([2.0])) == ([], [2.0])


@pytest.mark.usefixtures("with_curves")
def test_curves_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    """Steps that were taken twice are drawn once; a run without evaluations, or without anything, is drawn too."""
    records = [{"kind": "train", "step": step, "loss": 9.0 - step, "lr": 1e-4} for step in (1, 2, 3, 2, 3, 4)]
    sizes = set()
    for count in (0, 1, 6):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        sizes.add(tuple(decode_image(tmp_path / "curves.png").shape))
    assert len(sizes) == 1
