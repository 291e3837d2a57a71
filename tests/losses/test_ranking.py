import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import prime_sample_weights, rank_within
from losses.ranking import max_within

members = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3, 0.7])), max_size=30)


@settings(max_examples=60, deadline=None)
@given(members)
def test_ranks_and_maxima_of_each_group(pairs):
    groups = torch.tensor([g for g, _ in pairs], dtype=torch.long)
    values = torch.tensor([v for _, v in pairs])
    rank, largest = rank_within(values, groups), max_within(values, groups)
    for i, (group, value) in enumerate(pairs):
        peers = [j for j, (other, _) in enumerate(pairs) if other == group]
        better = [j for j in peers if pairs[j][1] > value or (pairs[j][1] == value and j < i)]
        assert rank[i].item() == len(better)
        assert largest[i].item() == values[peers].max().item()


def test_weights_fall_exponentially_with_rank():
    weights = prime_sample_weights(torch.tensor([0, 1, 3]), 1.5)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-1 / 1.5), math.exp(-2.0)]))
