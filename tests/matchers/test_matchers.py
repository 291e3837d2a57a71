import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matchers import Hungarian, Mixed, NonFinitePredictionError
from structures import Prediction, Targets
from tests.losses import criterion_oracle as oracle
from tests.losses.criterion_cases import make_outputs


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
    outputs, targets = make_outputs(
        seed, tuple(counts), num_layers=num_layers, num_queries=num_queries, denoising=False
    )
    for matcher in (Mixed(candidates=k), Hungarian()):
        cost = matcher.cost(outputs.decoder, targets)
        found = by_layer(matcher(outputs.decoder, targets), targets)
        per_layer = matcher.layer_candidates(num_layers)
        for layer in range(num_layers):
            for image, count in enumerate(counts):
                expected = oracle.match(cost[layer, image, :count].T, per_layer[layer])
                assert found.get((layer, image), []) == expected


def test_order_of_the_matches():
    outputs, targets = make_outputs(0, (3, 2))
    matches = Mixed(candidates=2)(outputs.decoder, targets)
    rows = list(zip(*(matches[i].tolist() for i in (0, 1, 3, 2)), strict=True))
    assert rows == sorted(rows)
    assert all(index.dtype == torch.int64 for index in matches)


def test_last_layer_is_one_to_one():
    outputs, targets = make_outputs(1, (3, 2))
    matches = Mixed(candidates=3)(outputs.decoder, targets)
    assert torch.bincount(matches.layer).tolist() == [15, 15, 5]


def test_candidates_of_each_layer_and_supervision():
    outputs, targets = make_outputs(2, (3,), encoder_queries=50)
    matcher = Mixed(candidates=(5, 1, 2, 4))
    found = matcher.match(
        {"encoder": Prediction(*(part[None] for part in outputs.encoder)), "decoder": outputs.decoder}, targets
    )
    assert len(found["encoder"].query) == 15
    assert found["encoder"].query.max() >= 20, "the encoder has queries of its own"
    assert torch.bincount(found["decoder"].layer).tolist() == [3, 6, 12]
    with pytest.raises(ValueError, match="lists 4 numbers, but 3 layers"):
        matcher(outputs.decoder, targets)


@pytest.mark.parametrize("candidates", [0, (2, 0, 1), ()])
def test_candidates_below_one_are_refused(candidates):
    with pytest.raises(ValueError, match="1 or more"):
        Mixed(candidates=candidates)


def test_a_crowded_image_does_not_change_the_others():
    outputs, targets = make_outputs(3, (2, 15, 0, 6), num_queries=20)
    matcher = Mixed(candidates=4)
    together = by_layer(matcher(outputs.decoder, targets), targets)
    assert {image: len(together[0, image]) for image in (0, 1, 3)} == {0: 8, 1: 15, 3: 18}
    for image, (labels, boxes) in enumerate(targets.split()):
        own = Targets(labels, boxes, (len(labels),))
        alone = by_layer(matcher(slice_image(outputs.decoder, image), own), own)
        for layer in range(3):
            assert together.get((layer, image), []) == alone.get((layer, 0), [])


def test_more_targets_than_queries_matches_every_query():
    outputs, targets = make_outputs(4, (30, 3), num_queries=20)
    found = by_layer(Mixed(candidates=2)(outputs.decoder, targets), targets)
    for layer in range(3):
        assert sorted(query for query, _ in found[layer, 0]) == list(range(20))
        assert len({target for _, target in found[layer, 0]}) == 20
        assert len(found[layer, 1]) == (6 if layer < 2 else 3)


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)])
def test_no_targets(counts):
    outputs, targets = make_outputs(5, counts)
    matches = Mixed()(outputs.decoder, targets)
    assert all(index.shape == (0,) and index.dtype == torch.int64 for index in matches)


def test_permuting_queries_or_targets_permutes_the_matches():
    outputs, targets = make_outputs(6, (4, 3))
    matcher = Mixed(candidates=2)
    base = by_layer(matcher(outputs.decoder, targets), targets)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Prediction(*(part[:, :, order] for part in outputs.decoder))
    for key, pairs in by_layer(matcher(shuffled, targets), targets).items():
        assert {(order[query].item(), target) for query, target in pairs} == set(base[key])
    flipped = torch.tensor([3, 2, 1, 0, 4, 5, 6])
    reversed_targets = Targets(targets.labels[flipped], targets.boxes[flipped], targets.counts)
    for key, pairs in by_layer(matcher(outputs.decoder, reversed_targets), reversed_targets).items():
        assert {(query, 3 - target if key[1] == 0 else target) for query, target in pairs} == set(base[key])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("image", [0, 1])  # image 1 has no targets, and the class concerned is nobody's
def test_non_finite_predictions_are_located(value, part, image):
    outputs, targets = make_outputs(7, (4, 0))
    with torch.no_grad():
        getattr(outputs.decoder, part)[2, image, 5, 3] = value
    with pytest.raises(NonFinitePredictionError, match=rf"decoder layer 2 for image {image} .*1 of 6"):
        Hungarian().match({"decoder": outputs.decoder}, targets)
    assert issubclass(NonFinitePredictionError, ValueError)


def test_watched_predictions_are_checked_too():
    outputs, targets = make_outputs(8, (2, 2))
    with torch.no_grad():
        outputs.denoising.decoder.boxes[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinitePredictionError, match="denoising layer 1 for image 0"):
        Hungarian().match({"decoder": outputs.decoder}, targets, {"denoising": outputs.denoising.decoder})
