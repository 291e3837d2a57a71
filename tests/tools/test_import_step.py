"""One training step of imported detectors: losses and gradients are those of the published code.

The expected numbers come from the public code of each project, as in test_import_parity.py. Of each gradient two
numbers are kept: its norm, and its product with a fixed direction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import published_weights
import pytest
import torch
from torch import nn

from structures import Images, Targets
from tools import import_checkpoint
from tools.checkpoint_layouts import COCO, convert

_FOCAL = (
    "criterion.classification={name: focal, alpha: 0.25, gamma: 2.0}",
    "criterion.matcher={name: hungarian}",
    "criterion.weights.classification=2",
    "model.dropout=0",
)
CASES = {
    "align_dab_detr_r50": (
        "criterion.classification={name: ia_bce, alpha: 0.25, gamma: 2.0}",
        "criterion.matcher={name: mixed, candidates: 2}",
        "criterion.prime_sample_tau=1.5",
    ),
    "deformable_detr_two_stage_r50": _FOCAL,
    "h_detr_r50": _FOCAL,  # and of its configuration, the supervision of the one-to-many queries
}


def targets() -> Targets:
    """Three targets of the first image and two of the second."""
    drawn = [torch.from_numpy(published_weights.uniform(f"targets {i}", (3 - i, 5)) + 1) / 2 for i in range(2)]
    numbers = torch.cat(drawn)
    boxes = torch.cat([0.25 + numbers[:, :2] / 2, 0.1 + numbers[:, 2:4] * 0.4], dim=1)
    return Targets((80 * numbers[:, 4]).long(), boxes, (3, 2))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_a_step_equal_the_published_implementation(case: str) -> None:
    description = published_weights.describe(case)
    weights = published_weights.state_dict(description)
    images, sizes = published_weights.images()
    if case == "align_dab_detr_r50":  # whose decoder looks at padding, so it is shown none
        sizes = torch.tensor([images.shape[-2:]] * 2)
    else:  # the other rows of the proposals' head, which this model does not have, never fire
        for name in [name for name in weights if "class_embed.3." in name]:
            weights[name] = weights[name].clone()
            weights[name][1:] = -50.0 if name.endswith("bias") else 0.0
            weights[name][0] = -2.0 if name.endswith("bias") else weights[name][0]
    conversion = convert({"args": argparse.Namespace(**description["settings"])}, weights)
    config = import_checkpoint.configure(conversion, Path(case), CASES[case])
    model = config.model.build(len(COCO), load_backbone=False)
    model.load_state_dict(conversion.tensors)
    model.train()
    loss = config.criterion(model(Images(images, sizes), targets()), targets())
    loss.total.backward()

    expected = np.load(published_weights.FIXTURES / f"{case}_step.npz")
    assert {name.split(".")[0].split("/")[0] for name in loss.terms} == set(config.model.matched_layers)
    assert sorted(loss.terms) == expected["terms"].tolist()
    for name, value in zip(expected["terms"].tolist(), expected["losses"].tolist(), strict=True):
        # It divides by the targets that are repeated six times; the weight of this group in the total makes up for it.
        value = 6 * value if name.startswith("one_to_many") else value
        assert loss.terms[name].item() == pytest.approx(value, rel=2e-5), name
    check_gradients(model, expected["parameters"], expected["norms"], expected["projections"])


def check_gradients(model: nn.Module, names: np.ndarray, norms: np.ndarray, projections: np.ndarray) -> None:
    """The norm of each gradient, and its product with a fixed direction, are as expected."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() <= set(names.tolist())
    assert all("backbone" in name for name in set(names.tolist()) - gradients.keys())
    worst = norms.max()
    for name, norm, projection in zip(names.tolist(), norms.tolist(), projections.tolist(), strict=True):
        if name in gradients:
            ours = gradients[name].double()
            direction = torch.from_numpy(published_weights.uniform(name, tuple(ours.shape)))
            # Rounding decides on which side of a kink a ReLU or a sampled point is, in the deep backbone more often;
            # and it is all the gradient of a bias of keys.
            rounding = 2e-2 if "backbone" in name else 5e-4
            tolerance = rounding * norm + 1e-6 * worst
            assert ours.norm().item() == pytest.approx(norm, abs=tolerance), name
            assert (ours * direction).sum().item() == pytest.approx(projection, abs=tolerance), name
