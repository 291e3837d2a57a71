"""Each classification loss by itself, on plain tensors."""

import dataclasses

import pytest
import torch

from losses import (
    IABCE,
    Align,
    Focal,
    MatchabilityAware,
    PositionSupervised,
    QualityFocal,
    Varifocal,
)
from tests.losses import criterion_oracle as oracle
from tests.losses.loss_cases import KINDS, LOSSES, VARIANTS, variants

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def problem(dtype=torch.float64, seed=0):
    """logits [12, 5], rows, labels, iou, weight of 4 matches; no label is the last logit."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(12, 5, generator=generator, dtype=dtype)).requires_grad_()
    rows, labels = torch.tensor([7, 0, 11, 4]), torch.tensor([3, 0, 2, 2])
    iou = torch.tensor([0.9, 0.3, 0.0, 1.0], dtype=dtype)
    return logits, rows, labels, iou, torch.tensor([1.0, 0.5, 0.8, 0.2], dtype=dtype)


def entries(loss, logits, rows, labels, iou, weight):
    """What the oracle says of every entry."""
    settings = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss) if field.name != "name"}
    matched = torch.zeros(logits.shape, dtype=torch.bool)
    u, w = torch.zeros(2, *logits.shape, dtype=logits.dtype)
    matched[rows, labels] = True
    u[rows, labels], w[rows, labels] = iou, torch.ones_like(iou) if weight is None else weight
    return oracle.LOSSES[loss.name](logits, matched, u, w, **settings)


def test_every_loss_has_an_oracle():
    assert {loss.name for loss in LOSSES} == oracle.LOSSES.keys()


@pytest.mark.parametrize("loss", VARIANTS, ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_is_its_equation(loss, weighted):
    logits, rows, labels, iou, weight = problem()
    weight = weight if weighted else None
    ours = loss(logits, rows, labels, iou, weight)
    expected = entries(loss, logits, rows, labels, iou, weight).sum(1)
    close = {"rtol": 1e-7, "atol": 2e-6}  # powers below 1 have a base of at least 1e-12
    torch.testing.assert_close(ours, expected, **close)
    pull = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    gradients = [torch.autograd.grad((value * pull).sum(), logits) for value in (ours, expected)]
    torch.testing.assert_close(*gradients, **close)


@every_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_class_weights_scale_the_entries_of_their_class(loss, weighted):
    logits, rows, labels, iou, weight = problem()
    weight = weight if weighted else None
    factors = torch.tensor([0.0, 0.5, 3.0, 1.5] if loss.no_object else [0.0, 0.5, 3.0, 1.5, 2.0], dtype=torch.float64)
    ours = loss(logits, rows, labels, iou, weight, None, factors)
    if loss.no_object:
        factors = torch.cat((factors, torch.ones(1, dtype=torch.float64)))
    expected = (entries(loss, logits, rows, labels, iou, weight) * factors).sum(1)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(expected.sum(), logits))


@pytest.mark.parametrize("loss", [Focal(), QualityFocal(), Varifocal(), Align(alpha=0.0)], ids=lambda loss: loss.name)
def test_gradient_is_that_of_the_value(loss):
    """Where the target does not depend on the logits and nothing is detached, finite differences must agree."""
    logits, rows, labels, iou, weight = problem()
    assert torch.autograd.gradcheck(lambda x: loss(x, rows, labels, iou, weight), logits)


@every_loss
def test_no_matches_leave_only_negatives(loss):
    logits = problem()[0]
    nothing = torch.empty(0, dtype=torch.long)
    empty = torch.empty(0, dtype=torch.float64)
    value = loss(logits, nothing, nothing, empty, empty, nothing)
    torch.testing.assert_close(value, entries(loss, logits, nothing, nothing, empty, None).sum(1))
    assert loss(logits[:0], nothing, nothing, empty).shape == (0,)


@every_loss
def test_targets_take_no_gradient(loss):
    logits, rows, labels, iou, weight = problem()
    iou.requires_grad_()
    weight.requires_grad_()
    loss(logits, rows, labels, iou, weight).sum().backward()
    assert iou.grad is None
    assert weight.grad is None
    quality = loss.quality(logits[rows, labels].sigmoid(), iou)
    assert not quality.requires_grad


@every_loss
def test_order_of_the_matches_does_not_matter(loss):
    logits, rows, labels, iou, weight = problem()
    groups = torch.tensor([0, 1, 0, 1])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        loss(logits, rows, labels, iou, weight, groups),
        loss(logits, rows[order], labels[order], iou[order], weight[order], groups[order]),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind().name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_extreme_logits(kind, dtype):
    """With every exponent, in float32 and, as under autocast, from half-precision logits; the result is float32."""
    values = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]).repeat_interleave(4)
    rows = (torch.arange(len(values)) % 4).nonzero()[:, 0]
    iou, weight = torch.tensor([0.0, 0.5, 1.0]).repeat(7), torch.tensor([1.0, 0.5, 1e-3]).repeat(7)
    least = 1 + kind.no_object
    for loss in variants(kind):
        for columns, labels, weights in ((least, rows * 0, None), (4, rows % 4 - 1, None), (4, rows % 4 - 1, weight)):
            logits = values.to(dtype)[:, None].repeat(1, columns).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = loss(logits, rows, labels, iou, weights)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            assert losses.dtype == torch.float32
            assert losses.isfinite().all(), loss
            assert gradient.isfinite().all(), loss
            exact = loss(logits.double(), rows, labels, iou.double(), None if weights is None else weights.double())
            torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)


def test_focal_at_weight_one_is_plain_focal():
    logits, rows, labels, iou, weight = problem(torch.float32)
    torch.testing.assert_close(
        Focal()(logits, rows, labels, iou), Focal()(logits, rows, labels, iou, torch.ones_like(weight)), rtol=0, atol=0
    )


def test_focal_is_that_of_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    logits, rows, labels, iou, _ = problem(torch.float32)
    target = torch.zeros(12, 5)
    target[rows, labels] = 1
    expected = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2).sum(1)
    torch.testing.assert_close(Focal()(logits, rows, labels, iou), expected)


def test_ia_bce_target_has_a_lower_bound_before_weighting():
    loss = IABCE(alpha=0.25)
    assert loss.quality(torch.tensor([0.5]), torch.tensor([0.0])).item() == pytest.approx(0.01)
    logits = torch.zeros(1, 1, requires_grad=True)
    index = torch.tensor([0])
    value = loss(logits, index, index, torch.tensor([0.0]), torch.tensor([0.5]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.item() == pytest.approx(0.5 - 0.005)


def test_alpha_moves_the_target_from_iou_to_score():
    score, iou = torch.tensor([0.2, 0.7]), torch.tensor([0.6, 0.4])
    torch.testing.assert_close(IABCE(alpha=0.0).quality(score, iou), iou)
    torch.testing.assert_close(IABCE(alpha=1.0).quality(score, iou), score)


def test_position_supervised_scales_within_each_group():
    logits, rows, labels, iou, _ = problem()
    loss = PositionSupervised()
    apart = loss(logits, rows, labels, iou, None, torch.tensor([5, 9, 9, 5]))
    halves = [loss(logits, rows[half], labels[half], iou[half]) for half in ([0, 3], [1, 2])]
    for half, alone in zip(([0, 3], [1, 2]), halves, strict=True):
        torch.testing.assert_close(apart[rows[half]], alone[rows[half]])
    assert not torch.allclose(apart, loss(logits, rows, labels, iou))


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        (Focal, {"alpha": 1.5}),
        (Focal, {"gamma": -1.0}),
        (IABCE, {"alpha": -0.1}),
        (Align, {"gamma": -1.0}),
        (IABCE, {"matched_weight": -1.0}),
        (IABCE, {"smallest_target": 1.5}),
        (IABCE, {"mean_over_queries": -1}),
        (QualityFocal, {"beta": -1.0}),
        (Varifocal, {"alpha": -1.0}),
        (PositionSupervised, {"beta": -1.0}),
        (MatchabilityAware, {"gamma": -0.5}),
    ],
)
def test_senseless_settings_are_refused(loss, fields):
    (field,) = fields
    with pytest.raises(ValueError, match=field):
        loss(**fields)


def test_a_signed_factor_needs_a_whole_exponent():
    with pytest.raises(ValueError, match="whole"):
        IABCE(matched_focal="signed_entries", gamma=0.5)


def test_align_is_ia_bce_with_a_factor_of_distance():
    logits, rows, labels, iou, weight = problem()
    named = IABCE(alpha=0.3, gamma=1.5, matched_focal="distance")(logits, rows, labels, iou, weight)
    torch.testing.assert_close(Align(alpha=0.3, gamma=1.5)(logits, rows, labels, iou, weight), named, rtol=0, atol=0)


def test_a_mean_over_queries_counts_at_least_so_many():
    assert IABCE().normaliser(7.0, 20, 2) == 7
    assert IABCE(mean_over_queries=0).normaliser(7.0, 20, 2) == 20
    assert IABCE(mean_over_queries=200).normaliser(7.0, 20, 2) == 400
    assert IABCE(mean_over_queries=0).normaliser(7.0, 0, 0) == 1
