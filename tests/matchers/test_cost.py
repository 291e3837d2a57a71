"""Every matching cost against a loop over its equation, and what all of them promise."""

from __future__ import annotations

import math
import typing

import pytest
import torch

import matchers.cost as cost_module
from matchers import Cost, FocalCost, PositionModulatedCost, SoftmaxCost
from structures import Prediction, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import make_outputs

COSTS = typing.get_args(Cost)
every_cost = pytest.mark.parametrize("kind", COSTS, ids=lambda kind: kind.name)


def decoder_case(seed: int, counts: tuple[int, ...], **sizes) -> tuple[Prediction, Targets]:
    """Predictions of a decoder, without gradients, and targets."""
    outputs, targets = make_outputs(seed, counts, denoising=False, **sizes)
    return Prediction(*(part.detach() for part in outputs.groups["decoder"].prediction)), targets


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focal(score: float, alpha: float, gamma: float) -> float:
    return -alpha * (1 - score) ** gamma * math.log(score) + (1 - alpha) * score**gamma * math.log(1 - score)


def focal_term(cost: FocalCost, logits: list[float], label: int, position: float) -> float:
    return focal(sigmoid(logits[label]), cost.alpha, cost.gamma)


def modulated_term(cost: PositionModulatedCost, logits: list[float], label: int, position: float) -> float:
    return focal(sigmoid(logits[label]) * position**cost.beta, cost.alpha, cost.gamma)


def softmax_term(cost: SoftmaxCost, logits: list[float], label: int, position: float) -> float:
    return -math.exp(logits[label]) / sum(math.exp(x) for x in logits)


TERMS = {FocalCost: focal_term, PositionModulatedCost: modulated_term, SoftmaxCost: softmax_term}
"""Class term of one query, given its logits, with one target, given its label and its position relative to the best."""
VARIANTS = [
    *(kind() for kind in COSTS),
    FocalCost(classification=1.0, bbox=0.5, giou=7.0, alpha=0.6, gamma=1.5),
    PositionModulatedCost(classification=1.0, bbox=0.0, giou=0.0, beta=2.0, gamma=0.5),
    PositionModulatedCost(beta=0.0),
    SoftmaxCost(classification=3.0, bbox=0.0, giou=0.5),
]


def test_every_cost_of_the_index_is_tested_here():
    assert set(TERMS) == set(COSTS)


@pytest.mark.parametrize("cost", VARIANTS, ids=repr)
@pytest.mark.parametrize("num_classes", [3, 11], ids="{} classes".format)  # fewer than targets, and more
def test_is_its_equation_for_every_pair(cost, num_classes):
    prediction, targets = decoder_case(
        0, (3, 0, 8), num_layers=2, num_queries=6, num_classes=num_classes, dtype=torch.float64
    )
    found = cost(prediction, targets)
    assert found.shape == (2, 3, 8, 6)
    assert found.dtype == torch.float32
    for layer in range(2):
        for image, (labels, boxes) in enumerate(targets.split()):
            if not len(labels):
                continue
            giou = oracle.all_overlaps(prediction.boxes[layer, image], boxes.double())[1]
            positions = (giou + 1) / 2 / ((giou + 1) / 2).max()
            for query, (logits, box) in enumerate(zip(*(part[layer, image] for part in prediction), strict=True)):
                for target, label in enumerate(labels.tolist()):
                    distance = sum(abs(a - b) for a, b in zip(box.tolist(), boxes[target].tolist(), strict=True))
                    term = TERMS[type(cost)](cost, logits.tolist(), label, positions[query, target].item())
                    expected = (
                        cost.classification * term + cost.bbox * distance - cost.giou * giou[query, target].item()
                    )
                    assert found[layer, image, target, query].item() == pytest.approx(expected, rel=1e-4, abs=2e-5)


def test_is_the_published_cost_of_every_pair():
    prediction, targets = decoder_case(0, (3, 0, 8), num_queries=11, num_classes=6, dtype=torch.float64)
    cost = FocalCost()(prediction, targets)
    assert cost.shape == (3, 3, 8, 11)
    assert cost.dtype == torch.float32
    for layer in range(3):
        for image, (labels, boxes) in enumerate(targets.split()):
            expected = oracle.cost_matrix(
                prediction.logits[layer, image], prediction.boxes[layer, image], labels, boxes.double()
            )
            torch.testing.assert_close(cost[layer, image, : len(labels)], expected.T.float(), rtol=1e-5, atol=2e-6)


def test_many_targets_of_few_classes_take_the_other_path_to_the_same_cost():
    prediction, targets = decoder_case(1, (9, 4), num_queries=10, num_classes=3)
    cost = FocalCost()(prediction, targets)
    first = Targets(targets.labels[9:], targets.boxes[9:], (4,))
    alone = FocalCost()(Prediction(prediction.logits[:, 1:], prediction.boxes[:, 1:]), first)
    few = FocalCost()(
        Prediction(torch.nn.functional.pad(prediction.logits, (0, 40), value=-3.0)[:, 1:], prediction.boxes[:, 1:]),
        first,
    )
    torch.testing.assert_close(cost[:, 1, :4], alone[:, 0])
    torch.testing.assert_close(few, alone)


@every_cost
def test_an_image_costs_what_it_costs_alone(kind):
    prediction, targets = decoder_case(1, (9, 4, 0), num_queries=10)
    together = kind()(prediction, targets)
    for image, (labels, boxes) in enumerate(targets.split()):
        own = Prediction(*(part[:, image : image + 1] for part in prediction))
        alone = kind()(own, Targets(labels, boxes, (len(labels),)))
        torch.testing.assert_close(together[:, image, : len(labels)], alone[:, 0])


@every_cost
def test_large_batches_are_computed_in_chunks(monkeypatch, kind):
    prediction, targets = decoder_case(2, (5, 2), num_layers=4)
    whole = kind()(prediction, targets)
    monkeypatch.setitem(cost_module._CHUNK_ELEMENTS, "cpu", 1)
    real = torch.arange(5) < torch.tensor(targets.counts)[:, None]
    torch.testing.assert_close(kind()(prediction, targets)[:, real], whole[:, real], rtol=0, atol=0)


@every_cost
def test_weights_choose_the_terms(kind):
    prediction, targets = decoder_case(3, (4,), num_layers=1)
    single = {
        "classification": kind(classification=1, bbox=0, giou=0),
        "bbox": kind(classification=0, bbox=1, giou=0),
        "giou": kind(classification=0, bbox=0, giou=1),
    }
    parts = {name: cost(prediction, targets) for name, cost in single.items()}
    total = kind(classification=3, bbox=0.5, giou=7)(prediction, targets)
    torch.testing.assert_close(total, 3 * parts["classification"] + 0.5 * parts["bbox"] + 7 * parts["giou"])
    distance = (prediction.boxes[0, 0, None] - targets.boxes[:, None]).abs().sum(-1)
    torch.testing.assert_close(parts["bbox"][0, 0], distance)


@every_cost
@pytest.mark.parametrize("value", [-100.0, -30.0, 30.0, 100.0])
def test_extreme_logits_cost_finitely_and_in_order(value, kind):
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2])
    targets = Targets(torch.tensor([0]), boxes[None], (1,))
    logits = torch.tensor([[value, 0.0], [value + 20, 0.0]])
    cost = kind()(Prediction(logits[None, None], boxes.expand(1, 1, 2, 4)), targets)
    assert cost.isfinite().all()
    assert cost[0, 0, 0, 1] <= cost[0, 0, 0, 0]


@every_cost
def test_half_precision_and_autocast_compute_in_float32(kind):
    prediction, targets = decoder_case(4, (3, 2))
    half = Prediction(*(part.bfloat16() for part in prediction))
    expected = kind()(Prediction(*(part.float() for part in half)), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kind()(half, targets), expected)


def test_position_modulation_is_the_focal_cost_of_the_modulated_score():
    prediction, targets = decoder_case(5, (4, 0, 2), num_layers=2)
    cost = PositionModulatedCost(classification=1, bbox=0, giou=0, beta=0.5)(prediction, targets)
    for layer in range(2):
        for image, (labels, boxes) in enumerate(targets.split()):
            if not len(labels):
                continue
            position = (oracle.all_overlaps(prediction.boxes[layer, image], boxes)[1] + 1) / 2
            score = prediction.logits[layer, image][:, labels].sigmoid() * (position / position.max()) ** 0.5
            expected = -0.25 * (1 - score) ** 2 * score.log() + 0.75 * score**2 * (1 - score).log()
            torch.testing.assert_close(cost[layer, image, : len(labels)], expected.T, rtol=1e-4, atol=1e-5)


def test_softmax_costs_depend_on_all_classes_and_focal_ones_on_that_of_the_target():
    prediction, targets = decoder_case(6, (2,), num_layers=1, num_queries=1, num_classes=4)
    others = torch.ones(4, dtype=torch.bool)
    others[targets.labels] = False
    raised = Prediction(torch.where(others, prediction.logits + 3, prediction.logits), prediction.boxes)
    assert (SoftmaxCost()(raised, targets) > SoftmaxCost()(prediction, targets)).all()
    assert torch.equal(FocalCost()(raised, targets), FocalCost()(prediction, targets))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {"classification": -1}) for kind in COSTS),
        *((kind, {"classification": 0, "bbox": 0, "giou": 0}) for kind in COSTS),
        *(
            (kind, fields)
            for kind in (FocalCost, PositionModulatedCost)
            for fields in ({"alpha": 1.5}, {"gamma": -1.0})
        ),
        (PositionModulatedCost, {"beta": -0.5}),
    ],
)
def test_senseless_settings_are_refused(kind, fields):
    with pytest.raises(ValueError, match="matching cost"):
        kind(**fields)
