"""What holds for each detector of the index: the contract that training, evaluation, tools and analysis rely on."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from family import FAMILY, criterion_for, forms
from torch import Tensor
from torchvision.ops import box_iou

import schema
from analysis.looking import recorded
from models import AnyDetector
from ops.boxes import cxcywh_to_xyxy
from structures import DetectorOutputs, Images, LossOutput, Targets
from tools import export

every_detector = pytest.mark.parametrize("name", FAMILY)


def build(name: str, **changes: typing.Any) -> torch.nn.Module:
    """The detector in training mode; published zeros are moved, so that everything matters."""
    torch.manual_seed(0)
    model = dataclasses.replace(FAMILY[name], **changes).build(5)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def loss_of(name: str, model: torch.nn.Module, batch: typing.Any) -> tuple[LossOutput, DetectorOutputs]:
    outputs = model(batch.images, batch.targets)
    return criterion_for(FAMILY[name])(outputs, batch.targets), outputs


def test_every_detector_of_the_index_is_here():
    assert {type(config) for config in FAMILY.values()} == set(typing.get_args(AnyDetector))
    names = [config.name for config in FAMILY.values()]
    assert [name.split(",")[0] for name in FAMILY] == names


@every_detector
def test_groups_are_those_that_the_configuration_says(name, make_batch):
    config, model, batch = FAMILY[name], build(name), make_batch()
    criterion_for(config).check(config.matched_layers, config.given_groups, config.no_object)
    _, outputs = loss_of(name, model, batch)
    assert list(outputs.groups) == [*config.matched_layers, *config.given_groups]
    for group, layers in config.matched_layers.items():
        value = outputs.groups[group]
        assert value.matches is None
        assert len(value.prediction.logits) == len(value.prediction.boxes) == layers
    assert all(outputs.groups[group].matches is not None for group in config.given_groups)
    for group in outputs.groups.values():
        logits, boxes = group.prediction
        assert logits.shape[-1] == (1 if group.class_agnostic else 5 + config.no_object)
        assert logits.dtype == boxes.dtype == torch.float32
        assert ((boxes >= 0) & (boxes <= 1)).all()
    model.eval()
    assert set(model(batch.images, batch.targets).groups) <= {"encoder", "decoder"}


@pytest.mark.slow
@every_detector
def test_layers_compile_whole_and_a_few_times_for_all_sizes(name, make_batch):
    model, compiled = build(name), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    sizes = (((96, 128), (80, 100)), ((128, 96), (64, 64)), ((64, 160), (64, 100)), ((96, 96), (96, 80)))
    batches = [make_batch(sizes[n], counts=(n + 2, 1)) for n in range(4)]
    expected = [loss_of(name, model, batch)[0].total for batch in batches]
    torch.compiler.reset()
    model.compile_layers(backend=backend, fullgraph=True)
    found = [loss_of(name, model, batch)[0].total for batch in batches[:3]]
    few = len(compiled)
    found.append(loss_of(name, model, batches[3])[0].total)
    assert 2 <= len(compiled) == few
    torch.testing.assert_close(found, expected)


@every_detector
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_every_parameter_learns(name, counts, make_batch):
    model = build(name)
    loss, _ = loss_of(name, model, make_batch(counts=counts))
    assert loss.total.isfinite()
    loss.total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    if counts == (3, 1):
        idle = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
        # A bias of keys shifts all logits of a softmax alike; and the queries of some have no content at first.
        without = ("key", "decoder.layers.0.self_attention.")
        assert [n for n in idle if not any(part in n for part in without)] == []


@every_detector
def test_recomputed_activations_give_the_same_gradients(name, make_batch):
    results = []
    for recompute in (False, True):
        model = build(name, gradient_checkpointing=recompute)
        loss, _ = loss_of(name, model, make_batch())
        loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@every_detector
def test_padding_is_invisible(name, monkeypatch):
    """Given equal features, more padding changes nothing that is predicted."""
    model = build(name).eval()
    shapes = [(12, 16), (6, 8), (3, 4)][: getattr(FAMILY[name], "num_levels", 1)]
    tight = [torch.randn(1, 64, h, w) for h, w in shapes]
    padded = [torch.full((1, 64, h + 3, w + 2), 7.0) for h, w in shapes]
    for small, large in zip(tight, padded, strict=True):
        large[:, :, : small.shape[2], : small.shape[3]] = small
    images, found = Images(torch.zeros(1, 3, 96, 128), torch.tensor([[96, 128]])), []
    for levels in (tight, padded):
        monkeypatch.setattr(
            model, "encode", lambda _, levels=levels: model.encode_levels(levels, torch.tensor([shapes]))
        )
        with torch.no_grad():
            found.append(model(images).groups["decoder"].prediction)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@every_detector
def test_an_image_does_not_change_its_neighbours(name, make_batch):
    """Equal sizes: what is predicted for an image, and what it adds to the losses, is its own."""
    model, criterion = build(name), criterion_for(FAMILY[name])
    batch = make_batch(sizes=((96, 96), (96, 96)), counts=(2, 5))
    both = model(batch.images, batch.targets)
    split = [
        (Images(*(part[i : i + 1] for part in batch.images)), Targets(labels, boxes, (len(labels),), (i,)))
        for i, (labels, boxes) in enumerate(batch.targets.split())
    ]
    alone = [model(*image) for image in split]
    for i, outputs in enumerate(alone):
        for part, own in zip(both.groups["decoder"].prediction, outputs.groups["decoder"].prediction, strict=True):
            torch.testing.assert_close(part[:, i : i + 1], own, rtol=1e-3, atol=1e-4)
    together = criterion(both, batch.targets).total
    parts = [criterion(o, t, 7, 2).total for o, (_, t) in zip(alone, split, strict=True)]
    torch.testing.assert_close(together, parts[0] + parts[1], rtol=1e-3, atol=1e-4)


@every_detector
def test_detections_against_a_loop(name, make_batch):
    config, model, batch = FAMILY[name], build(name).eval(), make_batch()
    with torch.no_grad():
        outputs = model(batch.images)
        detections = model.postprocess(outputs, batch.original_sizes)
    logits, boxes = outputs.result
    for b, found in enumerate(detections):
        height, width = batch.original_sizes[b].tolist()
        expected = []
        for q in range(logits.shape[1]):
            if config.no_object:
                values = logits[b, q].softmax(-1)[:-1].tolist()
                expected.append((max(values), values.index(max(values)), q))
            else:
                expected += [(s, c, q) for c, s in enumerate(logits[b, q].sigmoid().tolist())]
        expected = sorted(expected, key=lambda row: -row[0])[: config.detections_per_image]
        torch.testing.assert_close(found.scores, torch.tensor([s for s, _, _ in expected]))
        scale = torch.tensor([width, height, width, height])
        for label, box, (_, c, q) in zip(found.labels.tolist(), found.boxes_xyxy, expected, strict=True):
            assert label == c
            torch.testing.assert_close(box, cxcywh_to_xyxy(boxes[b, q]).clamp(0, 1) * scale)


@every_detector
def test_repeated_detections_are_dropped_where_it_is_said(name, make_batch):
    config, batch = FAMILY[name], make_batch()
    model = build(name).eval()
    with torch.no_grad():
        outputs = model(batch.images)
        outputs.result.boxes[..., 2:] += 0.5  # so that some do
        all_of_them = model.postprocess(outputs, batch.original_sizes)
        model.config = dataclasses.replace(config, nms_iou=0.3)
        found = model.postprocess(outputs, batch.original_sizes)
    for every, kept in zip(all_of_them, found, strict=True):
        expected = []
        for i, (box, label) in enumerate(zip(every.boxes_xyxy, every.labels, strict=True)):
            better = every.boxes_xyxy[:i][every.labels[:i] == label]
            if not len(better) or float(box_iou(box[None], better).max()) <= 0.3:
                expected.append(i)
        assert 0 < len(expected) < len(every.scores)
        for part, ours in zip(every, kept, strict=True):
            assert torch.equal(ours, part[expected])


@every_detector
def test_it_says_where_its_queries_look(name, make_batch):
    model, batch = build(name).eval(), make_batch()
    with torch.no_grad(), recorded(model.last_cross_attention) as found:
        model(batch.images)
    locations, weights, reference = found[-1]
    assert locations.shape == (*weights.shape, 2)
    assert weights.shape[:3] == (2, 12, 4)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 12, 4))
    seen = weights[1] * (locations[1] < 1).all(-1)  # the second image is padded
    if reference is None:
        torch.testing.assert_close(seen.sum((-2, -1)), torch.ones(12, 4))


@every_detector
def test_half_precision_keeps_boxes_exact(name, make_batch):
    model, batch = build(name), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = loss_of(name, model, batch)
    assert outputs.result.boxes.dtype == torch.float32
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_detector
def test_its_configuration_survives_a_file(name):
    plain = schema.plain(FAMILY[name])
    assert schema.decode(AnyDetector, None, plain, ()) == FAMILY[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", forms("detr"))
def test_it_exports(name):
    model = build(name).eval()
    deployed = export.Deployed(model, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).eval()
    program = export.export_program(deployed).module()

    def run(images: Tensor, sizes: Tensor) -> export.Outputs:
        return program(images, sizes)

    assert export.check(deployed, run) < export.TOLERANCE
