"""Class and box heads, and the arithmetic of refining boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.layers import MLP


class PlainHeads(nn.Module):
    """A linear class head and a three-layer box head, initialised as PyTorch does (DETR, arXiv 2005.12872)."""

    def __init__(self, embed_dim: int, num_logits: int) -> None:
        super().__init__()
        self.class_head = nn.Linear(embed_dim, num_logits)
        self.box_head = MLP(embed_dim, embed_dim, 4, 3)

    def classify(self, features: Tensor) -> Tensor:
        """[..., embed_dim] → logits [..., num_logits] float32."""
        return self.class_head(features).float()

    def regress(self, features: Tensor) -> Tensor:
        """[..., embed_dim] → changes [..., 4] of the boxes' logits, float32: 16 bits would quantise the boxes."""
        with torch.autocast(features.device.type, enabled=False):
            return self.box_head(features.float())


class PredictionHeads(PlainHeads):
    """Heads for sigmoid scores and refined boxes: every class starts as improbable, every box as its reference."""

    def __init__(self, embed_dim: int, num_classes: int, prior: float = 0.01, log_size: float = 0.0) -> None:
        """
        Args:
            embed_dim: width of the features.
            num_classes: classes to tell apart.
            prior: probability that every class starts at, or the many negatives drown the first steps (arXiv
                1708.02002).
            log_size: logit of the width and height that boxes without a size, points, start with.
        """
        super().__init__(embed_dim, num_classes)
        nn.init.constant_(self.class_head.bias, -math.log((1 - prior) / prior))
        last = self.box_head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], log_size)


def classify(heads: Sequence[PlainHeads], features: Tensor) -> Tensor:
    """Logits [L, B, Q, C] from features [L, B, Q, embed_dim] and each layer's heads; shared ones are called once."""
    if all(head is heads[0] for head in heads):
        return heads[0].classify(features)
    return torch.stack([head.classify(layer) for head, layer in zip(heads, features.unbind(0), strict=True)])


def regress(heads: Sequence[PlainHeads], features: Tensor) -> Tensor:
    """Changes of boxes [L, B, Q, 4] from features [L, B, Q, embed_dim], likewise."""
    if all(head is heads[0] for head in heads):
        return heads[0].regress(features)
    return torch.stack([head.regress(layer) for head, layer in zip(heads, features.unbind(0), strict=True)])


def refine_boxes(reference: Tensor, changes: Tensor, eps: float = 1e-3) -> Tensor:
    """Move boxes in logit space: sigmoid(logit(reference) + changes).

    Published code keeps the logit finite by clamping numerator and denominator, not the reference: where a coordinate
    is nearer to 0 or 1 than ``eps``, its logit differs from ours by less than ``eps``, and the box by less than eps².

    Args:
        reference: [..., 4] cxcywh boxes, or [..., 2] points, to which changes add the size.
        changes: [..., 4].
        eps: how near to 0 or 1 a reference may be when its logit is taken.

    Returns:
        [..., 4] float32 cxcywh in (0, 1).
    """
    logits = torch.logit(reference.float(), eps)
    if reference.shape[-1] == 2:
        logits = F.pad(logits, (0, 2))
    return (logits + changes).sigmoid()
