"""Position encodings, valid sizes, proposals, box arithmetic and post-processing against obvious loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.parts.attention import DeformableAttention
from models.parts.heads import PredictionHeads, refine_boxes
from models.parts.memory import Memory, level_valid_sizes, pixel_centres
from models.parts.neck import Neck
from models.parts.position_encoding import SinePositionEncoding, encode_boxes
from models.parts.postprocess import best_classes
from models.parts.query_selection import QuerySelection
from structures import DetectorOutputs, Prediction, QueryGroup


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 100), st.integers(1, 60))
def test_valid_sizes_are_those_of_a_nearest_resized_mask(valid, padding, length):
    padded = valid + padding
    mask = [1 if math.floor(i * padded / length) < valid else 0 for i in range(length)]
    sizes = level_valid_sizes(torch.tensor([[valid, padded]]), (padded, padded), [(length, 7)])
    assert sizes[0, 0].tolist() == [sum(mask), 7]


def test_position_encoding_by_hand():
    encoding = SinePositionEncoding(temperature=20.0, offset=-0.5)(((3, 4),), torch.tensor([[[2, 4]]]), 8)
    assert encoding.shape == (1, 12, 8)
    y, x = (1 + 1 - 0.5) / 2 * 2 * math.pi, (3 + 1 - 0.5) / 4 * 2 * math.pi
    second = 20.0 ** (2 / 4)
    parts = [(y, 1), (y, second), (x, 1), (x, second)]
    expected = [f(v / w) for v, w in parts for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoding[0, 1 * 4 + 3], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_boxes_are_encoded_in_the_order_y_x_w_h():
    encoded = encode_boxes(torch.tensor([0.1, 0.2, 0.3, 0.4]), 2)
    expected = [f(v * 2 * math.pi) for v in (0.2, 0.1, 0.3, 0.4) for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoded, torch.tensor(expected))


def test_pixel_centres():
    centres = pixel_centres([(2, 3), (1, 2)], torch.tensor([[[2, 2], [1, 1]]]))
    expected = [[0.25, 0.25], [0.75, 0.25], [1.25, 0.25], [0.25, 0.75], [0.75, 0.75], [1.25, 0.75]]
    torch.testing.assert_close(centres[0, :6], torch.tensor(expected))
    torch.testing.assert_close(centres[0, 6:], torch.tensor([[0.5, 0.5], [1.5, 0.5]]))


def test_proposals_skip_padding_and_border():
    selection = QuerySelection(8, PredictionHeads(8, 2), 0.05, suppress_invalid=True)
    shapes, valid = ((4, 6), (2, 3)), torch.tensor([[[4, 3], [2, 2]]])
    features = torch.randn(1, 30, 8)
    memory = Memory(features, torch.zeros_like(features), pixel_centres(shapes, valid), shapes, valid)
    anchors, may = selection.anchors(memory)
    assert may[0].tolist() == ([True] * 3 + [False] * 3) * 4 + [True, True, False] * 2
    torch.testing.assert_close(anchors.sigmoid()[0, 0], torch.tensor([1 / 6, 1 / 8, 0.05, 0.05]))
    torch.testing.assert_close(anchors.sigmoid()[0, 24], torch.tensor([0.25, 0.25, 0.1, 0.1]))
    assert anchors.isfinite().all()
    chosen = selection.best(selection.propose(memory).ranking, 16)
    assert chosen.shape == (1, 16)
    assert may[0, chosen[0]].all()
    assert (selection(memory, num_queries=16).logits.amax(-1).diff() <= 0).all()


def test_refining_boxes():
    boxes = torch.tensor([0.2, 0.5, 0.9, 1.0])
    torch.testing.assert_close(refine_boxes(boxes, torch.zeros(4))[:3], boxes[:3])
    moved = refine_boxes(boxes, torch.tensor([1.0, 0.0, -100.0, 100.0]))
    torch.testing.assert_close(moved[0], torch.tensor(1 / (1 + math.exp(-(math.log(0.25) + 1)))))
    assert moved.isfinite().all()
    assert refine_boxes(torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.zeros(4)).tolist() == pytest.approx(
        [1e-3, 1 - 1e-3, 1 - 1e-3, 1e-3]
    )
    near = torch.tensor([0.0, 1e-4, 1 - 1e-4, 1.0])
    published = (near.clamp(min=1e-3) / (1 - near).clamp(min=1e-3)).log().sigmoid()
    torch.testing.assert_close(refine_boxes(near, torch.zeros(4)), published, rtol=0, atol=1e-6)


def test_initialisation_as_published():
    attention = DeformableAttention(32, 8, 2, 3)
    offsets = attention.sampling_offsets(torch.randn(5, 32)).unflatten(-1, (8, 2, 3, 2))
    torch.testing.assert_close(offsets[3, 0, 1, 2], torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(offsets[3, 1, 0, 0], torch.tensor([1.0, 1.0]))
    assert attention.attention_weights.weight.abs().sum() == 0
    heads = PredictionHeads(16, 3)
    torch.testing.assert_close(heads.class_head.bias.sigmoid(), torch.full((3,), 0.01))
    assert heads.regress(torch.randn(4, 16)).abs().sum() == 0


def test_neck_levels():
    neck = Neck([16, 32], 32, num_levels=4)
    levels = neck([torch.randn(2, 16, 12, 10), torch.randn(2, 32, 6, 5)])
    assert [tuple(level.shape) for level in levels] == [(2, 32, 12, 10), (2, 32, 6, 5), (2, 32, 3, 3), (2, 32, 2, 2)]
    with pytest.raises(ValueError, match="groups"):
        Neck([16], 40, 1)


def test_postprocess_against_a_loop(tiny_config):
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 6, 3, generator=generator), torch.rand(2, 6, 4, generator=generator)
    sizes = torch.tensor([[100, 200], [50, 60]])
    layers = Prediction(torch.stack([-logits, logits]), torch.stack([1 - boxes, boxes]))  # the last layer counts
    outputs = DetectorOutputs({"encoder": QueryGroup(layers.layer(0)), "decoder": QueryGroup(layers)})
    few, all_pairs = (
        dataclasses.replace(tiny_config, detections_per_image=top_k).build(3).postprocess(outputs, sizes)
        for top_k in (5, 300)
    )
    for image, found in enumerate(few):
        assert len(found.scores) == 5
        pairs = [(logits[image, q, c].sigmoid().item(), q, c) for q in range(6) for c in range(3)]
        height, width = sizes[image].tolist()
        for n, (score, q, c) in enumerate(sorted(pairs, reverse=True)[:5]):
            cx, cy, w, h = boxes[image, q].tolist()
            corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            expected = [min(max(v, 0), 1) * s for v, s in zip(corners, [width, height] * 2, strict=True)]
            assert found.scores[n].item() == pytest.approx(score)
            assert found.labels[n] == c
            torch.testing.assert_close(found.boxes_xyxy[n], torch.tensor(expected))
    assert len(all_pairs[0].scores) == 18


def test_best_classes_against_a_loop():
    scores = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    values, labels, queries = best_classes(scores, 4)
    for image in range(2):
        rows = sorted(
            ((max(row), row.index(max(row)), q) for q, row in enumerate(scores[image].tolist())), reverse=True
        )
        found = zip(values[image].tolist(), labels[image].tolist(), queries[image].tolist(), strict=True)
        assert list(found) == rows[:4]
    assert best_classes(scores, 300)[0].shape == (2, 6)
