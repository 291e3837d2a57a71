"""Query selection: every pixel of the encoder output proposes a box, the most confident ones become queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.parts.constants import remembered
from models.parts.heads import PredictionHeads
from models.parts.memory import Memory, grid
from models.parts.position_encoding import sine_features
from structures import Prediction, QueryGroup


class Proposals(NamedTuple):
    """What every pixel proposes."""

    features: Tensor
    """[B, S, embed_dim]."""
    logits: Tensor
    """[B, S, C]."""
    anchors: Tensor
    """[B, S, 4] logits of the cxcywh boxes that pixels start from."""
    ranking: Tensor
    """[B, S] by which they are selected, detached."""
    valid: Tensor
    """[B, S] bool, whether a pixel may propose."""


class QuerySelection(nn.Module):
    """Two-stage proposals (arXiv 2010.04159, section 4.2), selected by their best class logit (arXiv 2203.03605)."""

    def __init__(self, embed_dim: int, heads: PredictionHeads, proposal_size: float, suppress_invalid: bool) -> None:
        super().__init__()
        self.projection = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(embed_dim)
        self.heads = heads
        self.proposal_size = proposal_size
        self.suppress_invalid = suppress_invalid

    def forward(self, memory: Memory, num_queries: int) -> Prediction:
        """The best proposals of each image, best first: one layer of Q queries, with gradient.

        Args:
            memory: encoder output.
            num_queries: how many; fewer where the levels have fewer pixels together.
        """
        proposals = self.propose(memory)
        tokens = self.best(proposals.ranking, num_queries)
        features, logits, anchors = (select(values, tokens) for values in proposals[:3])
        boxes = (anchors + self.heads.regress(features)).sigmoid()
        return Prediction(logits[None], boxes[None])

    def supervise_all(self, memory: Memory, num_queries: int) -> tuple[QueryGroup, Tensor]:
        """The proposals of all pixels, about any object, and the boxes [B, Q, 4] of the best, without gradient."""
        features, logits, anchors, ranking, valid = self.propose(memory)
        boxes = (anchors + self.heads.regress(features)).sigmoid()
        supervised = valid if self.suppress_invalid else None
        group = QueryGroup(Prediction(logits[None], boxes[None]), valid=supervised, class_agnostic=True)
        return group, select(boxes, self.best(ranking, num_queries)).detach()

    def propose(self, memory: Memory) -> Proposals:
        """Features, class logits and anchors of all pixels."""
        anchors, valid = self.anchors(memory)
        features = self.norm(self.projection(memory.features * valid[..., None]))
        logits = self.heads.classify(features)
        ranking = logits.detach().amax(dim=-1)
        if self.suppress_invalid:
            ranking = ranking.masked_fill(~valid, -torch.inf)
        return Proposals(features, logits, anchors, ranking, valid)

    def best(self, ranking: Tensor, num_queries: int) -> Tensor:
        """[B, Q] int64 indices of the best pixels of a ranking [B, S], best first."""
        return ranking.topk(min(num_queries, ranking.shape[1]), dim=1).indices

    def anchors(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits [B, S, 4] of the boxes that pixels start from, and [B, S] whether a pixel may propose.

        A pixel proposes where it is not padding and its centre is not within a hundredth of the border.
        """
        centres = memory.centres
        sizes = _proposal_sizes(self.proposal_size, memory.spatial_shapes, centres.device)
        boxes = torch.cat([centres, sizes.expand(centres.shape)], dim=-1)
        valid = ((boxes > 0.01) & (boxes < 0.99)).all(dim=-1)
        # Pixels that may not propose keep a finite anchor (the published code has infinity), so that nothing
        # downstream can turn into NaN should they ever be selected for want of others.
        return torch.logit(boxes.masked_fill(~valid[..., None], 1 - 1e-6)), valid


@remembered
def _proposal_sizes(finest: float, shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[S, 1] width and height of the anchors of each pixel."""
    return (finest * 2.0 ** grid(shapes, device).level)[:, None]


class PositionFromBoxes(nn.Module):
    """Query positions and contents from proposals (arXiv 2010.04159, appendix A.4)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * embed_dim, 2 * embed_dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(2 * embed_dim)

    def forward(self, boxes: Tensor) -> Tensor:
        """[B, Q, 4] cxcywh boxes → [B, Q, 2·embed_dim]: position, then content."""
        features = sine_features(boxes, self.projection.in_features // 4).flatten(-2)
        return self.norm(self.projection(features))


def select(values: Tensor, tokens: Tensor) -> Tensor:
    """[B, Q, ...]: of values [B, S, channels] those of the pixels [B, Q]."""
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))
