"""Every form in configs/losses against numbers of the public code that it names."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import config
import losses.criterion
import losses.pairs
from losses import IABCE, LossWeights, boxes
from ops.boxes import paired_giou, paired_iou
from structures import DetectorOutputs, Matches, Prediction, QueryGroup, Targets, UnlabelledParts

ROOT = Path(__file__).parents[2]
FORMS = sorted(path.stem for path in (ROOT / "configs" / "losses").glob("*.yaml"))
MANY = ("authors_v1", "mmdetection", "mr_detr")
AREA_EPSILON = ("authors_v1", "authors_focal", "mr_detr")
"""Forms whose overlaps have the epsilon that ours have by default."""


@pytest.fixture(scope="module")
def arrays():
    with np.load(ROOT / "tests" / "fixtures" / "losses" / "public_forms.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def of(form):
    return config.load(ROOT / "configs" / "dino_r50_12ep.yaml", [f"base={ROOT}/configs/losses/{form}.yaml"]).criterion


def term_and_gradient(criterion, arrays, term, monkeypatch, *, many, epsilon, num_logits=3, unlabelled=None):
    """A term of the criterion and its gradient, with the matches of the stored problem."""
    triples = arrays["many" if many else "one"]
    matches = Matches(torch.zeros(len(triples), dtype=torch.long), *triples.unbind(1))
    logits = arrays["logits"][..., :num_logits].clone().requires_grad_()
    predicted = arrays["boxes"].clone().requires_grad_()
    group = QueryGroup(Prediction(logits[None], predicted[None]))
    labels = arrays["labels"] if num_logits > 1 else torch.zeros_like(arrays["labels"])
    targets = Targets(labels, arrays["target_boxes"], (2, 1), unlabelled=unlabelled)
    monkeypatch.setattr(losses.criterion, "match_groups", lambda *_: {"decoder": matches})
    if not epsilon:
        monkeypatch.setattr(losses.pairs, "paired_iou", functools.partial(paired_iou, epsilon=0))
        monkeypatch.setitem(boxes._OVERLAPS, "giou", functools.partial(paired_giou, epsilon=0))
    name = "classification" if term == "class" else term
    only = LossWeights(**{field.name: float(field.name == name) for field in dataclasses.fields(LossWeights)})
    result = dataclasses.replace(criterion, weights=only)(DetectorOutputs({"decoder": group}), targets)
    (gradient,) = torch.autograd.grad(result.total, logits if term == "class" else predicted)
    return result.terms[f"decoder.0/{term}"], gradient


@pytest.mark.parametrize("form", FORMS)
def test_equals_its_source(form, arrays, monkeypatch):
    criterion = of(form)
    if form in ("lw_detr", "rf_detr"):
        criterion = dataclasses.replace(criterion, query_groups=13)
    scale = 1 / 3 if form == "mr_detr" else 1
    terms = [term for term in ("class", "bbox", "giou") if f"{form}/{term}" in arrays]
    assert "class" in terms
    for term in terms:
        value, gradient = term_and_gradient(
            criterion,
            arrays,
            term,
            monkeypatch,
            many=form in MANY,
            epsilon=form in AREA_EPSILON,
            num_logits=1 if form == "sam3" else 3,
        )
        torch.testing.assert_close(scale * value, arrays[f"{form}/{term}"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(scale * gradient, arrays[f"{form}/{term}_grad"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_replaces_every_field_of_another(form):
    """Laid over any file, it gives what it gives over any other."""
    content = yaml.safe_load((ROOT / "configs" / "losses" / f"{form}.yaml").read_text())["criterion"]
    assert content["classification"].keys() == {field.name for field in dataclasses.fields(IABCE)}
    other = f"base={ROOT}/configs/losses/{FORMS[FORMS.index(form) - 1]}.yaml"
    twice = config.load(ROOT / "configs" / "dino_r50_12ep.yaml", [other, f"base={ROOT}/configs/losses/{form}.yaml"])
    assert twice.criterion == of(form)


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("sam3_mean", {"matched_weight": 5.0, "mean_over_queries": 0}),
        ("sam3_focal", {"matched_weight": 5.0, "matched_focal": "soft"}),  # its focal loss has a factor of a half
    ],
)
def test_other_settings_of_sam3(form, fields, arrays, monkeypatch):
    criterion = of("sam3")
    criterion = dataclasses.replace(criterion, classification=dataclasses.replace(criterion.classification, **fields))
    value, gradient = term_and_gradient(
        criterion, arrays, "class", monkeypatch, many=False, epsilon=False, num_logits=1
    )
    torch.testing.assert_close(value, arrays[f"{form}/class"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, arrays[f"{form}/class_grad"], rtol=1e-6, atol=1e-7)


def test_an_image_that_is_not_labelled_exhaustively_is_that_of_sam3(arrays, monkeypatch):
    criterion = dataclasses.replace(of("sam3"), unlabelled="ignored")
    silent = torch.tensor([[False], [True]])
    parts = UnlabelledParts(silent, torch.empty(0, dtype=torch.long), torch.empty(0, 4), (0, 0))
    value, gradient = term_and_gradient(
        criterion, arrays, "class", monkeypatch, many=False, epsilon=False, num_logits=1, unlabelled=parts
    )
    left = 8 + 1  # SAM 3 divides by the entries that take part, we by 200 queries of two images
    torch.testing.assert_close(value * 400 / left, arrays["sam3_partial/class"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient * 400 / left, arrays["sam3_partial/class_grad"], rtol=1e-6, atol=1e-7)
