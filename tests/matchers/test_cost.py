import pytest
import torch

import matchers.cost as cost_module
from matchers import MatchingCost
from structures import Prediction, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import make_outputs


def detached(prediction):
    return Prediction(*(part.detach() for part in prediction))


def test_is_the_published_cost_of_every_pair():
    outputs, targets = make_outputs(0, (3, 0, 8), num_queries=11, num_classes=6, dtype=torch.float64)
    cost = MatchingCost()(detached(outputs.decoder), targets)
    assert cost.shape == (3, 3, 8, 11)
    assert cost.dtype == torch.float32
    for layer in range(3):
        for image, (labels, boxes) in enumerate(targets.split()):
            expected = oracle.cost_matrix(
                outputs.decoder.logits[layer, image], outputs.decoder.boxes[layer, image], labels, boxes.double()
            )
            torch.testing.assert_close(
                cost[layer, image, : len(labels)], expected.T.detach().float(), rtol=1e-5, atol=2e-6
            )


def test_many_targets_of_few_classes_take_the_other_path_to_the_same_cost():
    outputs, targets = make_outputs(1, (9, 4), num_queries=10, num_classes=3)
    prediction = detached(outputs.decoder)
    cost = MatchingCost()(prediction, targets)
    first = Targets(targets.labels[9:], targets.boxes[9:], (4,))
    alone = MatchingCost()(Prediction(prediction.logits[:, 1:], prediction.boxes[:, 1:]), first)
    few = MatchingCost()(
        Prediction(torch.nn.functional.pad(prediction.logits, (0, 40), value=-3.0)[:, 1:], prediction.boxes[:, 1:]),
        first,
    )
    torch.testing.assert_close(cost[:, 1, :4], alone[:, 0])
    torch.testing.assert_close(few, alone)


def test_large_batches_are_computed_in_chunks(monkeypatch):
    outputs, targets = make_outputs(2, (5, 2), num_layers=4)
    whole = MatchingCost()(outputs.decoder, targets)
    monkeypatch.setitem(cost_module._CHUNK_ELEMENTS, "cpu", 1)
    torch.testing.assert_close(MatchingCost()(outputs.decoder, targets), whole, rtol=0, atol=0)


def test_weights_choose_the_terms():
    outputs, targets = make_outputs(3, (4,), num_layers=1)
    prediction = detached(outputs.decoder)
    single = {
        "classification": MatchingCost(classification=1, bbox=0, giou=0),
        "bbox": MatchingCost(classification=0, bbox=1, giou=0),
        "giou": MatchingCost(classification=0, bbox=0, giou=1),
    }
    parts = {name: cost(prediction, targets) for name, cost in single.items()}
    total = MatchingCost(classification=3, bbox=0.5, giou=7)(prediction, targets)
    torch.testing.assert_close(total, 3 * parts["classification"] + 0.5 * parts["bbox"] + 7 * parts["giou"])
    distance = (prediction.boxes[0, 0, None] - targets.boxes[:, None]).abs().sum(-1)
    torch.testing.assert_close(parts["bbox"][0, 0], distance)


@pytest.mark.parametrize("value", [-100.0, -30.0, 30.0, 100.0])
@pytest.mark.parametrize("modulation", [0.0, 0.5])
def test_extreme_logits_cost_finitely_and_in_order(value, modulation):
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2])
    targets = Targets(torch.tensor([0]), boxes[None], (1,))
    logits = torch.tensor([value, value + 20])[:, None]
    cost = MatchingCost(position_modulation=modulation)(
        Prediction(logits[None, None], boxes.expand(1, 1, 2, 4)), targets
    )
    assert cost.isfinite().all()
    assert cost[0, 0, 0, 1] <= cost[0, 0, 0, 0]


def test_half_precision_and_autocast_compute_in_float32():
    outputs, targets = make_outputs(4, (3, 2))
    half = Prediction(outputs.decoder.logits.detach().bfloat16(), outputs.decoder.boxes.detach().bfloat16())
    expected = MatchingCost()(Prediction(half.logits.float(), half.boxes.float()), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MatchingCost()(half, targets), expected)


def test_position_modulation_is_the_focal_cost_of_the_modulated_score():
    outputs, targets = make_outputs(5, (4, 0, 2), num_layers=2)
    prediction = detached(outputs.decoder)
    cost = MatchingCost(classification=1, bbox=0, giou=0, position_modulation=0.5)(prediction, targets)
    for layer in range(2):
        for image, (labels, boxes) in enumerate(targets.split()):
            if not len(labels):
                continue
            position = (oracle.all_overlaps(prediction.boxes[layer, image], boxes)[1] + 1) / 2
            score = prediction.logits[layer, image][:, labels].sigmoid() * (position / position.max()) ** 0.5
            expected = -0.25 * (1 - score) ** 2 * score.log() + 0.75 * score**2 * (1 - score).log()
            torch.testing.assert_close(cost[layer, image, : len(labels)], expected.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"classification": -1}, {"classification": 0, "bbox": 0, "giou": 0}, {"alpha": 1.5}, {"gamma": -1.0}],
)
def test_senseless_settings_are_refused(fields):
    with pytest.raises(ValueError, match="matching cost"):
        MatchingCost(**fields)
