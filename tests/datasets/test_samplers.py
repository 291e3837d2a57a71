from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.samplers import EvalBatchSampler, TrainBatchSampler, mix_seed


def steps(epoch=0, start=0, **arguments):
    """For each optimizer step, the keys of this rank."""
    sampler = TrainBatchSampler(**{"length": 37, "batch_size": 8, "seed": 5, **arguments})
    sampler.set_position(epoch, start)
    batches = list(sampler)
    size = sampler.accumulation_steps
    assert len(batches) % size == 0
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def flat(nested):
    return [key for step in nested for micro in step for key in micro]


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (1, 8)])
def test_every_split_of_a_global_batch_holds_the_same_samples(world_size, accumulation_steps):
    whole = steps(epoch=3)
    parts = [
        steps(epoch=3, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps)
        for rank in range(world_size)
    ]
    for g, batch in enumerate(whole):
        together = [key for micro in range(accumulation_steps) for part in parts for key in part[g][micro]]
        assert together == flat([batch]), "micro-batches in turn, ranks in order within each"


def test_an_epoch_is_a_permutation_without_its_incomplete_end():
    keys = flat(steps())
    assert len(keys) == 32
    assert len({key.image_index for key in keys}) == 32
    assert len({key.seed for key in keys}) == 32
    left_out = {frozenset(set(range(37)) - {key.image_index for key in flat(steps(epoch=epoch))}) for epoch in range(4)}
    assert len(left_out) == 4, "another epoch leaves out others"


def test_order_depends_on_seed_and_epoch_only():
    assert steps() == steps()
    torch.manual_seed(123)
    first = steps()
    torch.manual_seed(321)
    assert steps() == first
    assert [key.image_index for key in flat(steps(epoch=1))] != [key.image_index for key in flat(first)]
    assert [key.image_index for key in flat(steps(seed=6))] != [key.image_index for key in flat(first)]
    assert {key.seed for key in flat(steps(epoch=1))}.isdisjoint(key.seed for key in flat(first))


@pytest.mark.parametrize("start", range(5))
def test_resuming_inside_an_epoch_goes_on_as_if_never_stopped(start):
    for arguments in ({}, {"rank": 1, "world_size": 2, "accumulation_steps": 2}):
        assert steps(epoch=2, start=start, **arguments) == steps(epoch=2, **arguments)[start:]


def test_length_is_what_is_left():
    sampler = TrainBatchSampler(37, 8, seed=0, accumulation_steps=2)
    assert len(sampler) == 8
    sampler.set_position(0, 3)
    assert len(sampler) == len(list(sampler)) == 2
    sampler.set_position(0, 4)
    assert list(sampler) == []


def in_blocks_by_hand(order, wide, block):
    """The images as detectron2 groups them: two buckets, and whichever is full is emptied."""
    buckets, out = {True: [], False: []}, []
    for image in order:
        bucket = buckets[bool(wide[image])]
        bucket.append(image)
        if len(bucket) == block:
            out += bucket
            bucket.clear()
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=30, max_size=40), st.sampled_from([2, 3, 4]), st.integers(0, 5))
def test_blocks_of_one_orientation(wide, block, epoch):
    wide = torch.tensor(wide)
    arguments = {"length": len(wide), "batch_size": block, "seed": 3, "epoch": epoch}
    order = [key.image_index for key in flat(steps(**{**arguments, "batch_size": 1}))]
    found = [key.image_index for key in flat(steps(**arguments, wide=wide, block=block))]
    assert found == in_blocks_by_hand(order, wide, block)
    assert len(found) == sum(int(count) // block * block for count in (wide.sum(), (~wide).sum()))


def test_blocks_of_one_orientation_are_split_and_resumed_exactly():
    wide = torch.arange(61) % 3 > 0
    options = {"length": 61, "batch_size": 8, "epoch": 1, "wide": wide, "block": 4}
    whole = steps(**options)
    assert len(whole) == (40 + 20) // 8
    for world_size, parts in [(2, 1), (1, 4), (2, 2)]:
        ranks = [
            steps(rank=rank, world_size=world_size, accumulation_steps=parts, **options) for rank in range(world_size)
        ]
        for g, batch in enumerate(whole):
            assert [key for micro in range(parts) for rank in ranks for key in rank[g][micro]] == flat([batch])
        if world_size * parts == 2:
            micro_batches = [micro for rank in ranks for step in rank for micro in step]
            assert all(len({bool(wide[key.image_index]) for key in micro}) == 1 for micro in micro_batches)
    for start in range(len(whole) + 1):
        assert steps(start=start, **options) == whole[start:]
    assert steps(**{**options, "epoch": 2}) != whole
    assert len({key.seed for key in flat(whole)}) == len(flat(whole))


def test_impossible_batches_are_refused():
    with pytest.raises(
        ValueError, match=r"batch_size=8 must be a multiple of 3 \(3 processes x 1 accumulation steps\)"
    ):
        TrainBatchSampler(100, 8, seed=0, world_size=3)
    with pytest.raises(ValueError, match="multiple of 16"):
        TrainBatchSampler(100, 8, seed=0, world_size=4, accumulation_steps=4)
    with pytest.raises(ValueError, match="more than the 7 training images"):
        TrainBatchSampler(7, 8, seed=0)
    with pytest.raises(ValueError, match="more than the 4 training images in whole blocks of 4 of one orientation"):
        TrainBatchSampler(10, 8, seed=0, wide=torch.arange(10) < 3, block=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([(4, 6), (6, 4), (5, 5), (0, 0)]), max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_sees_every_image_once_in_batches_of_equal_size(sizes, batch_size, world_size):
    seen = Counter()
    for rank in range(world_size):
        sampler = EvalBatchSampler(sizes, batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len({sizes[key.image_index] for key in batch}) == 1
            seen.update(key.image_index for key in batch)
    assert seen == Counter(range(len(sizes)))


def test_ranks_get_alike_numbers_of_batches():
    sizes = [(4 + i % 3, 5) for i in range(50)]
    lengths = [len(EvalBatchSampler(sizes, 2, rank=rank, world_size=4)) for rank in range(4)]
    assert max(lengths) - min(lengths) <= 1


def test_mixed_seeds_are_distinct_and_spread():
    seeds = [mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in seeds], dtype=torch.float64).mean(dim=0)
    assert ((bits > 0.45) & (bits < 0.55)).all()
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(0) != mix_seed(0, 0)
