"""Groups of queries: their order, their own matchers and weights, and groups that know no classes."""

from __future__ import annotations

import pytest
import torch

from losses import IABCE, Criterion, Focal, GroupSupervision, LossWeights
from matchers import Hungarian, Mixed
from structures import DetectorOutputs, Prediction, QueryGroup, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import leaves_of, make_outputs, map_predictions, replace_group
from tests.losses.criterion_configs import ALIGN_DETR, every_config


def of_group(terms: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in terms.items() if key.split("/")[0].split(".")[0] == name}


def assert_same_terms(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    assert mine
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, msg=name)


def with_branch(seed: int, counts: tuple[int, ...]) -> tuple[DetectorOutputs, Targets]:
    """Outputs with a further branch of 12 queries in two layers, before the denoising queries."""
    outputs, targets = make_outputs(seed, counts)
    branch, _ = make_outputs(seed + 1, counts, num_layers=2, num_queries=12, encoder_queries=0, denoising=False)
    groups = dict(outputs.groups)
    denoising = groups.pop("denoising")
    return DetectorOutputs({**groups, "one_to_many": branch.groups["decoder"], "denoising": denoising}), targets


@every_config
@pytest.mark.parametrize("order", [("denoising", "encoder", "decoder"), ("encoder", "denoising", "decoder")], ids=str)
def test_groups_whose_matches_are_found_come_first(config, order):
    """A detector may list its groups in any order: ranks and candidates stay with the matches that were found."""
    outputs, targets = make_outputs(0, (3, 0, 2))
    expected = config(outputs, targets)
    result = config(DetectorOutputs({name: outputs.groups[name] for name in order}), targets)
    layers = ["encoder", *(f"{kind}.{i}" for kind in ("decoder", "denoising") for i in range(3))]
    assert list(result.terms) == [f"{layer}/{term}" for term in ("class", "bbox", config.overlap) for layer in layers]
    assert list(result.terms) == list(expected.terms)
    assert_same_terms(result.terms, expected.terms)
    assert_same_terms(result.diagnostics, expected.diagnostics)
    torch.testing.assert_close(result.total, expected.total)


def test_found_groups_keep_the_detectors_order_as_candidates_do():
    outputs, targets = make_outputs(1, (3, 2))
    turned = DetectorOutputs({name: outputs.groups[name] for name in ("decoder", "denoising", "encoder")})
    result = Criterion(matcher=Mixed(candidates=(1, 2, 3, 4)))(turned, targets)
    layers = ["decoder.0", "decoder.1", "decoder.2", "encoder"]
    assert [name.split("/")[0] for name in result.terms][:4] == layers
    assert [result.diagnostics[f"{layer}/candidates"].item() for layer in layers] == [1, 2, 3, 4]


@every_config
def test_a_further_branch_adds_its_own_terms_and_changes_no_other(config):
    outputs, targets = with_branch(2, (3, 0, 4))
    result = config(outputs, targets)
    alone = config(DetectorOutputs({"one_to_many": outputs.groups["one_to_many"]}), targets)
    rest = {name: group for name, group in outputs.groups.items() if name != "one_to_many"}
    others = config(DetectorOutputs(rest), targets)
    assert_same_terms(of_group(result.terms, "one_to_many"), alone.terms)
    assert_same_terms({key: result.terms[key] for key in others.terms}, others.terms)
    torch.testing.assert_close(result.total, alone.total + others.total)


@pytest.mark.parametrize("tau", [None, 1.5])
def test_a_groups_own_matcher_is_its_only_one(tau):
    outputs, targets = with_branch(3, (3, 4))
    base = Criterion(classification=IABCE(), matcher=Hungarian(), prime_sample_tau=tau)
    many = Criterion(classification=IABCE(), matcher=Mixed(candidates=3), prime_sample_tau=tau)
    own = Criterion(
        classification=IABCE(),
        matcher=Hungarian(),
        prime_sample_tau=tau,
        groups={"one_to_many": GroupSupervision(matcher=Mixed(candidates=3))},
    )
    result = own(outputs, targets)
    for name, like in (("encoder", base), ("decoder", base), ("denoising", base), ("one_to_many", many)):
        assert_same_terms(of_group(result.terms, name), of_group(like(outputs, targets).terms, name))
    described = [result.diagnostics[f"one_to_many.{layer}/candidates"].item() for layer in range(2)]
    assert described == [3, 3], "no layer of this branch is the one of the result"
    assert of_group(result.terms, "one_to_many") != of_group(base(outputs, targets).terms, "one_to_many")


def test_a_matcher_of_a_number_for_each_layer_counts_the_layers_it_is_responsible_for():
    own = {"one_to_many": GroupSupervision(matcher=Mixed(candidates=6))}
    layers = {"encoder": 1, "decoder": 3, "one_to_many": 3}
    Criterion(matcher=Mixed(candidates=(2, 2, 2, 1)), groups=own).check(layers)
    with pytest.raises(ValueError, match=r"lists 4 numbers, but 7 layers .* 3 of decoder, 3 of one_to_many$"):
        Criterion(matcher=Mixed(candidates=(2, 2, 2, 1))).check(layers)
    several = {"one_to_many": GroupSupervision(matcher=Mixed(candidates=(6, 6)))}
    with pytest.raises(ValueError, match=r"lists 2 numbers, but 3 layers are supervised by it: 3 of one_to_many$"):
        Criterion(groups=several).check(layers)


@pytest.mark.parametrize("group", ["encoder", "decoder", "one_to_many", "denoising"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_groups_weight_is_a_factor_of_its_part_of_the_total(group, weight):
    outputs, targets = with_branch(4, (3, 2))
    weights = LossWeights(classification=1.5, bbox=4.0, giou=3.0)
    base = Criterion(weights=weights)(outputs, targets)
    weighted = Criterion(weights=weights, groups={group: GroupSupervision(weight=weight)})
    result = weighted(outputs, targets)
    assert_same_terms(result.terms, base.terms)  # terms are told unweighted
    factors = {"class": 1.5, "bbox": 4.0, "giou": 3.0}
    expected = sum(
        (weight if name in of_group(base.terms, group) else 1.0) * factors[name.split("/")[1]] * value
        for name, value in base.terms.items()
    )
    torch.testing.assert_close(result.total.detach(), expected)
    before = torch.autograd.grad(Criterion(weights=weights)(outputs, targets).total, leaves_of(outputs))
    after = torch.autograd.grad(result.total, leaves_of(outputs))
    names = [name for name in outputs.groups for _ in range(2)]
    for name, one, other in zip(names, before, after, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, weight * one if name == group else one)


def test_several_weights_and_matchers_together():
    outputs, targets = with_branch(5, (3, 2))
    groups = {
        "denoising": GroupSupervision(weight=0.5),
        "one_to_many": GroupSupervision(matcher=Mixed(candidates=2), weight=3.0),
    }
    total = Criterion(groups=groups)(outputs, targets).total
    parts = {
        name: (Criterion(matcher=Mixed(candidates=2)) if name == "one_to_many" else Criterion())(
            DetectorOutputs({name: group}), targets
        ).total
        for name, group in outputs.groups.items()
    }
    expected = parts["encoder"] + parts["decoder"] + 3 * parts["one_to_many"] + 0.5 * parts["denoising"]
    torch.testing.assert_close(total, expected)


def test_weights_of_groups_must_not_be_negative():
    with pytest.raises(ValueError, match=r"criterion.groups: a weight must not be negative, found -1"):
        GroupSupervision(weight=-1.0)


def test_unknown_groups_and_matchers_of_given_matches_are_refused():
    found, given = {"encoder": 1, "decoder": 6}, ("denoising",)
    Criterion(groups={"denoising": GroupSupervision(weight=2.0), "encoder": GroupSupervision()}).check(found, given)
    with pytest.raises(ValueError, match=r"no group 'one_to_many', but encoder, decoder, denoising$"):
        Criterion(groups={"one_to_many": GroupSupervision()}).check(found, given)
    with pytest.raises(ValueError, match=r"groups.denoising.matcher: the matches of this group are known beforehand"):
        Criterion(groups={"denoising": GroupSupervision(matcher=Hungarian())}).check(found, given)


def agnostic(outputs: DetectorOutputs, *names: str) -> DetectorOutputs:
    for name in names:
        outputs = replace_group(outputs, name, class_agnostic=True)
    return outputs


def relabelled(targets: Targets) -> Targets:
    assert targets.labels.any(), "some label is not 0 yet"
    return targets._replace(labels=torch.zeros_like(targets.labels))


@every_config
@pytest.mark.parametrize("num_logits", [1, 5])
def test_without_classes_every_label_counts_as_0(config, num_logits):
    """In cost, classification loss and, through the matches, boxes; gradients included, given matches included."""
    outputs, targets = make_outputs(6, (3, 0, 4))
    cut = map_predictions(outputs, lambda part: part if part.shape[-1] == 4 else part[..., :num_logits])
    result = config(agnostic(cut, *cut.groups), targets)
    expected = config(cut, relabelled(targets))
    assert_same_terms(result.terms, expected.terms)
    assert_same_terms(result.diagnostics, expected.diagnostics)
    torch.testing.assert_close(result.total, expected.total)
    leaves = leaves_of(outputs)
    for mine, other in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected.total, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other)


@every_config
def test_one_group_without_classes_leaves_the_others_theirs(config):
    outputs, targets = make_outputs(7, (3, 4))
    logits, boxes = outputs.groups["encoder"].prediction
    mixed = replace_group(outputs, "encoder", prediction=Prediction(logits[..., :1], boxes), class_agnostic=True)
    result = config(mixed, targets)
    with_labels, without = config(outputs, targets), config(outputs, relabelled(targets))
    one_logit = config(
        DetectorOutputs({"encoder": QueryGroup(Prediction(logits[..., :1], boxes))}), relabelled(targets)
    )
    assert_same_terms(of_group(result.terms, "encoder"), one_logit.terms)
    for name in ("decoder", "denoising"):
        assert_same_terms(of_group(result.terms, name), of_group(with_labels.terms, name))
    assert result.terms["encoder/bbox"] == without.terms["encoder/bbox"], "the same pairs as of the first logit"
    assert result.terms["encoder/bbox"] != with_labels.terms["encoder/bbox"]


@pytest.mark.parametrize("tau", [None, 1.5])
def test_without_classes_against_the_slow_criterion(tau):
    outputs, targets = make_outputs(8, (3, 0, 5), num_classes=1, denoising=False, dtype=torch.float64)
    targets = targets._replace(labels=torch.arange(len(targets.labels)) % 3)
    config = Criterion(classification=Focal(), matcher=Mixed(candidates=2), prime_sample_tau=tau)
    result = config(agnostic(outputs, "encoder", "decoder"), targets)
    total, terms = oracle.criterion(outputs, relabelled(targets), "focal", [2, 2, 2, 1], tau)
    for name, expected in terms.items():
        assert result.terms[name].item() == pytest.approx(expected.item(), rel=1e-9), name
    torch.testing.assert_close(result.total, total, rtol=1e-9, atol=0)


@pytest.mark.parametrize("filler", [0.0, 50.0, float("nan")])
def test_queries_that_are_not_valid_are_not_supervised_where_matches_are_found(filler):
    """Equal to the group without these queries."""
    outputs, targets = make_outputs(9, (3, 2), encoder_queries=12, denoising=False)
    encoder = outputs.groups["encoder"].prediction
    kept = torch.ones(12, dtype=torch.bool)
    kept[[1, 5, 11]] = False
    spoilt = Prediction(*(part.masked_fill(~kept[:, None], filler) for part in encoder))
    masked = replace_group(outputs, "encoder", prediction=spoilt, valid=kept.expand(2, 12))
    fewer = replace_group(outputs, "encoder", prediction=Prediction(*(part[:, :, kept] for part in encoder)))
    for config in (Criterion(), ALIGN_DETR):
        assert_same_terms(config(masked, targets).terms, config(fewer, targets).terms)


@every_config
def test_seeds_of_targets_mean_nothing_to_the_criterion(config):
    outputs, targets = make_outputs(10, (3, 2))
    assert targets.seeds == ()
    result, seeded = config(outputs, targets), config(outputs, targets._replace(seeds=(5, 6)))
    assert torch.equal(result.total, seeded.total)
