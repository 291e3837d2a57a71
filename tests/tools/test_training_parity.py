"""A training step of the published Align-DETR loses what one of this code does, from equal weights, batch and noise.

The expected losses come from the authors' code (FelixCaae/AlignDETR 4b125f7 on detrex e244e6c), run in
fp32 on the CPU with its own pure PyTorch attention, on two images with three targets each and 16 denoising groups.
"""

from __future__ import annotations

import published_weights
import pytest
import torch
from test_import_parity import build

from losses import Criterion
from losses.ia_bce import IABCE
from matchers import Mixed
from structures import Images, Targets

CASE, GROUPS, COUNTS = "3+3", 16, (3, 3)
WEIGHTED = {
    "class": [3.61806, 4.35237, 4.63581, 15.68646, 17.87644, 19.80793, 30.69268],
    "bbox": [4.00171, 4.41387, 4.42106, 4.76209, 5.31039, 6.47917, 6.63557],
    "giou": [3.28141, 3.33892, 3.46657, 3.50299, 4.30038, 4.81134, 5.18962],
}
"""Of the encoder, three decoder layers and the denoising in each, times the weights of the losses, in order of size."""


def targets() -> Targets:
    """Three of each image, of numbers that depend on their names alone."""
    drawn = torch.stack(
        [torch.from_numpy(published_weights.uniform(f"targets {CASE} {i}", (8, 5)))[:3] for i in (0, 1)]
    )
    boxes = torch.cat([0.5 + 0.25 * drawn[..., :2], 0.22 + 0.15 * drawn[..., 2:4]], dim=-1).flatten(0, 1)
    return Targets(((drawn[..., 4] + 1) / 2 * 80).long().flatten(), boxes, COUNTS, (1, 2))


def test_losses_of_a_step_equal_align_detrs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("aligndetr_r50", ["model.denoising.queries=50"]).train()
    # Theirs go group by group through the targets of all images, positives before negatives.
    uniform = published_weights.uniform(f"noise {CASE}", (2 * GROUPS, sum(COUNTS), 10))
    noise = ((torch.from_numpy(uniform) + 1) / 2).unflatten(1, (2, 3)).transpose(0, 1).flatten(1, 2)
    generator = type(model.denoising)
    labels, boxes = generator._noised_labels, generator._noised_boxes
    monkeypatch.setattr(generator, "_noised_labels", lambda own, x, *_: labels(own, x, noise[..., 8], noise[..., 9]))
    monkeypatch.setattr(generator, "_noised_boxes", lambda own, x, positive, _: boxes(own, x, positive, noise))
    criterion = Criterion(classification=IABCE(), matcher=Mixed(candidates=2), prime_sample_tau=1.5)
    with torch.no_grad():
        found = criterion(model(Images(*published_weights.images()), targets()), targets())
    for name, weight in (("class", 1.0), ("bbox", 5.0), ("giou", 2.0)):
        own = sorted(weight * float(value) for term, value in found.terms.items() if term.endswith(f"/{name}"))
        assert own == pytest.approx(WEIGHTED[name], rel=1e-5)
