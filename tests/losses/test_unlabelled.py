"""What annotators said nothing about takes no part in the classification loss; weights of classes. Hand-made cases."""

import dataclasses

import pytest
import torch

from losses import Criterion
from losses.balance import balanced_weights
from losses.pairs import Block
from losses.unlabelled import without_unlabelled
from matchers import FocalCost, Hungarian, SoftmaxCost
from structures import DetectorOutputs, Prediction, QueryGroup, Targets, UnlabelledParts
from tests.losses.loss_cases import LOSSES

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def case(loss, classes=((False, False, False), (False, False, False)), regions=((), ())):
    """Two images of three classes: query 0 lies on the target of class 1 of the first, query 1 in its right half."""
    num_logits = 3 + loss.no_object
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, num_logits, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.5, 0.3, 0.3], [0.4, 0.5, 0.2, 0.2]], dtype=torch.float64)
    boxes = boxes.expand(1, 2, 3, 4)
    parts = [torch.tensor([label for label, _ in own], dtype=torch.long) for own in regions]
    places = [torch.tensor([box for _, box in own], dtype=torch.float64).reshape(-1, 4) for own in regions]
    unlabelled = UnlabelledParts(torch.tensor(classes), torch.cat(parts), torch.cat(places), tuple(map(len, parts)))
    targets = Targets(torch.tensor([1]), torch.tensor([[0.2, 0.2, 0.2, 0.2]]), (1, 0), unlabelled=unlabelled)
    matcher = Hungarian(cost=SoftmaxCost() if loss.no_object else FocalCost())
    criterion = Criterion(classification=loss, matcher=matcher, unlabelled="ignored")
    return criterion, DetectorOutputs({"decoder": QueryGroup(Prediction(logits, boxes))}), targets, logits


def gradient(criterion, outputs, targets, logits):
    only_class = dataclasses.replace(criterion.weights, bbox=0.0, giou=0.0)
    (found,) = torch.autograd.grad(dataclasses.replace(criterion, weights=only_class)(outputs, targets).total, logits)
    return found[0]


RIGHT_HALF = [0.75, 0.5, 0.5, 1.0]


@every_loss
def test_silent_classes_and_queries_in_ignored_regions_take_no_part(loss):
    silent = ((False, False, True), (True, False, False))
    problem = case(loss, silent, (((0, RIGHT_HALF),), ((-1, RIGHT_HALF),)))
    found = gradient(*problem)
    absent = torch.zeros(2, 3, 3, dtype=torch.bool)
    absent[0, :, 2] = absent[1, :, 0] = True
    absent[0, 1, 0] = True  # query 1 lies in the region of class 0
    absent[1, 1] = True  # in the second image in one of any class
    assert torch.equal(found[..., :3] == 0, absent)
    if loss.no_object:
        assert found[1, 1, 3] == 0
        return
    everything = gradient(dataclasses.replace(problem[0], unlabelled="background"), *problem[1:])
    torch.testing.assert_close(found, everything.masked_fill(absent, 0))


@every_loss
def test_a_matched_entry_always_takes_part(loss):
    found = gradient(*case(loss, ((True, True, True), (True, True, True)), (((-1, [0.5, 0.5, 1.0, 1.0]),), ())))
    assert found[0, 0, 1] != 0 or loss.no_object  # under a softmax nothing else is left to compare it with
    assert found[1, :, :3].count_nonzero() == 0


def test_queries_that_lie_half_in_a_region_are_background():
    problem = case(LOSSES[0], regions=(((-1, [0.75, 0.5, 0.75, 1.0]),), ()))  # from 0.375: query 2 has 0.3 to 0.5
    found = gradient(*problem)
    assert (found[0, 1] == 0).all()
    assert (found[0, 2] == 0).all(), "0.125 of 0.2"
    problem = case(LOSSES[0], regions=(((-1, [0.75, 0.5, 0.68, 1.0]),), ()))  # from 0.41: less than half of it
    assert (gradient(*problem)[0, 2] != 0).all()


def test_a_class_agnostic_group_knows_regions_only():
    _, outputs, targets, logits = case(LOSSES[0], ((True,) * 3, (True,) * 3), (((2, RIGHT_HALF),), ()))
    group = outputs.groups["decoder"]
    group = group._replace(prediction=Prediction(logits[..., :1], group.prediction.boxes), class_agnostic=True)
    nothing = torch.empty(0, dtype=torch.long)
    flat = without_unlabelled(Block([group], logits[..., :1].reshape(-1, 1), nothing, nothing, nothing), targets)
    changed = (flat != logits[..., :1].reshape(-1, 1)).flatten()
    assert changed.tolist() == [False, True, False, False, False, False]


@every_loss
def test_weights_of_classes_in_the_criterion(loss):
    """Through the whole criterion they scale each class's column of the gradient, and nothing else."""
    criterion, outputs, targets, logits = case(loss)
    weighted = dataclasses.replace(criterion, class_weights=(0.5, 2.0, 3.0))
    if loss.no_object:  # of a softmax, only rows with a target
        plain, found = gradient(criterion, outputs, targets, logits), gradient(weighted, outputs, targets, logits)
        factors = torch.ones(2, 3, 1, dtype=torch.float64)
        factors[0, 0] = 2
        torch.testing.assert_close(found, plain * factors)
        return
    found = gradient(weighted, outputs, targets, logits)
    expected = gradient(criterion, outputs, targets, logits) * torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_weights_from_frequencies():
    assert balanced_weights("inverse_frequency", [10, 30, 0]) == pytest.approx((2.0, 2 / 3, 1.0))
    for balance in ("inverse_frequency", "inverse_root"):
        counts = [5, 80, 15]
        weights = balanced_weights(balance, counts)
        assert sum(n * w for n, w in zip(counts, weights, strict=True)) == pytest.approx(100)
        assert weights[0] / weights[1] == pytest.approx({"inverse_frequency": 16, "inverse_root": 4}[balance])
    resolved = Criterion(class_weights="inverse_root").for_classes([4, 1])
    assert resolved.class_weights == pytest.approx((5 / 6, 5 / 3))
    assert Criterion().for_classes([4, 1]) == Criterion()


def test_senseless_weights_are_refused():
    with pytest.raises(ValueError, match="lists 2 numbers, but the data have 3 classes"):
        Criterion(class_weights=(1.0, 2.0)).for_classes([1, 1, 1])
    with pytest.raises(ValueError, match="not negative"):
        Criterion(class_weights=(1.0, -2.0))
    criterion, outputs, targets, _ = case(LOSSES[0])
    with pytest.raises(ValueError, match="for_classes"):
        dataclasses.replace(criterion, class_weights="inverse_root")(outputs, targets)
