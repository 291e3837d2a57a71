"""The detector as a whole: shapes, gradients, independence of padding and neighbours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models import DINOConfig
from structures import Targets


def total(outputs):
    parts = [outputs.decoder, outputs.encoder, *([outputs.denoising.decoder] if outputs.denoising else [])]
    return sum(tensor.sum() for part in parts for tensor in part)


def randomise(model: torch.nn.Module) -> None:
    """The published initialisation has zeros in places that must matter here."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


def test_shapes_of_every_value(tiny_config, make_batch):
    model = tiny_config.build(num_classes=5)
    outputs = model(make_batch())
    assert outputs.decoder.logits.shape == (3, 2, 20, 5)
    assert outputs.decoder.boxes.shape == (3, 2, 20, 4)
    assert outputs.encoder.logits.shape == (2, 20, 5)
    assert outputs.encoder.boxes.shape == (2, 20, 4)
    # 3 targets in 6 // 3 = 2 groups of 3 positives and 3 negatives; the second image has none.
    assert outputs.denoising.decoder.logits.shape == (3, 2, 12, 5)
    assert outputs.denoising.valid.sum(1).tolist() == [12, 0]
    assert outputs.denoising.num_groups.tolist() == [2, 1]
    assert len(outputs.denoising.matches.layer) == 3 * 2 * 3
    for prediction in (outputs.decoder, outputs.encoder, outputs.denoising.decoder):
        assert prediction.logits.dtype == prediction.boxes.dtype == torch.float32
        assert ((prediction.boxes >= 0) & (prediction.boxes <= 1)).all()
    model.eval()
    with torch.no_grad():
        outputs = model(make_batch())
        assert outputs.denoising is None
        detections = model.postprocess(outputs, make_batch().original_sizes)
    assert [d.boxes_xyxy.shape for d in detections] == [(100, 4), (100, 4)]
    assert (detections[0].scores.diff() <= 0).all()


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("shared_heads", [True, False])
def test_every_parameter_gets_a_gradient_whatever_the_targets(tiny_config, make_batch, counts, shared_heads):
    model = dataclasses.replace(tiny_config, shared_heads=shared_heads).build(5)
    total(model(make_batch(counts=counts))).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_config, make_batch):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = dataclasses.replace(tiny_config, gradient_checkpointing=checkpointing).build(5)
        loss = total(model(make_batch()))
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
            encoded = model.encode_levels(levels, valid)
            selected = model.query_selection(*encoded, num_queries=20)
            content = model.query_content.weight[None]
            heads = [model.heads[0]] * 3
            decoded = model.decoder(content, selected.prediction.boxes, *encoded, mask=None, heads=heads)
            predictions.append((selected.prediction, decoded))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-4, atol=1e-5)


def test_an_image_does_not_change_its_neighbours(tiny_config, make_batch):
    """Equal sizes: the prediction for an image, noise of its denoising queries included, is its own."""
    torch.manual_seed(0)
    model = tiny_config.build(5)
    randomise(model)
    batch = make_batch(sizes=((96, 96), (96, 96)), counts=(2, 5))
    both = model(batch)
    labels, boxes = batch.targets.split()[0]
    alone = batch._replace(
        images=batch.images[:1],
        image_sizes=batch.image_sizes[:1],
        targets=Targets(labels, boxes, (2,)),
        seeds=batch.seeds[:1],
    )
    single = model(alone)
    torch.testing.assert_close(both.decoder.boxes[:, :1], single.decoder.boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.decoder.logits[:, :1], single.decoder.logits, rtol=1e-4, atol=1e-4)
    own = int(single.denoising.valid.sum())
    assert own == 12
    torch.testing.assert_close(
        both.denoising.decoder.boxes[:, :1, :own], single.denoising.decoder.boxes, rtol=1e-4, atol=1e-5
    )


def test_denoising_does_not_leak_into_matching_queries(tiny_config, make_batch):
    torch.manual_seed(0)
    model = tiny_config.build(5)
    randomise(model)
    batch = make_batch(sizes=((96, 96), (96, 96)), counts=(2, 5))
    trained = model(batch)
    model.eval()
    evaluated = model(batch)
    torch.testing.assert_close(trained.decoder.boxes, evaluated.decoder.boxes, rtol=1e-4, atol=1e-5)


def test_fewer_pixels_than_queries(tiny_config, make_batch):
    model = dataclasses.replace(tiny_config, num_queries=900).build(5).eval()
    with torch.no_grad():
        outputs = model(make_batch(sizes=((32, 32),), counts=(0,)))
    assert outputs.decoder.boxes.shape[2] == 16 + 4 + 1 + 1
    assert outputs.decoder.boxes.isfinite().all()


def test_five_levels(tiny_config, make_batch):
    backbone = dataclasses.replace(tiny_config.backbone, strides=(4, 8, 16, 32))
    model = dataclasses.replace(tiny_config, backbone=backbone, num_levels=5).build(5)
    assert model.encode(torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]])).spatial_shapes == (
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
        (1, 2),
    )


def test_bf16_autocast_keeps_boxes_in_fp32(tiny_config, make_batch):
    model = tiny_config.build(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(make_batch())
    assert outputs.decoder.boxes.dtype == torch.float32
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
        ({"proposal_size": 0.0}, "proposal_size"),
    ],
)
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DINOConfig(**change)
