"""The sampling points shown are those that the attention uses."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from torch import nn

from analysis.looking import recorded
from models import AnyDetector
from models.parts.attention import DeformableAttention, MemoryAttention
from models.parts.memory import Memory, pixel_centres
from ops.ms_deform_attn import ms_deform_attn
from structures import Images

SHAPES = ((6, 8), (3, 4))


def make_memory(images: int) -> Memory:
    valid = torch.tensor(SHAPES).expand(images, -1, -1)
    features = torch.randn(images, 60, 16)
    return Memory(features, torch.randn(images, 60, 16), pixel_centres(SHAPES, valid), SHAPES, valid)


@pytest.fixture
def attention() -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(embed_dim=16, num_heads=2, num_levels=2, num_points=3)
    nn.init.normal_(module.sampling_offsets.weight, std=0.5)
    nn.init.normal_(module.attention_weights.weight)
    return module.eval()


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
def test_sampling_there_with_those_weights_is_what_the_attention_does(attention, coordinates):
    query, memory = torch.randn(2, 5, 16), make_memory(2)
    reference = torch.rand(2, 5, coordinates) * 0.4 + 0.2
    with recorded(attention) as found, torch.no_grad():
        result = attention(query, reference, memory)
    (looking,) = found
    torch.testing.assert_close(looking.weights.sum((-2, -1)), torch.ones(2, 5, 2))
    torch.testing.assert_close(looking.reference, reference)
    with torch.no_grad():
        value = attention.value_projection(memory.features).unflatten(-1, (2, -1))
        attended = ms_deform_attn(value, SHAPES, looking.locations, looking.weights, backend="reference")
        torch.testing.assert_close(attention.output_projection(attended), result, rtol=1e-4, atol=1e-5)


def test_a_dense_attention_looks_at_every_pixel_with_those_weights():
    """A loop over images, queries, heads and pixels inside the image."""
    torch.manual_seed(0)
    module, query, memory = MemoryAttention(16, 2).eval(), torch.randn(2, 5, 16), make_memory(2)
    memory = memory._replace(valid_sizes=torch.tensor([SHAPES, ((4, 8), (2, 4))]))
    memory = memory._replace(centres=pixel_centres(SHAPES, memory.valid_sizes))
    with recorded(module) as found, torch.no_grad():
        result = module(query, None, memory)
        values = module.value_projection(memory.features).unflatten(-1, (2, -1))
    (looking,) = found
    assert looking.reference is None
    attended = torch.zeros(2, 5, 2, 8)
    for image in range(2):
        for place, centre in enumerate(memory.centres[image]):
            torch.testing.assert_close(looking.locations[image, :, :, 0, place], centre.expand(5, 2, 2))
            weights = looking.weights[image, :, :, 0, place]
            assert (weights > 0).all() if (centre < 1).all() else (weights == 0).all()
            attended[image] += weights[..., None] * values[image, place]
    torch.testing.assert_close(module.output_projection(attended.flatten(-2)), result, rtol=1e-4, atol=1e-5)


def test_recording_ends_with_its_block(attention):
    arguments = (torch.randn(1, 2, 16), torch.rand(1, 2, 4), make_memory(1))
    with recorded(attention) as found:
        attention(*arguments)
    attention(*arguments)
    assert len(found) == 1


@pytest.mark.parametrize("config", typing.get_args(AnyDetector), ids=lambda config: config.__name__)
def test_every_detector_says_where_its_queries_look(config):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 8, "num_queries": 5}
    backbone = dataclasses.replace(
        config().backbone, model="resnet10t", pretrained=False, norm="batch", frozen_stages=0
    )
    model = config(backbone=backbone, **sizes).build(3).eval()
    images = Images(torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], [50, 70]]))
    with recorded(model.last_cross_attention) as found, torch.no_grad():
        model(images)
    (looking,) = found
    batch, queries, heads, levels, places, two = looking.locations.shape
    assert (batch, queries, heads, two) == (2, 5, 2, 2)
    assert looking.weights.shape == (batch, queries, heads, levels, places)
    torch.testing.assert_close(looking.weights.sum((-2, -1)), torch.ones(2, 5, 2))
    assert looking.locations.isfinite().all()
    assert looking.reference is None or looking.reference.shape[:2] == (2, 5)
