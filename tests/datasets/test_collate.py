import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.coco import LoadedSample, Sample
from datasets.collate import Collate, Loaded, make_batch
from structures import Batch, Images, Targets

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def sample(height, width, boxes=1, image_id=7, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        torch.rand(boxes, 4, generator=generator),
        torch.arange(boxes),
        image_id,
        (height * 2, width * 2),
        seed,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 16, 32]),
)
def test_padding_is_zero_right_and_bottom_and_the_rest_is_normalised(shapes, multiple):
    samples = [sample(h, w, n, image_id=i, seed=i) for i, (h, w, n) in enumerate(shapes)]
    batch = make_batch(samples, MEAN, STD, multiple)
    _, _, height, width = batch.images.pixels.shape
    assert height % multiple == width % multiple == 0
    assert height - multiple < max(h for h, _, _ in shapes) <= height
    assert width - multiple < max(w for _, w, _ in shapes) <= width
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for image, size, item in zip(batch.images.pixels, batch.images.sizes.tolist(), samples, strict=True):
        h, w = size
        assert (h, w) == tuple(item.image.shape[1:])
        torch.testing.assert_close(image[:, :h, :w], (item.image / 255 - mean) / std, rtol=1e-5, atol=1e-5)
        assert not image[:, h:].any()
        assert not image[:, :, w:].any()
    assert batch.images.pixels.dtype == torch.float32
    assert batch.targets.counts == tuple(n for _, _, n in shapes)
    for (labels, boxes), item in zip(batch.targets.split(), samples, strict=True):
        assert torch.equal(labels, item.labels)
        assert torch.equal(boxes, item.boxes)
    assert batch.image_ids.tolist() == list(range(len(shapes)))
    assert batch.targets.seeds == tuple(range(len(shapes)))
    assert batch.original_sizes.tolist() == [[2 * h, 2 * w] for h, w, _ in shapes]


def test_a_batch_without_any_target():
    batch = make_batch([sample(4, 5, 0), sample(6, 3, 0)], MEAN, STD)
    assert batch.targets.boxes.shape == (0, 4)
    assert batch.targets.labels.dtype == torch.int64
    assert batch.targets.counts == (0, 0)
    assert [len(labels) for labels, _ in batch.targets.split()] == [0, 0]


def test_evaluation_never_pads_one_image_for_another():
    collate = Collate(MEAN, STD, 1, equal_sizes=True)
    samples = [sample(4, 5, image_id=1), sample(6, 5, image_id=2), sample(4, 5, image_id=3)]
    loaded = collate([*(LoadedSample(item, ()) for item in samples), LoadedSample(None, ((9, "gone"),))])
    assert [batch.image_ids.tolist() for batch in loaded.batches] == [[1, 3], [2]]
    assert all((batch.images.sizes == torch.tensor(batch.images.pixels.shape[2:])).all() for batch in loaded.batches)
    assert loaded.skipped == ((9, "gone"),)
    assert collate([LoadedSample(None, ((9, "gone"),))]) == Loaded((), ((9, "gone"),))


def test_training_hands_on_nothing_rather_than_a_smaller_batch():
    collate = Collate(MEAN, STD, 1, equal_sizes=False)
    replaced = LoadedSample(sample(4, 5), ((8, "broken"),))
    (batch,) = collate([replaced, replaced]).batches
    assert len(batch.images.pixels) == 2
    assert collate([replaced, LoadedSample(None, ((9, "gone"),))]) == Loaded((), ((8, "broken"), (9, "gone")))


def test_pinning_keeps_every_field(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    loaded = Collate(MEAN, STD, 1, equal_sizes=False)([LoadedSample(sample(4, 5), ((8, "broken"),))])
    result = loaded.pin_memory()
    assert result.skipped == loaded.skipped
    (old,), (new,) = loaded.batches, result.batches
    assert len(pinned) == 6
    for kind, part in ((Batch, new), (Images, new.images), (Targets, new.targets)):
        assert type(part) is kind
    assert type(new.targets.counts) is tuple
    assert new.targets.counts == old.targets.counts
    assert new.targets.seeds == old.targets.seeds == (3,)
    for name in ("image_ids", "original_sizes"):
        assert torch.equal(getattr(new, name), getattr(old, name))
    for one, other in zip((*new.images, *new.targets[:2]), (*old.images, *old.targets[:2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_pinned_memory_is_pinned():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    (batch,) = Collate(MEAN, STD, 1, equal_sizes=False)([LoadedSample(sample(4, 5), ())]).pin_memory().batches
    assert batch.images.pixels.is_pinned()
    assert batch.targets.labels.is_pinned()
