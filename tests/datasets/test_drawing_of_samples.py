"""Which images are drawn how often, of which files, and how many of them."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import CocoConfig, DataConfig
from datasets.coco import SampleKey
from datasets.coco_files import CocoFiles
from datasets.samplers import TrainBatchSampler
from datasets.sampling import ClassBalanced, RepeatFactor, Uniform


def long_tail(make_folder):
    """Of ten images all but one have a cat, two a dog, one an emu; one has nothing."""
    folder = make_folder(sizes=[(40, 60)] * 10, boxes_per_image=0)
    for index in range(9):
        folder.add(10 + 3 * index, [1, 1, 20, 20], 4)
        folder.add(10 + 3 * index, [2, 1, 20, 20], 4)
    for index, category in ((1, 9), (2, 9), (2, 20)):
        folder.add(10 + 3 * index, [5, 5, 20, 20], category)
    folder.write()
    return CocoConfig(**folder.paths()).build(split="train")


def test_repeat_factors_are_those_of_the_paper(make_folder):
    dataset = long_tail(make_folder)
    found = RepeatFactor(threshold=0.4).weights(dataset.annotations, 3).tolist()
    shares = {0: 9 / 10, 1: 2 / 10, 2: 1 / 10}
    for index, factor in enumerate(found):
        labels = dataset.annotations.targets(index)[1].tolist()
        assert factor == pytest.approx(max([max(1, math.sqrt(0.4 / shares[c])) for c in labels], default=1.0))
    assert found[:3] == pytest.approx([1.0, math.sqrt(2), 2.0])


def test_class_balanced_draws_are_those_of_a_class_first(make_folder):
    dataset = long_tail(make_folder)
    found = ClassBalanced().weights(dataset.annotations, 3)
    holders = [[i for i in range(10) if c in dataset.annotations.targets(i)[1]] for c in range(3)]
    expected = [sum(1 / 3 / len(own) for own in holders if index in own) for index in range(10)]
    assert (found / found.sum()).tolist() == pytest.approx(expected)
    assert found[9] == 0.0
    assert Uniform().weights(dataset.annotations, 3) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 8.0), min_size=3, max_size=30).filter(lambda w: sum(w) > 0.1), st.integers(0, 99))
def test_an_epoch_draws_each_image_as_often_as_its_weight_says(weights, seed):
    sampler = TrainBatchSampler(len(weights), 1, seed=seed, weights=torch.tensor(weights))
    counts = Counter(key.image_index for batch in sampler for key in batch)
    assert counts.total() == len(weights)
    for index, weight in enumerate(weights):
        expected = weight * len(weights) / sum(weights)
        assert math.floor(expected - 1e-4) <= counts[index] <= math.ceil(expected + 1e-4)


def test_draws_are_exact_in_the_mean_and_under_every_split():
    weights = torch.tensor([1.0, 1.0, 2.5, 0.25, 0.25])
    counts: Counter[int] = Counter()
    whole = TrainBatchSampler(5, 4, seed=3, weights=weights)
    parts = [
        TrainBatchSampler(5, 4, seed=3, rank=rank, world_size=2, accumulation_steps=2, weights=weights)
        for rank in (0, 1)
    ]
    everything = TrainBatchSampler(5, 5, seed=3, weights=weights)
    for epoch in range(400):
        for sampler in (whole, everything, *parts):
            sampler.set_position(epoch, 0)
        counts.update(key.image_index for batch in everything for key in batch)
        if epoch < 5:
            keys = {key for batch in whole for key in batch}
            assert len(keys) == 4, "an image that comes twice has two seeds"
            assert {key for part in parts for batch in part for key in batch} == keys
    assert [counts[i] / 400 for i in range(5)] == pytest.approx(weights.tolist(), abs=0.08)


def test_the_loader_draws_as_the_configuration_says(make_folder):
    dataset = long_tail(make_folder)
    paths = {"images": dataset.root, "annotations": "unused"}
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    config = DataConfig(
        train=CocoConfig(**paths),
        val=CocoConfig(**paths),
        batch_size=2,
        num_workers=0,
        sampling=ClassBalanced(),
        **statistics,
    )
    loader = config.build_train_loader(dataset, seed=1)
    ids = [int(i) for epoch in range(6) for step in loader.iterate(epoch) for batch in step for i in batch.image_ids]
    assert 37 not in ids, "the image without boxes"
    assert ids.count(16) > 15, "the only emu: a third of all draws and more"
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        RepeatFactor(threshold=0.0)


def test_fractions_are_nested_by_seed(make_folder):
    folder = make_folder(sizes=[(20, 30)] * 12)

    def images(fraction, seed=0):
        return CocoConfig(**folder.paths(), fraction=fraction, fraction_seed=seed).build(split="train").ids

    whole = images(1.0)
    for seed in (0, 1):
        smaller = set()
        for fraction in (0.1, 0.25, 0.5, 0.9, 1.0):
            own = images(fraction, seed)
            assert len(own) == math.ceil(12 * fraction)
            assert smaller <= set(own)
            assert own == [image_id for image_id in whole if image_id in own]
            smaller = set(own)
    assert images(0.5) != images(0.5, seed=1)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        CocoConfig(**folder.paths(), fraction=0.0)
    with pytest.raises(ValueError, match="are for training"):
        CocoConfig(**folder.paths(), fraction=0.5).build(split="val")


def test_several_files_are_one_with_classes_merged_by_name(make_folder):
    first, second = make_folder(seed=1), make_folder(sizes=[(30, 30), (44, 44)], seed=2)
    second.content["categories"] = [{"id": 4, "name": "emu"}, {"id": 9, "name": "fox"}, {"id": 20, "name": "cat"}]
    second.write()
    alone = [CocoConfig(**folder.paths()).build(split="train") for folder in (first, second)]
    joined = CocoConfig(**first.paths(), also=(CocoFiles(**second.paths()),)).build(split="train")
    assert [tuple(category) for category in joined.categories] == [(4, "cat"), (9, "dog"), (20, "emu"), (21, "fox")]
    assert len(joined) == 5
    assert joined.ids == sorted(set(joined.ids))
    for index in range(5):
        own, place = (alone[0], index) if index < 3 else (alone[1], index - 3)
        expected, found = own[SampleKey(place, 0)].sample, joined[SampleKey(index, 0)].sample
        assert torch.equal(expected.image, found.image)
        assert torch.equal(expected.boxes, found.boxes)
        names = [[data.categories[label].name for label in s.labels] for data, s in ((own, expected), (joined, found))]
        assert names[0] == names[1]
    assert joined.image_path(4).is_file()
    unlabelled = CocoConfig(**first.paths(), also=(CocoFiles(**second.paths()),)).build(split="train", unlabelled=True)
    assert [unlabelled[SampleKey(i, 0)].sample.silent.tolist() for i in (0, 3)] == [
        [False] * 3 + [True],
        [False, True] + [False] * 2,
    ]
    with pytest.raises(FileNotFoundError, match=r"no annotation file gone\.json"):
        CocoConfig(**first.paths(), also=(CocoFiles(images=".", annotations="gone.json"),)).build(split="train")
    with pytest.raises(ValueError, match="are for training"):
        CocoConfig(**first.paths(), also=(CocoFiles(**second.paths()),)).build(split="val")
