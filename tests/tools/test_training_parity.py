"""One training step of DINO and of Align-DETR, denoising included: losses and gradients are those of the public code.

The expected numbers come from the code of both projects (IDEA-Research/DINO, and FelixCaae/AlignDETR 4b125f7 on detrex
e244e6c), run in fp32 on the CPU with its own pure PyTorch attention, from equal weights, images and noise. Theirs treat
what fills up the denoising queries of an image with fewer targets as background, where this code leaves it out (see
docs/fidelity.md): with no targets in the second image, gradients are those of all losses but denoising's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import published_weights
import pytest
import torch
from test_import_parity import build
from test_import_step import check_gradients

from losses import Criterion
from losses.criterion import GroupSupervision
from losses.focal import Focal
from losses.ia_bce import IABCE
from matchers import Hungarian, Mixed
from structures import Images, Targets

GROUPS = 16
"""Of 50 denoising queries, for three targets."""
CRITERIA = {
    "dino_4scale_r50": Criterion(classification=Focal(alpha=0.25, gamma=2.0), matcher=Hungarian()),
    "aligndetr_r50": Criterion(classification=IABCE(), matcher=Mixed(candidates=2), prime_sample_tau=1.5),
}
COUNTS = {"3+3": (3, 3), "3+0": (3, 0)}


def targets(case: str) -> Targets:
    """Of two images, of numbers that depend on their names alone."""
    drawn = torch.cat(
        [
            torch.from_numpy(published_weights.uniform(f"targets {case} {i}", (8, 5)))[:count]
            for i, count in enumerate(COUNTS[case])
        ]
    )
    boxes = torch.cat([0.5 + 0.25 * drawn[:, :2], 0.22 + 0.15 * drawn[:, 2:4]], dim=1)
    return Targets(((drawn[:, 4] + 1) / 2 * 80).long(), boxes, COUNTS[case], (1, 2))


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("published", CRITERIA)
def test_a_step_equals_the_published_code(published: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noised = ["queries=50", "label_noise=0.5", "box_noise=1"]
    model = build(published, [f"model.denoising.{entry}" for entry in noised]).train()
    # Theirs go group by group through the targets of all images, positives before negatives; ours image by image.
    uniform = published_weights.uniform(f"noise {case}", (2 * GROUPS, sum(COUNTS[case]), 10))
    noise = torch.full((2, 2 * GROUPS * 3, 10), 0.5)
    for row, part in zip(noise, torch.from_numpy(uniform).split(COUNTS[case], dim=1), strict=True):
        row[: part.shape[0] * part.shape[1]] = (part.flatten(0, 1) + 1) / 2
    rows = iter(noise.numpy())
    monkeypatch.setattr(type(model.denoising), "_draw", lambda own, count, _: next(rows)[:count])
    left_out = {} if case == "3+3" else {"denoising": GroupSupervision(weight=0.0)}
    criterion = dataclasses.replace(CRITERIA[published], groups=left_out)
    loss = criterion(model(Images(*published_weights.images()), targets(case)), targets(case))
    loss.total.backward()

    expected = np.load(published_weights.FIXTURES / f"{published}_step.npz")
    assert sorted(loss.terms) == expected["terms"].tolist()
    for name, value in zip(expected["terms"].tolist(), expected[f"losses {case}"].tolist(), strict=True):
        if case == "3+3" or not name.startswith("denoising") or not name.endswith("class"):
            assert loss.terms[name].item() == pytest.approx(value, rel=2e-5), name
    check_gradients(model, expected["parameters"], expected[f"norms {case}"], expected[f"projections {case}"])
