"""Which queries are matched with which targets: every matcher against scipy, and what all of them promise."""

from __future__ import annotations

import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matchers import Hungarian, Matcher, Mixed, NonFinitePredictionError, SoftmaxCost, match, match_groups
from structures import DetectorOutputs, Prediction, QueryGroup, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import make_outputs

MATCHERS = typing.get_args(Matcher)
QUERIES = {
    Hungarian: lambda k, layer, last: 1,
    Mixed: lambda k, layer, last: 1 if last else k,
}
"""How many queries a target may take in a layer of a decoder, for a matcher that is given k where it takes it."""
every_matcher = pytest.mark.parametrize("kind", MATCHERS, ids=lambda kind: kind.name)


def make(kind: type, k: int = 2) -> Matcher:
    """The matcher with k candidates, if it has any."""
    return kind(candidates=k) if "candidates" in kind.__dataclass_fields__ else kind()


def decoder_case(seed: int, counts: tuple[int, ...], **sizes) -> tuple[Prediction, Targets]:
    """Predictions of a decoder, and targets."""
    outputs, targets = make_outputs(seed, counts, denoising=False, **sizes)
    return outputs.groups["decoder"].prediction, targets


def find(matcher: Matcher, outputs: DetectorOutputs, targets: Targets):
    """Matches of all groups that have none."""
    wanted = {name: group for name, group in outputs.groups.items() if group.matches is None}
    candidates = matcher.candidates_by_layer({name: len(g.prediction.logits) for name, g in wanted.items()})
    return match_groups(outputs.groups, dict.fromkeys(wanted, matcher), candidates, targets)


def by_layer(matches, targets):
    """{(layer, image): pairs (query, target of the image) sorted by target, then query}."""
    offsets = [sum(targets.counts[:b]) for b in range(len(targets.counts))]
    found = {}
    for layer, image, query, target in zip(*(index.tolist() for index in matches), strict=True):
        found.setdefault((layer, image), []).append((query, target - offsets[image]))
    return found


def slice_image(prediction, image):
    return Prediction(prediction.logits[:, image : image + 1], prediction.boxes[:, image : image + 1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 14),
    st.integers(1, 5),
)
def test_same_assignments_as_scipy_on_the_same_cost(seed, counts, num_layers, num_queries, k):
    prediction, targets = decoder_case(seed, tuple(counts), num_layers=num_layers, num_queries=num_queries)
    for kind in MATCHERS:
        matcher = make(kind, k)
        cost = matcher.cost(prediction, targets)
        found = by_layer(match(matcher, prediction, targets), targets)
        for layer in range(num_layers):
            for image, count in enumerate(counts):
                candidates = QUERIES[kind](k, layer, layer == num_layers - 1)
                expected = oracle.match(cost[layer, image, :count].T, candidates)
                assert found.get((layer, image), []) == expected, matcher


def test_every_matcher_of_the_index_is_tested_here():
    assert set(QUERIES) == set(MATCHERS)


@every_matcher
def test_order_of_the_matches(kind):
    matches = match(make(kind), *decoder_case(0, (3, 2)))
    rows = list(zip(*(matches[i].tolist() for i in (0, 1, 3, 2)), strict=True))
    assert rows == sorted(rows)
    assert all(index.dtype == torch.int64 for index in matches)
    used = list(zip(*(index.tolist() for index in matches[:3]), strict=True))
    assert len(set(used)) == len(used), "a query at most once in a layer"


def test_last_layer_is_one_to_one():
    matches = match(Mixed(candidates=3), *decoder_case(1, (3, 2)))
    assert torch.bincount(matches.layer).tolist() == [15, 15, 5]


def test_candidates_of_each_layer_and_supervision():
    outputs, targets = make_outputs(2, (3,), encoder_queries=50)
    matcher = Mixed(candidates=(5, 1, 2, 4))
    found = find(matcher, outputs, targets)
    assert list(found) == ["encoder", "decoder"]
    assert len(found["encoder"].query) == 15
    assert found["encoder"].query.max() >= 20, "the encoder has queries of its own"
    assert torch.bincount(found["decoder"].layer).tolist() == [3, 6, 12]
    with pytest.raises(ValueError, match="lists 4 numbers, but 3 layers"):
        match(matcher, outputs.groups["decoder"].prediction, targets)


def test_one_number_is_for_all_layers_but_the_decoders_last():
    """The one that detections come from; further branches of queries may take as many in their last layer too."""
    layers = {"encoder": 1, "decoder": 3, "one_to_many": 2}
    assert Mixed(candidates=4).candidates_by_layer(layers) == {
        "encoder": (4,),
        "decoder": (4, 4, 1),
        "one_to_many": (4, 4),
    }
    assert Mixed(candidates=(6, 5, 4, 3, 2, 1)).candidates_by_layer(layers) == {
        "encoder": (6,),
        "decoder": (5, 4, 3),
        "one_to_many": (2, 1),
    }
    assert Hungarian().candidates_by_layer(layers) == {"encoder": (1,), "decoder": (1, 1, 1), "one_to_many": (1, 1)}


def test_each_group_can_have_a_matcher_and_a_cost_of_its_own():
    outputs, targets = make_outputs(2, (3, 5), encoder_queries=50)
    matchers = {"encoder": Mixed(candidates=4, cost=SoftmaxCost()), "decoder": Hungarian()}
    candidates = {"encoder": (4,), "decoder": (1, 1, 1)}
    found = match_groups(outputs.groups, matchers, candidates, targets)
    encoder, decoder = (outputs.groups[name].prediction for name in ("encoder", "decoder"))
    cost = SoftmaxCost()(encoder, targets)
    for image, count in enumerate(targets.counts):
        assert by_layer(found["encoder"], targets)[0, image] == oracle.match(cost[0, image, :count].T, 4)
    for one, other in zip(found["decoder"], match(Hungarian(), decoder, targets), strict=True):
        assert torch.equal(one, other)


@every_matcher
def test_in_a_class_agnostic_group_every_label_counts_as_0(kind):
    outputs, targets = make_outputs(9, (4, 3), num_classes=5)
    assert targets.labels.any()
    agnostic = {name: group._replace(class_agnostic=True) for name, group in outputs.groups.items()}
    relabelled = targets._replace(labels=torch.zeros_like(targets.labels))
    found, expected = find(make(kind), DetectorOutputs(agnostic), targets), find(make(kind), outputs, relabelled)
    labelled = find(make(kind), outputs, targets)
    for name, matches in expected.items():
        assert all(torch.equal(one, other) for one, other in zip(found[name], matches, strict=True))
        assert by_layer(matches, targets) != by_layer(labelled[name], targets), "labels make a difference"
    logits, boxes = outputs.groups["encoder"].prediction
    one_logit = QueryGroup(Prediction(logits[..., :1], boxes), class_agnostic=True)
    alone = find(make(kind), DetectorOutputs({"encoder": one_logit}), targets)["encoder"]
    assert by_layer(alone, targets) == by_layer(found["encoder"], targets)


@every_matcher
def test_queries_that_are_not_valid_are_matched_only_for_want_of_others(kind):
    prediction, targets = decoder_case(10, (3, 2), num_layers=2, num_queries=9)
    valid = torch.tensor([[True] * 5 + [False] * 4, [False] * 6 + [True] * 3])
    group = QueryGroup(prediction, valid=valid)
    found = find(make(kind, 1), DetectorOutputs({"decoder": group}), targets)["decoder"]
    assert valid[found.image, found.query].all()
    assert len(found.query) == 2 * 5
    for image, own in enumerate(valid):
        kept = own.nonzero().flatten()
        alone = Prediction(*(part[:, image : image + 1, kept] for part in prediction))
        labels, boxes = targets.split()[image]
        pairs = by_layer(match(make(kind, 1), alone, Targets(labels, boxes, (len(labels),))), targets)
        for layer in range(2):
            expected = [(kept[query].item(), target) for query, target in pairs[layer, 0]]
            assert by_layer(found, targets)[layer, image] == expected


@pytest.mark.parametrize("candidates", [0, (2, 0, 1), ()])
def test_candidates_below_one_are_refused(candidates):
    with pytest.raises(ValueError, match="1 or more"):
        Mixed(candidates=candidates)


@every_matcher
def test_a_crowded_image_does_not_change_the_others(kind):
    prediction, targets = decoder_case(3, (2, 15, 0, 6), num_queries=20)
    matcher = make(kind, 4)
    together = by_layer(match(matcher, prediction, targets), targets)
    expected = {Hungarian: {0: 2, 1: 15, 3: 6}, Mixed: {0: 8, 1: 15, 3: 18}}
    assert {image: len(together[0, image]) for image in (0, 1, 3)} == expected[kind]
    for image, (labels, boxes) in enumerate(targets.split()):
        own = Targets(labels, boxes, (len(labels),))
        alone = by_layer(match(matcher, slice_image(prediction, image), own), own)
        for layer in range(3):
            assert together.get((layer, image), []) == alone.get((layer, 0), [])


def test_more_targets_than_queries_matches_every_query():
    prediction, targets = decoder_case(4, (30, 3), num_queries=20)
    found = by_layer(match(Mixed(candidates=2), prediction, targets), targets)
    for layer in range(3):
        assert sorted(query for query, _ in found[layer, 0]) == list(range(20))
        assert len({target for _, target in found[layer, 0]}) == 20
        assert len(found[layer, 1]) == (6 if layer < 2 else 3)


@every_matcher
@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)])
def test_no_targets(kind, counts):
    matches = match(make(kind), *decoder_case(5, counts))
    assert all(index.shape == (0,) and index.dtype == torch.int64 for index in matches)


@every_matcher
def test_no_queries(kind):
    prediction, targets = decoder_case(5, (2, 1))
    matches = match(make(kind), Prediction(*(part[:, :, :0] for part in prediction)), targets)
    assert all(index.shape == (0,) for index in matches)


@every_matcher
def test_permuting_queries_or_targets_permutes_the_matches(kind):
    prediction, targets = decoder_case(6, (4, 3))
    matcher = make(kind)
    base = by_layer(match(matcher, prediction, targets), targets)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Prediction(*(part[:, :, order] for part in prediction))
    for key, pairs in by_layer(match(matcher, shuffled, targets), targets).items():
        assert {(order[query].item(), target) for query, target in pairs} == set(base[key])
    flipped = torch.tensor([3, 2, 1, 0, 4, 5, 6])
    reversed_targets = Targets(targets.labels[flipped], targets.boxes[flipped], targets.counts)
    for key, pairs in by_layer(match(matcher, prediction, reversed_targets), reversed_targets).items():
        assert {(query, 3 - target if key[1] == 0 else target) for query, target in pairs} == set(base[key])


@every_matcher
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("image", [0, 1])  # image 1 has no targets, and the class concerned is nobody's
def test_non_finite_predictions_are_located(kind, value, part, image):
    prediction, targets = decoder_case(7, (4, 0))
    with torch.no_grad():
        getattr(prediction, part)[2, image, 5, 3] = value
    with pytest.raises(NonFinitePredictionError, match=rf"decoder layer 2 for image {image} .*1 of 6"):
        match(make(kind), prediction, targets)
    assert issubclass(NonFinitePredictionError, ValueError)


def test_groups_whose_matches_are_given_are_checked_too():
    outputs, targets = make_outputs(8, (2, 2))
    with torch.no_grad():
        outputs.groups["denoising"].prediction.boxes[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinitePredictionError, match="denoising layer 1 for image 0"):
        find(Hungarian(), outputs, targets)
