"""The detector as a whole: shapes, gradients, independence of padding and neighbours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models import DINOConfig
from structures import Images, Prediction, Targets


def total(outputs):
    return sum(tensor.sum() for group in outputs.groups.values() for tensor in group.prediction)


def predict(model, batch) -> dict[str, Prediction]:
    """What each group of queries predicts."""
    return {name: group.prediction for name, group in model(batch.images, batch.targets).groups.items()}


def randomise(model: torch.nn.Module) -> None:
    """The published initialisation has zeros in places that must matter here."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


def test_shapes_of_every_value(tiny_config, make_batch):
    model = tiny_config.build(num_classes=5)
    batch = make_batch()
    outputs = model(batch.images, batch.targets)
    encoder, decoder, denoising = outputs.groups.values()
    assert list(outputs.groups) == [*tiny_config.matched_layers, *tiny_config.given_groups]
    assert list(outputs.groups) == ["encoder", "decoder", "denoising"]
    assert decoder.prediction.logits.shape == (3, 2, 20, 5)
    assert decoder.prediction.boxes.shape == (3, 2, 20, 4)
    assert encoder.prediction.logits.shape == (1, 2, 20, 5)
    assert encoder.prediction.boxes.shape == (1, 2, 20, 4)
    for group in (encoder, decoder):
        assert group.matches is group.image_scale is group.valid is None
        assert not group.class_agnostic
    # 3 targets in 6 // 3 = 2 groups of 3 positives and 3 negatives; the second image has none.
    assert denoising.prediction.logits.shape == (3, 2, 12, 5)
    assert denoising.valid.sum(1).tolist() == [12, 0]
    assert denoising.image_scale.tolist() == [1 / 2, 1]
    assert len(denoising.matches.layer) == 3 * 2 * 3
    for prediction in (group.prediction for group in outputs.groups.values()):
        assert prediction.logits.dtype == prediction.boxes.dtype == torch.float32
        assert ((prediction.boxes >= 0) & (prediction.boxes <= 1)).all()
    model.eval()
    with torch.no_grad():
        outputs = model(batch.images, batch.targets)
        assert list(outputs.groups) == ["encoder", "decoder"], "targets make no difference outside of training"
        detections = model.postprocess(outputs, batch.original_sizes)
    assert torch.equal(outputs.result.boxes, outputs.groups["decoder"].prediction.boxes[-1])
    assert [d.boxes_xyxy.shape for d in detections] == [(100, 4), (100, 4)]
    assert (detections[0].scores.diff() <= 0).all()


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("shared_heads", [True, False])
def test_every_parameter_gets_a_gradient_whatever_the_targets(tiny_config, make_batch, counts, shared_heads):
    model = dataclasses.replace(tiny_config, shared_heads=shared_heads).build(5)
    batch = make_batch(counts=counts)
    total(model(batch.images, batch.targets)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_config, make_batch):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = dataclasses.replace(tiny_config, gradient_checkpointing=checkpointing).build(5)
        batch = make_batch()
        loss = total(model(batch.images, batch.targets))
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss, gradients))
    torch.testing.assert_close(results[0], results[1])


def test_transformer_does_not_see_padding(tiny_config, make_batch):
    """Given equal features, more padding changes nothing: not the memory, not a proposal, not a box."""
    torch.manual_seed(0)
    model = tiny_config.build(5).eval()
    randomise(model)
    shapes, dim = [(12, 16), (6, 8), (3, 4), (2, 2)], tiny_config.embed_dim
    tight = [torch.randn(1, dim, h, w) for h, w in shapes]
    padded = [torch.full((1, dim, h + 3, w + 2), 7.0) for h, w in shapes]
    for small, large in zip(tight, padded, strict=True):
        large[:, :, : small.shape[2], : small.shape[3]] = small
    valid = torch.tensor([shapes])
    predictions = []
    with torch.no_grad():
        for levels in (tight, padded):
            memory = model.encode_levels(levels, valid)
            selected = model.query_selection(memory, num_queries=20)
            content = model.query_content.weight[None]
            heads = [model.heads[0]] * 3
            predictions.append((selected, model.decoder(content, selected.boxes[0], memory, heads)))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-4, atol=1e-5)


def test_an_image_does_not_change_its_neighbours(tiny_config, make_batch):
    """Equal sizes: the prediction for an image, noise of its denoising queries included, is its own."""
    torch.manual_seed(0)
    model = tiny_config.build(5)
    randomise(model)
    batch = make_batch(sizes=((96, 96), (96, 96)), counts=(2, 5))
    both = predict(model, batch)
    labels, boxes = batch.targets.split()[0]
    alone = batch._replace(
        images=Images(batch.images.pixels[:1], batch.images.sizes[:1]),
        targets=Targets(labels, boxes, (2,), batch.targets.seeds[:1]),
    )
    single = predict(model, alone)
    torch.testing.assert_close(both["decoder"].boxes[:, :1], single["decoder"].boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both["decoder"].logits[:, :1], single["decoder"].logits, rtol=1e-4, atol=1e-4)
    own = int(model(*alone[:2]).groups["denoising"].valid.sum())
    assert own == 12
    torch.testing.assert_close(both["denoising"].boxes[:, :1, :own], single["denoising"].boxes, rtol=1e-4, atol=1e-5)


def test_denoising_does_not_leak_into_matching_queries(tiny_config, make_batch):
    torch.manual_seed(0)
    model = tiny_config.build(5)
    randomise(model)
    batch = make_batch(sizes=((96, 96), (96, 96)), counts=(2, 5))
    trained = predict(model, batch)
    model.eval()
    evaluated = predict(model, batch)
    torch.testing.assert_close(trained["decoder"].boxes, evaluated["decoder"].boxes, rtol=1e-4, atol=1e-5)


def test_without_targets_training_is_undisturbed_by_denoising(tiny_config, make_batch):
    """A detector that is trained by another criterion need not be given targets."""
    model = tiny_config.build(5)
    batch = make_batch()
    alone, beside = model(batch.images), model(batch.images, batch.targets)
    assert list(alone.groups) == ["encoder", "decoder"]
    torch.testing.assert_close(alone.result, beside.result, rtol=1e-4, atol=1e-5)


def test_fewer_pixels_than_queries(tiny_config, make_batch):
    model = dataclasses.replace(tiny_config, num_queries=900).build(5).eval()
    with torch.no_grad():
        decoder = predict(model, make_batch(sizes=((32, 32),), counts=(0,)))["decoder"]
    assert decoder.boxes.shape[2] == 16 + 4 + 1 + 1
    assert decoder.boxes.isfinite().all()


def test_five_levels(tiny_config, make_batch):
    backbone = dataclasses.replace(tiny_config.backbone, strides=(4, 8, 16, 32))
    model = dataclasses.replace(tiny_config, backbone=backbone, num_levels=5).build(5)
    assert model.encode(Images(torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]]))).spatial_shapes == (
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
        (1, 2),
    )


def test_bf16_autocast_keeps_boxes_in_fp32(tiny_config, make_batch):
    model = tiny_config.build(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = make_batch()
        outputs = model(batch.images, batch.targets)
    assert outputs.groups["decoder"].prediction.boxes.dtype == torch.float32
    total(outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 66}, "divisible"),
        ({"num_levels": 2}, "strides"),
        ({"num_queries": 0}, "at least 1: num_queries 0"),
        ({"num_heads": 0, "detections_per_image": -1}, "at least 1: num_heads 0, detections_per_image -1"),
        ({"dropout": 1.0}, "dropout"),
        ({"nms_iou": 0}, "nms_iou must lie in"),
        ({"proposal_size": 0.0}, "proposal_size"),
    ],
)
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DINOConfig(**change)
