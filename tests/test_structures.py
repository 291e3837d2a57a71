"""The values between packages: moving them, taking them apart, and what may be left out."""

from __future__ import annotations

import torch

from structures import Batch, DetectorOutputs, Images, Prediction, QueryGroup, Targets, map_tensors


def make_batch(seeds: tuple[int, ...] = ()) -> Batch:
    targets = Targets(torch.tensor([2, 0, 1]), torch.rand(3, 4), (2, 0, 1), seeds)
    sizes = torch.tensor([[4, 5], [6, 3], [6, 5]])
    return Batch(Images(torch.rand(3, 3, 6, 5), sizes), targets, torch.tensor([7, 8, 9]), 2 * sizes)


def test_mapping_reaches_every_tensor_and_keeps_everything_else():
    batch = make_batch(seeds=(1, 2, 3))
    doubled = map_tensors(batch, lambda tensor: 2 * tensor)
    assert type(doubled) is Batch
    assert type(doubled.images) is Images
    assert type(doubled.targets) is Targets
    assert torch.equal(doubled.images.pixels, 2 * batch.images.pixels)
    assert torch.equal(doubled.images.sizes, 2 * batch.images.sizes)
    assert torch.equal(doubled.targets.labels, 2 * batch.targets.labels)
    assert torch.equal(doubled.targets.boxes, 2 * batch.targets.boxes)
    assert torch.equal(doubled.image_ids, 2 * batch.image_ids)
    assert torch.equal(doubled.original_sizes, 2 * batch.original_sizes)
    assert doubled.targets[2:] == ((2, 0, 1), (1, 2, 3), None)
    group = map_tensors(QueryGroup(Prediction(torch.ones(1), torch.ones(1)), class_agnostic=True), torch.neg)
    assert (group.matches, group.image_scale, group.valid, group.class_agnostic) == (None, None, None, True)


def test_batches_and_targets_move_as_a_whole():
    batch = make_batch(seeds=(1, 2, 3))
    moved = batch.to("meta", non_blocking=True)
    tensors = (*moved.images, *moved.targets[:2], moved.image_ids, moved.original_sizes)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.targets[2:] == batch.targets[2:]
    assert batch.targets.to("meta").boxes.device.type == "meta"


def test_seeds_may_be_left_out():
    targets = make_batch().targets
    assert targets.seeds == ()
    assert targets.to("cpu").seeds == ()
    assert [labels.tolist() for labels, _ in targets.split()] == [[2, 0], [], [1]]
    assert torch.equal(torch.cat([boxes for _, boxes in targets.split()]), targets.boxes)


def test_the_result_is_the_last_layer_of_the_decoder_wherever_it_is_listed():
    layers = Prediction(torch.rand(3, 2, 5, 4), torch.rand(3, 2, 5, 4))
    other = QueryGroup(Prediction(*(part + 1 for part in layers)))
    for groups in (
        {"encoder": other, "decoder": QueryGroup(layers), "denoising": other},
        {"decoder": QueryGroup(layers)},
    ):
        result = DetectorOutputs(groups).result
        assert torch.equal(result.logits, layers.logits[2])
        assert torch.equal(result.boxes, layers.boxes[2])
    for at in (0, 3, 5, 7):
        first, others = layers.split(at)
        assert torch.equal(first.logits, layers.logits[:, :, :at])
        assert torch.equal(first.boxes, layers.boxes[:, :, :at])
        assert torch.equal(others.logits, layers.logits[:, :, at:])
        assert torch.equal(others.boxes, layers.boxes[:, :, at:])
