"""The levels of plain vision transformers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models import BackboneConfig
from models.parts.feature_pyramid import SimpleFeaturePyramid


def test_levels_against_the_paper_step_by_step():
    pyramid = SimpleFeaturePyramid(16, 16, (4, 8, 16, 32))
    assert pyramid.channels == (4, 8, 16, 16)
    x = torch.randn(2, 16, 3, 5)
    finest, fine, same, coarse = pyramid(x)
    first, _, _, second = pyramid.levels[0]
    half = F.conv_transpose2d(x, first.weight, first.bias, stride=2)
    normalised = (half - half.mean(1, keepdim=True)) / (half.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(finest, F.conv_transpose2d(F.gelu(normalised), second.weight, second.bias, stride=2))
    assert fine.shape == (2, 8, 6, 10)
    assert same is x
    assert coarse.shape == (2, 16, 2, 3)
    assert coarse[0, 0, 0, 0] == x[0, 0, :2, :2].max()


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (130, 47)])
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("vit_tiny_patch16_224", (4, 8, 16, 32)),
        ("eva02_tiny_patch14_224", (7, 14, 28)),
        ("xcit_nano_12_p16_224", (16,)),
    ],
)
def test_maps_cover_the_image(name, strides, size):
    """Positions are those of pixels: an image beside nothing gives the maps of the image alone, where it is."""
    backbone = BackboneConfig(model=name, pretrained=False, norm="batch", frozen_stages=0, strides=strides).build()
    features = backbone.eval()(torch.randn(1, 3, *size))
    expected = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
    assert [tuple(feature.shape[2:]) for feature in features] == expected
