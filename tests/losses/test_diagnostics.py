import pytest
import torch
from scipy.stats import spearmanr

from losses import IABCE, Criterion
from losses.diagnostics import instability, matching_diagnostics
from matchers import Mixed
from structures import Matches, Prediction
from tests.losses.criterion_cases import make_outputs

CONFIG = Criterion(classification=IABCE(), matcher=Mixed(candidates=2), prime_sample_tau=1.5)


def test_means_by_rank_unmatched_and_effective_candidates():
    described = matching_diagnostics(
        names=["a", "b"],
        candidates=[2, 1],
        layer=torch.tensor([0, 0, 0, 1]),
        target=torch.tensor([0, 0, 2, 2]),
        rank=torch.tensor([1, 0, 0, 0]),
        score=torch.tensor([0.1, 0.3, 0.5, 0.7]),
        iou=torch.tensor([0.2, 0.4, 0.8, 0.6]),
        num_targets=3,
    )
    expected = {
        "a/candidates": 1.5, "a/unmatched": 1, "a/iou_rank0": 0.6, "a/iou_rank1": 0.2,
        "a/score_rank0": 0.4, "a/score_rank1": 0.1, "a/score_iou_correlation": 1.0,
        "b/candidates": 1, "b/unmatched": 2, "b/iou_rank0": 0.6, "b/score_rank0": 0.7, "b/score_iou_correlation": 0.0,
    }  # fmt: skip
    assert {name: pytest.approx(value.item()) for name, value in described.items()} == expected


def test_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    layer = torch.arange(2).repeat_interleave(40)
    score, iou = torch.rand(2, 80, generator=generator)
    described = matching_diagnostics(
        ["a", "b"], [1, 1], layer, torch.arange(80), torch.zeros(80, dtype=torch.long), score, iou, 80
    )
    for i, name in enumerate("ab"):
        expected = spearmanr(score[layer == i].numpy(), iou[layer == i].numpy()).statistic
        assert described[f"{name}/score_iou_correlation"].item() == pytest.approx(expected, abs=1e-6)


def matches_of(*layers):
    """From one {query: target} per layer of a single image."""
    rows = [(layer, 0, query, target) for layer, found in enumerate(layers) for query, target in found.items()]
    return Matches(*torch.tensor(rows).reshape(-1, 4).unbind(1))


def test_instability_counts_queries_that_change():
    prediction = Prediction(torch.zeros(3, 1, 6, 1), torch.zeros(3, 1, 6, 4))
    decoder = matches_of({0: 0, 1: 1}, {0: 0, 2: 1}, {0: 1, 2: 0})
    encoder = matches_of({0: 0, 5: 1})
    first = Prediction(torch.zeros(1, 1, 6, 1), torch.zeros(1, 1, 6, 4))
    described = instability([(["e"], first, encoder), (["a", "b", "c"], prediction, decoder)])
    assert described.keys() == {"a/instability", "b/instability", "c/instability"}
    assert described["a/instability"].item() == pytest.approx(2 / 3)  # 5 lost, 1 gained, of 0, 1, 5
    assert described["b/instability"].item() == pytest.approx(2 / 3)  # 1 lost, 2 gained, of 0, 1, 2
    assert described["c/instability"].item() == pytest.approx(1.0)
    other = Prediction(torch.zeros(1, 1, 9, 1), torch.zeros(1, 1, 9, 4))
    assert "a/instability" not in instability([(["e"], other, encoder), (["a", "b", "c"], prediction, decoder)])


def test_every_layer_reports_what_its_candidates_allow():
    outputs, targets = make_outputs(0, (3, 4))
    described = CONFIG(outputs, targets).diagnostics
    ranks = {name.split("/")[0]: 0 for name in described}
    for name in described:
        layer, _, column = name.partition("/")
        ranks[layer] += column.startswith("iou_rank")
    assert ranks == {"encoder": 2, "decoder.0": 2, "decoder.1": 2, "decoder.2": 1}
    assert {f"decoder.{i}/instability" for i in range(3)} <= described.keys()
    assert all(value.shape == () and not value.requires_grad for value in described.values())
    assert described["decoder.0/candidates"].item() == 2
    assert described["decoder.2/candidates"].item() == 1


def test_best_candidates_rank_first():
    outputs, targets = make_outputs(1, (5, 6), num_queries=60)
    described = Criterion(matcher=Mixed(candidates=3))(outputs, targets).diagnostics
    for layer in ("encoder", "decoder.0", "decoder.1"):
        ious = [described[f"{layer}/iou_rank{r}"].item() for r in range(3)]
        assert ious == sorted(ious, reverse=True)
        assert ious[0] > ious[2]


@pytest.mark.parametrize("counts", [(0, 0), (40, 1)])
def test_nothing_to_average_is_finite(counts):
    outputs, targets = make_outputs(2, counts)
    described = CONFIG(outputs, targets).diagnostics
    assert all(value.isfinite() for value in described.values())
    assert described["decoder.0/unmatched"].item() == max(0, counts[0] - 20)
