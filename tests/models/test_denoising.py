"""Contrastive denoising: layout, noise, mask."""

from __future__ import annotations

import pytest
import torch

from models.parts.denoising import DenoisingConfig, DenoisingGenerator, attention_mask
from structures import Prediction, Targets


def targets(counts, num_classes=7, seeds=()):
    generator = torch.Generator().manual_seed(0)
    total = sum(counts)
    centres, sizes = torch.rand(total, 2, generator=generator), torch.rand(total, 2, generator=generator)
    labels = torch.randint(num_classes, (total,), generator=generator)
    return Targets(labels, torch.cat([centres * 0.4 + 0.3, sizes * 0.2 + 0.05], dim=1), tuple(counts), seeds)


def generate(counts, seeds=None, **options):
    torch.manual_seed(0)
    generator = DenoisingGenerator(DenoisingConfig(**options), num_classes=7, embed_dim=8)
    return generator(targets(counts, seeds=tuple(range(len(counts))) if seeds is None else seeds), num_layers=3)


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def test_layout_groups_and_matches():
    counts = (3, 0, 20)
    queries = generate(counts, queries=10)
    # max(1, 10 // 3) = 3 groups of 3 + 3; none; one group of 20 + 20.
    assert queries.num_groups.tolist() == [3, 1, 1]
    assert (queries.groups >= 0).sum(1).tolist() == [18, 0, 40]
    assert queries.boxes.shape == (3, 40, 4)
    layer, image, query, target = queries.matches
    assert layer.bincount().tolist() == [29, 29, 29]
    first = (layer == 0) & (image == 0)
    assert query[first].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert target[first].tolist() == [0, 1, 2] * 3
    last = (layer == 2) & (image == 2)
    assert query[last].tolist() == list(range(20))
    assert target[last].tolist() == list(range(3, 23))


def test_box_noise_moves_positives_less_than_negatives():
    counts = (5,)
    queries = generate(counts, queries=100, box_noise=0.4)
    boxes = targets(counts).boxes
    repeated = boxes.repeat(40, 1)
    half = (boxes[:, 2:] / 2).repeat(40, 2)
    shift = (corners(queries.boxes[0]) - corners(repeated)).abs() / half
    positive = torch.tensor([True] * 5 + [False] * 5).repeat(20)
    assert shift[positive].max() <= 0.4 + 1e-3
    assert shift[~positive].min() >= 0.4 - 1e-3
    assert shift[~positive].max() <= 0.8 + 1e-3
    assert (shift[positive] > 0.2).any()


def test_label_noise_has_the_published_rate():
    counts = (50,)
    torch.manual_seed(0)
    generator = DenoisingGenerator(DenoisingConfig(queries=5000, label_noise=0.5), num_classes=7, embed_dim=8)
    queries = generator(targets(counts, seeds=(0,)), num_layers=1)
    clean = generator.label_embedding(targets(counts).labels.repeat(200))
    changed = (queries.content[0] != clean).any(dim=-1).float().mean()
    # A quarter of the labels is redrawn, of which a seventh hits the old label.
    assert changed == pytest.approx(0.25 * 6 / 7, abs=0.02)


def test_noise_follows_the_seed_of_the_image_alone():
    both = generate((2, 5), seeds=(11, 12), queries=6)
    swapped = generate((2, 5), seeds=(11, 99), queries=6)
    torch.testing.assert_close(both.boxes[0], swapped.boxes[0])
    assert not torch.equal(both.boxes[1], swapped.boxes[1])


def test_an_image_with_very_many_targets_is_bounded():
    queries = generate((1000,), max_targets=50)
    assert queries.boxes.shape == (1, 2 * 50 * 2, 4)
    target = queries.matches.target
    assert len(target.unique()) == 50
    assert target.max() > 50


def test_no_target_at_all():
    queries = generate((0, 0))
    assert queries.content.shape == (2, 0, 8)
    assert queries.boxes.shape == (2, 0, 4)
    assert len(queries.matches.target) == 0
    assert queries.num_groups.tolist() == [1, 1]


def test_attention_mask():
    groups = torch.tensor([[0, 0, 1, 1], [0, 0, -1, -1]])
    mask = attention_mask(groups, num_queries=2)
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    # Nobody but padding looks at padding.
    assert not mask[1, 0, [0, 1, 4, 5]][:, [2, 3]].any()


@pytest.mark.parametrize("options", [{"queries": 0}, {"label_noise": 1.5}, {"box_noise": -1.0}, {"max_targets": 0}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"denoising|noise"):
        DenoisingConfig(**options)


def test_without_seeds_noise_is_drawn_from_the_generator_of_torch():
    """For callers that seed torch, or nothing: every image in its own way, layout and matches as with seeds."""

    def draw(seed):
        torch.manual_seed(0)
        generator = DenoisingGenerator(DenoisingConfig(queries=6), num_classes=7, embed_dim=8)
        one = targets((2,))
        twice = one._replace(labels=one.labels.repeat(2), boxes=one.boxes.repeat(2, 1), counts=(2, 2))
        assert twice.seeds == ()
        torch.manual_seed(seed)
        return generator(twice, num_layers=3)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.content, again.content)
    assert not torch.equal(first.boxes, other.boxes)
    assert not torch.equal(first.boxes[0], first.boxes[1]), "equal images get noise of their own"
    seeded = generate((2, 2), queries=6)
    assert first.boxes.shape == seeded.boxes.shape
    assert torch.equal(first.groups, seeded.groups)
    for mine, expected in zip(first.matches, seeded.matches, strict=True):
        assert torch.equal(mine, expected)


def test_evaluation_uses_up_no_random_numbers(tiny_config, make_batch):
    model = tiny_config.build(5).eval()
    batch = make_batch()
    before = torch.get_rng_state()
    with torch.no_grad():
        model(batch.images, batch.targets._replace(seeds=()))
    assert torch.equal(torch.get_rng_state(), before)


def test_queries_come_before_those_that_are_matched_and_are_split_off_again():
    queries = generate((3, 0, 20), queries=10)
    content, boxes = torch.randn(3, 4, 8), torch.rand(3, 4, 4)
    all_content, all_boxes = queries.before(content, boxes)
    assert torch.equal(all_content, torch.cat([queries.content, content], dim=1))
    assert torch.equal(all_boxes, torch.cat([queries.boxes, boxes], dim=1))
    prediction = Prediction(all_content.expand(3, -1, -1, -1), all_boxes.expand(3, -1, -1, -1))
    group, matched = queries.split(prediction)
    assert torch.equal(matched.boxes, boxes.expand(3, -1, -1, -1))
    assert torch.equal(group.prediction.boxes, queries.boxes.expand(3, -1, -1, -1))
    assert group.matches is queries.matches
    torch.testing.assert_close(group.image_scale, torch.tensor([1 / 3, 1, 1]))
    assert group.valid.sum(1).tolist() == [18, 0, 40]
