"""The sampling points shown are those that the attention uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.sampling import last_cross_attention, recorded, sampling_points
from models.parts.attention import DeformableAttention
from ops.ms_deform_attn import ms_deform_attn

SHAPES = [(6, 8), (3, 4)]


@pytest.fixture
def attention() -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(embed_dim=16, num_heads=2, num_levels=2, num_points=3)
    nn.init.normal_(module.sampling_offsets.weight, std=0.5)
    nn.init.normal_(module.attention_weights.weight)
    return module.eval()


def test_sampling_there_with_those_weights_is_what_the_attention_does(attention):
    query, memory = torch.randn(2, 5, 16), torch.randn(2, 60, 16)
    reference = torch.rand(2, 5, 4) * 0.4 + 0.2
    valid = torch.tensor(SHAPES).expand(2, -1, -1)
    with recorded(attention) as found, torch.no_grad():
        result = attention(query, reference, memory, SHAPES, valid)
    (sampling,) = found
    torch.testing.assert_close(sampling.weights.sum((-2, -1)), torch.ones(2, 5, 2))
    torch.testing.assert_close(sampling.reference, reference)
    with torch.no_grad():
        value = attention.value_projection(memory).unflatten(-1, (2, -1))
        attended = ms_deform_attn(value, SHAPES, sampling.locations, sampling.weights, backend="reference")
        torch.testing.assert_close(attention.output_projection(attended), result, rtol=1e-4, atol=1e-5)


def test_recording_ends_with_its_block(attention):
    arguments = (torch.randn(1, 2, 16), torch.rand(1, 2, 4), torch.randn(1, 60, 16), SHAPES, torch.tensor([SHAPES]))
    with recorded(attention) as found:
        attention(*arguments)
    attention(*arguments)
    assert len(found) == 1


def test_models_without_deformable_attention_are_refused():
    with pytest.raises(ValueError, match="no decoder with deformable"):
        last_cross_attention(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear is not a deformable attention"):
        sampling_points(nn.Linear(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 4))
