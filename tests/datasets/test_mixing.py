"""Transforms that need more than one image, and those that end before the training does."""

import pytest
import torch
from torch import Tensor

from datasets import CocoConfig
from datasets.coco import SampleKey
from datasets.geometric import IoUCrop
from datasets.mixing import GREY, CopyPaste, MixUp, Mosaic
from datasets.samplers import TrainBatchSampler
from datasets.transforms import RandomFlip, ResizeExact, apply_transforms

# Of each object the colour tells its label, however it is moved.
COLOURS = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)][1:], dtype=torch.uint8)


def scene(labels, seed, size=(80, 100)):
    """A black image with a filled rectangle for each label; none covers another."""
    random = torch.Generator().manual_seed(seed)
    image, boxes = torch.zeros(3, *size, dtype=torch.uint8), []
    for place, label in enumerate(labels):
        width, height = torch.randint(14, 30, (2,), generator=random).tolist()
        left, top = 2 + 34 * (place % 3), 4 + 40 * (place // 3)
        image[:, top : top + height, left : left + width] = COLOURS[label][:, None, None]
        boxes.append([left, top, left + width, top + height])
    return image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels)


def run(transform, seed, first=(0, 1), others=((2,), (3, 4), (5, 6))):
    asked = []

    def load(source):
        asked.append(source.random())
        return scene(others[(len(asked) - 1) % len(others)], seed + len(asked))

    return apply_transforms((transform,), *scene(first, seed), seed, load=load), len(asked)


def measured(image, label):
    """The box around an object's colour."""
    near = (image.as_subclass(Tensor).int() - COLOURS[label].int()[:, None, None]).abs().amax(dim=0) < 100
    rows, columns = near.any(dim=1).nonzero(), near.any(dim=0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("seed", range(8))
def test_a_mosaic_has_four_images_with_boxes_around_their_objects(seed):
    result, asked = run(Mosaic(size=120, min_scale=0.6, min_visible=0.3), seed)
    assert asked == 3
    assert result.size == (120, 120)
    assert len(result.labels) >= 2
    assert len(set(result.labels.tolist())) == len(result.labels)
    for box, label in zip(result.boxes.tolist(), result.labels.tolist(), strict=True):
        assert measured(result.image, label) == pytest.approx(box, abs=2.0)


def test_a_mosaic_shows_all_its_images_and_grey_between():
    found = set()
    for seed in range(12):
        result, _ = run(Mosaic(size=120), seed)
        found |= set(result.labels.tolist())
    assert found == set(range(7))
    small, _ = run(Mosaic(size=200, min_scale=0.2, max_scale=0.2), 0)
    assert (small.image == GREY).all(dim=0).float().mean() > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_mixup_is_a_weighted_mean_with_the_boxes_of_both(seed):
    (image, boxes, labels), (other, more_boxes, more_labels) = scene((0, 1), seed), scene((2,), seed + 1, (90, 70))
    result = apply_transforms(
        (MixUp(probability=1.0),), image, boxes, labels, seed, load=lambda _: (other, more_boxes, more_labels)
    )
    assert result.size == (90, 100)
    assert torch.equal(result.boxes.as_subclass(Tensor), torch.cat((boxes, more_boxes)))
    assert result.labels.tolist() == [0, 1, 2]
    both = torch.full((2, 3, 90, 100), float(GREY))
    both[0, :, :80, :100], both[1, :, :90, :70] = image, other
    ones = (both[0] != both[1]).nonzero()[0]
    weight = (float(result.image[tuple(ones)]) - both[1][tuple(ones)]) / (both[0] - both[1])[tuple(ones)]
    assert 0 <= weight <= 1
    expected = weight * both[0] + (1 - weight) * both[1]
    assert (expected - result.image.float()).abs().max() <= 2


@pytest.mark.parametrize("seed", range(12))
def test_pasted_boxes_hold_their_objects_and_hidden_ones_go(seed):
    paste = CopyPaste(probability=1.0, max_objects=2, min_visible=0.5)
    result, asked = run(paste, seed, first=(0, 1), others=((2, 3, 4),))
    assert asked == 1
    assert result.size == (80, 100)
    labels = result.labels.tolist()
    assert 1 <= len({2, 3, 4} & set(labels)) <= 2
    pixels = (result.image.as_subclass(Tensor)[:, None] == COLOURS.T[:, :, None, None]).all(dim=0).sum(dim=(1, 2))
    whole = (scene((0, 1), seed)[0][:, None] == COLOURS.T[:, :, None, None]).all(dim=0).sum(dim=(1, 2))
    for label in (0, 1):
        if pixels[label] < 0.25 * whole[label]:  # at least one of two pastes hides more than half
            assert label not in labels
        if pixels[label] > 0.5 * whole[label]:
            assert label in labels
    for box, label in zip(result.boxes.tolist(), labels, strict=True):
        found = measured(result.image, label)
        inside = [box[0] - 1, box[1] - 1], [box[2] + 1, box[3] + 1]
        assert found[0] >= inside[0][0]
        assert found[1] >= inside[0][1]
        assert found[2] <= inside[1][0]
        assert found[3] <= inside[1][1]


def test_regions_to_ignore_are_not_pasted():
    image, boxes, _ = scene((2, 3), 0)
    result = apply_transforms(
        (CopyPaste(probability=1.0),), *scene((0,), 1), 0, load=lambda _: (image, boxes, torch.tensor([-1, -2]))
    )
    assert result.labels.tolist() == [0]


def test_other_images_go_through_what_stands_before_but_are_not_mixed_themselves():
    asked = []

    def load(source):
        asked.append(1)
        return scene((2,), 5)

    half = ResizeExact(height=40, width=50)
    result = apply_transforms((half, Mosaic(size=60), MixUp(probability=1.0)), *scene((0,), 1), 3, load=load)
    assert result.size == (60, 60), "the one mixed in has been resized to less"
    assert len(asked) == 4


def test_what_ends_before_the_training_does():
    image, boxes, labels = scene((0,), 1)
    flip = RandomFlip(probability=1.0, until=0.9)
    for progress, changed in ((0.0, True), (0.899, True), (0.9, False), (1.0, False)):
        result = apply_transforms((flip,), image, boxes, labels, 0, progress)
        assert torch.equal(result.image, image) != changed
    mosaic = Mosaic(size=60, until=0.5)
    assert apply_transforms((mosaic,), image, boxes, labels, 0, 0.5).size == (80, 100), "no other image is needed"


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_progress_is_that_of_the_step_however_it_is_split(world, accumulation):
    seen = []
    for rank in range(world):
        sampler = TrainBatchSampler(
            11, 4, seed=1, rank=rank, world_size=world, accumulation_steps=accumulation, total_steps=lambda n: 5 * n
        )
        for epoch, step in ((0, 0), (2, 1)):
            sampler.set_position(epoch, step)
            seen += [(key.image_index, key.seed, key.progress) for batch in sampler for key in batch]
    assert {progress for *_, progress in seen} == {0.0, 0.1, 0.5}
    whole = TrainBatchSampler(11, 4, seed=1, total_steps=lambda n: 5 * n)
    keys = [key for batch in whole for key in batch]
    whole.set_position(2, 1)
    keys += [key for batch in whole for key in batch]
    assert sorted(seen) == sorted(map(tuple, keys))


def test_samples_of_a_data_set_are_mixed_from_its_images(make_folder):
    folder = make_folder(sizes=[(40, 60)] * 6)
    (folder.images / "002.png").write_text("broken")
    dataset = CocoConfig(**folder.paths(), transforms=(IoUCrop(until=0.5), Mosaic(size=64))).build(split="train")
    first, again, other = (dataset[SampleKey(0, seed, 0.2)] for seed in (4, 4, 5))
    assert torch.equal(first.sample.image, again.sample.image)
    assert torch.equal(first.sample.boxes, again.sample.boxes)
    assert first.skipped == again.skipped
    assert not torch.equal(first.sample.image, other.sample.image)
    skipped = [loaded.skipped for loaded in (dataset[SampleKey(0, seed)] for seed in range(10))]
    assert any(skipped), "an unreadable image that would be mixed in is replaced and reported"
    assert all(image_id == 16 for entries in skipped for image_id, _ in entries)


def test_of_what_one_of_the_mixed_images_is_silent_about_nothing_is_known(make_folder):
    folder = make_folder(sizes=[(40, 60)] * 2, boxes_per_image=0)
    folder.add(10, [5, 5, 20, 20], 4)
    folder.add(13, [5, 5, 20, 20], 9)
    folder.content["images"][1]["neg_category_ids"] = []
    folder.write()
    config = CocoConfig(**folder.paths(), transforms=(MixUp(probability=1.0),))
    dataset = config.build(split="train", unlabelled=True)
    silent = {tuple(dataset[SampleKey(0, seed)].sample.silent.tolist()) for seed in range(8)}
    assert silent == {(False, False, False), (True, False, True)}
