import random
import typing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import sizes, transforms
from datasets.labelled_image import relative_boxes
from datasets.sizes import MAX_ASPECT_RATIO, resized_size
from datasets.transforms import (
    ColourJitter,
    CopyPaste,
    DETRMultiScale,
    IoUCrop,
    MixUp,
    Mosaic,
    PhotometricDistortion,
    RandomErasing,
    RandomFlip,
    RandomResize,
    RandomRotation,
    RandomSizeCrop,
    RandomTranspose,
    RandomVerticalFlip,
    RandomZoomOut,
    Resize,
    ResizeExact,
    ScaleJitter,
    final_size,
)
from datasets.transforms import apply_transforms as apply_to_one

EVERY = {
    "random_flip": RandomFlip(),
    "random_vertical_flip": RandomVerticalFlip(),
    "random_transpose": RandomTranspose(),
    "resize": Resize(short_side=50, max_long_side=90),
    "resize_exact": ResizeExact(height=40, width=70),
    "random_resize": RandomResize(short_sides=(30, 50)),
    "random_size_crop": RandomSizeCrop(min_size=20, max_size=40),
    "detr_multi_scale": DETRMultiScale(
        short_sides=(40, 60), max_long_side=100, crop_short_sides=(50, 70), crop_min_size=20, crop_max_size=40
    ),
    "random_zoom_out": RandomZoomOut(),
    "colour_jitter": ColourJitter(hue=0.1),
    "photometric_distortion": PhotometricDistortion(),
    "random_erasing": RandomErasing(),
    "iou_crop": IoUCrop(),
    "scale_jitter": ScaleJitter(size=70, min_scale=0.5),
    "random_rotation": RandomRotation(),
    "mosaic": Mosaic(size=80),
    "mixup": MixUp(),
    "copy_paste": CopyPaste(),
}
MIXING = {"mosaic", "mixup", "copy_paste"}
COLOUR_ONLY = {"colour_jitter", "photometric_distortion", "random_erasing"}


def apply_transforms(*arguments, seed):
    return apply_to_one(*arguments, seed=seed, load=lambda source: scene(seed=source.randrange(100)))


def scene(height=64, width=96, seed=0):
    """A black image with one bright rectangle for each box, in a colour of its own."""
    rng = np.random.default_rng(seed)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = []
    for channel in range(3):
        x, y = int(rng.integers(0, width - 24)), int(rng.integers(0, height - 24))
        w, h = int(rng.integers(12, 24)), int(rng.integers(12, 24))
        image[channel, y : y + h, x : x + w] = 255
        boxes.append([x, y, x + w, y + h])
    return image, torch.tensor(boxes, dtype=torch.float32), torch.arange(3)


def run(transform, seed=0, **size):
    return apply_transforms((transform,), *scene(**size), seed=seed)


def test_every_transform_of_the_index_is_tested_here():
    names = {typing.get_args(typing.get_type_hints(kind)["name"])[0] for kind in typing.get_args(transforms.Transform)}
    assert names == set(EVERY)
    assert all(EVERY[name].name == name for name in names)


@pytest.mark.parametrize("name", sorted(set(EVERY) - COLOUR_ONLY - MIXING))
@pytest.mark.parametrize("seed", range(8))
def test_boxes_stay_around_what_they_mark(name, seed):
    """Each rectangle fills one colour channel, so that its box can be measured in the result."""
    result = run(EVERY[name], seed=seed)
    height, width = result.size
    assert result.boxes.canvas_size == (height, width)
    for box, label in zip(result.boxes.tolist(), result.labels.tolist(), strict=True):
        bright = result.image[label].float()
        rows = torch.nonzero(bright.amax(dim=1) > bright.max() / 2)
        columns = torch.nonzero(bright.amax(dim=0) > bright.max() / 2)
        measured = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        assert measured == pytest.approx(box, abs=1.0), (name, seed)


@pytest.mark.parametrize(
    "transform", [ColourJitter(probability=1.0), PhotometricDistortion(probability=1.0), RandomErasing(probability=1.0)]
)
def test_colours_change_but_boxes_do_not(transform):
    image, boxes, labels = scene()
    result = apply_transforms((transform,), image, boxes, labels, seed=1)
    assert torch.equal(result.boxes, boxes)
    assert not torch.equal(result.image, image)
    assert result.image.dtype == torch.uint8


@pytest.mark.parametrize("name", EVERY)
def test_equal_seeds_give_equal_results_and_no_global_state_is_touched(name):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, second = run(EVERY[name], seed=3), run(EVERY[name], seed=3)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.boxes, second.boxes)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"resize", "resize_exact"}))
def test_seeds_matter(name):
    images = [run(EVERY[name], seed=seed).image for seed in range(12)]
    assert any(image.shape != images[0].shape or not torch.equal(image, images[0]) for image in images)


@pytest.mark.parametrize("name", EVERY)
def test_images_without_boxes(name):
    image, _, _ = scene()
    nothing = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    for seed in range(4):
        result = apply_transforms((EVERY[name],), image, *nothing, seed=seed)
        assert name in MIXING or result.boxes.shape == (0, 4)
        assert relative_boxes(result).shape == result.boxes.shape


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 5)])
@pytest.mark.parametrize("name", EVERY)
def test_extreme_sizes(name, size):
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    for seed in range(4):
        result = apply_transforms(
            (EVERY[name],), torch.zeros(3, *size, dtype=torch.uint8), box, torch.tensor([0]), seed=seed
        )
        assert min(result.size) >= 1
        assert len(result.boxes) == 1 or name in MIXING


@pytest.mark.parametrize("size", [(4, 60000), (20000, 20), (1, 65000)])
def test_strips_stay_small(size):
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    unlimited = RandomResize(short_sides=(200,), max_long_side=None), Resize(short_side=200, max_long_side=None)
    cropped = DETRMultiScale(crop_probability=1.0, crop_short_sides=(200,), short_sides=(200,), crop_min_size=99)
    alone = [transform for name, transform in EVERY.items() if name not in MIXING]
    for transform in (*alone, *unlimited, cropped, Resize()):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        result = apply_transforms((transform,), image, box, torch.tensor([0]), seed=1)
        assert result.image[0].numel() <= max(4 * size[0] * size[1], MAX_ASPECT_RATIO * 200 * 200)
        longest = getattr(transform, "max_long_side", None)
        assert longest is None or max(result.size) <= longest + MAX_ASPECT_RATIO / 2, transform


def test_zooming_out_of_huge_pictures_is_bounded(monkeypatch):
    monkeypatch.setattr(sizes, "MAX_PIXELS", 64 * 96)
    zoom = RandomZoomOut(probability=1.0, max_scale=4.0)
    assert max(run(zoom, seed=seed, height=64, width=96).image[0].numel() for seed in range(9)) <= 64 * 96
    assert max(run(zoom, seed=seed, height=32, width=48).image[0].numel() for seed in range(9)) in range(5000, 6145)


def test_flips_twice_are_nothing():
    image, boxes, labels = scene()
    for flip in (RandomFlip(probability=1), RandomVerticalFlip(probability=1), RandomTranspose(probability=1)):
        twice = apply_transforms((flip, flip), image, boxes, labels, seed=0)
        assert torch.equal(twice.image, image)
        assert torch.equal(twice.boxes, boxes)
        assert not torch.equal(apply_transforms((flip,), image, boxes, labels, seed=0).boxes, boxes)


def detr_size(size, short, longest):
    """DETR's rule, written the slow way: (height, width) → (height, width)."""
    height, width = size
    if longest is not None and max(size) * short > longest * min(size):
        short = round(longest * min(size) / max(size))
    if min(size) == short:
        return size
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([400, 480, 800]), st.sampled_from([None, 1333]))
def test_resized_size(height, width, short, longest):
    result = resized_size((height, width), short, longest)
    if max(height, width) / min(height, width) <= MAX_ASPECT_RATIO:
        assert result == detr_size((height, width), short, longest)
    if longest is not None:
        assert max(result) <= longest + MAX_ASPECT_RATIO / 2
    assert result[0] / result[1] == pytest.approx(height / width, rel=1.5 / min(result))


def test_published_sizes():
    """What DETR gives the usual COCO sizes at 800/1333."""
    assert resized_size((480, 640), 800, 1333) == (800, 1066)
    assert resized_size((640, 480), 800, 1333) == (1066, 800)
    assert resized_size((426, 640), 800, 1333) == (800, 1201)
    assert resized_size((300, 640), 800, 1333) == (625, 1333)
    assert DETRMultiScale().short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def test_detr_multi_scale_uses_both_branches_and_every_size():
    image = torch.zeros(3, 300, 500, dtype=torch.uint8)
    box = torch.tensor([[0.0, 0.0, 500.0, 300.0]])
    whole, cropped, shorts = 0, 0, set()
    for seed in range(60):
        result = apply_transforms((DETRMultiScale(),), image, box, torch.tensor([0]), seed=seed)
        height, width = result.size
        assert max(height, width) <= 1333
        shorts.add(min(height, width))
        exact = abs(width / height - 5 / 3) < 0.01
        whole, cropped = whole + exact, cropped + (not exact)
    assert whole > 15
    assert cropped > 15
    assert len(shorts & set(DETRMultiScale().short_sides)) >= 8


def test_crops_drop_what_they_lose_and_clip_the_rest():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 100.0, 100.0], [90.0, 90.0, 100.0, 100.0]])
    crop = RandomSizeCrop(min_size=30, max_size=30)
    for seed in range(20):
        result = apply_transforms((crop,), image, boxes, torch.tensor([0, 1, 2]), seed=seed)
        assert result.size == (30, 30)
        assert 1 in result.labels.tolist()
        assert result.boxes[result.labels == 1].tolist() == [[0, 0, 30, 30]]
        assert not {0, 2} <= set(result.labels.tolist())
        assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()


def test_relative_boxes_are_inside_the_unit_square():
    result = run(EVERY["detr_multi_scale"], seed=2)
    boxes = relative_boxes(result)
    assert boxes.dtype == torch.float32
    assert (boxes[:, :2] - boxes[:, 2:] / 2 >= -1e-6).all()
    assert (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-6).all()


def test_evaluation_takes_resizes_only():
    assert final_size((), (30, 40)) == (30, 40)
    assert final_size((Resize(), ResizeExact(height=20, width=10)), (30, 40)) == (20, 10)
    assert final_size((Resize(),), (480, 640)) == (800, 1066)
    for transform in EVERY.values():
        if transform.name not in ("resize", "resize_exact"):
            with pytest.raises(ValueError, match=f"{transform.name} cannot be used for evaluation"):
                final_size((transform,), (30, 40))


@pytest.mark.parametrize("name", ["resize", "resize_exact"])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 50), (50, 200)])
def test_foreseen_sizes_are_the_real_ones(name, size):
    assert run(EVERY[name], height=size[0], width=size[1]).size == final_size((EVERY[name],), size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFlip(probability=1.5), "probability in"),
        (lambda: ColourJitter(probability=-0.1), "probability in"),
        (lambda: ColourJitter(brightness=2.0), "saturation in"),
        (lambda: ColourJitter(hue=0.7), "hue in"),
        (lambda: Resize(short_side=0), "positive"),
        (lambda: ResizeExact(height=10, width=0), "positive"),
        (lambda: RandomResize(short_sides=()), "at least one"),
        (lambda: RandomSizeCrop(min_size=50, max_size=40), "min_size <= max_size"),
        (lambda: DETRMultiScale(crop_min_size=700), "min_size <= max_size"),
        (lambda: DETRMultiScale(short_sides=()), "at least one"),
        (lambda: RandomZoomOut(max_scale=0.5), "max_scale"),
        (lambda: RandomFlip(until=0.0), r"random_flip: needs until in \(0, 1\]"),
        (lambda: Resize(until=1.2), "until"),
        (lambda: PhotometricDistortion(contrast=1.5), "contrast and"),
        (lambda: RandomErasing(min_area=0.5), "min_area <= max_area"),
        (lambda: IoUCrop(min_iou=(0.5, 1.0)), "min_iou"),
        (lambda: ScaleJitter(min_scale=3.0), "min_scale <= max_scale"),
        (lambda: RandomRotation(degrees=90.0), "degrees"),
        (lambda: Mosaic(size=0), "size > 0"),
        (lambda: Mosaic(min_visible=2.0), "min_visible"),
        (lambda: MixUp(alpha=0.0), "a positive alpha"),
        (lambda: CopyPaste(max_objects=0), "max_objects"),
        (lambda: final_size((Resize(until=0.5),), (30, 40)), "cannot have an 'until'"),
        (lambda: apply_to_one((Mosaic(),), *scene(), seed=0), "need a data set to take other images from"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
