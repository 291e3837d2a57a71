"""The criterion against numbers of the method's public implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from losses import IABCE, Criterion
from matchers import Mixed, match_groups
from structures import DetectorOutputs, Prediction, QueryGroup, Targets

FOLDER = Path(__file__).parents[1] / "fixtures" / "criterion"


@pytest.fixture(scope="module")
def case():
    settings = json.loads((FOLDER / "align_criterion_case.json").read_text())
    with np.load(FOLDER / "align_criterion_case.npz") as arrays:
        return settings, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _run(settings, arrays):
    leaves = {i: (arrays[f"logits_{i}"].clone().requires_grad_(), arrays[f"boxes_{i}"].clone().requires_grad_())
              for i in range(7)}  # fmt: skip
    order = [1, 2, 3, 4, 5, 0]  # the case puts the last decoder layer first
    decoder = Prediction(*(torch.stack([leaves[i][part] for i in order]) for part in (0, 1)))
    images = range(len(settings["ngt"]))
    targets = Targets(
        torch.cat([arrays[f"labels_{b}"] for b in images]),
        torch.cat([arrays[f"gtboxes_{b}"] for b in images]),
        tuple(settings["ngt"]),
    )
    criterion = Criterion(
        classification=IABCE(alpha=settings["alpha"], gamma=settings["gamma"]),
        matcher=Mixed(candidates=tuple(settings["match_num"])),
        prime_sample_tau=settings["tau"],
    )
    encoder = Prediction(*(leaf[None] for leaf in leaves[6]))
    groups = {"encoder": QueryGroup(encoder), "decoder": QueryGroup(decoder)}
    return leaves, groups, targets, criterion, criterion(DetectorOutputs(groups), targets)


def test_losses_agree(case):
    settings, arrays = case
    *_, result = _run(settings, arrays)
    for term in ("class", "bbox", "giou"):
        for layer in range(5):
            assert result.terms[f"decoder.{layer}/{term}"].item() == pytest.approx(
                settings["losses"][f"loss_{term}_{layer}"], rel=1e-5
            )
        assert result.terms[f"decoder.5/{term}"].item() == pytest.approx(settings["losses"][f"loss_{term}"], rel=1e-5)
        assert result.terms[f"encoder/{term}"].item() == pytest.approx(settings["losses"][f"loss_{term}_enc"], rel=1e-5)
    assert result.total.item() == pytest.approx(settings["total"], rel=1e-5)


def test_gradients_agree(case):
    settings, arrays = case
    leaves, *_, result = _run(settings, arrays)
    result.total.backward()
    for i, (logits, boxes) in leaves.items():
        torch.testing.assert_close(logits.grad, arrays[f"glogits_{i}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(boxes.grad, arrays[f"gboxes_{i}"], rtol=1e-5, atol=1e-5)


def test_matches_agree(case):
    settings, arrays = case
    _, groups, targets, criterion, _ = _run(settings, arrays)
    candidates = criterion.matcher.candidates_by_layer({"encoder": 1, "decoder": 6})
    matches = match_groups(groups, dict.fromkeys(groups, criterion.matcher), candidates, targets)
    offsets = np.concatenate(([0], np.cumsum(settings["ngt"])))
    for name, layer, i in [("encoder", 0, 6), *(("decoder", layer, (layer + 1) % 6) for layer in range(6))]:
        for b in range(len(settings["ngt"])):
            found = matches[name]
            chosen = (found.layer == layer) & (found.image == b)
            ours = set(zip(found.query[chosen].tolist(), (found.target[chosen] - offsets[b]).tolist(), strict=True))
            theirs = set(zip(arrays[f"src_{i}_{b}"].tolist(), arrays[f"tgt_{i}_{b}"].tolist(), strict=True))
            assert ours == theirs
