"""Query selection: every pixel of the encoder output proposes a box, the most confident ones become queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.parts.encoder import pixel_centres
from models.parts.heads import PredictionHeads
from structures import Prediction


class SelectedQueries(NamedTuple):
    """The best proposals of each image, best first."""

    prediction: Prediction
    """Logits [B, Q, C] and boxes [B, Q, 4], with gradient: the encoder's own supervision."""
    features: Tensor
    """[B, Q, embed_dim] of the selected pixels."""
    tokens: Tensor
    """[B, Q] int64 indices into the S pixels of all levels."""


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

    def forward(
        self, memory: Tensor, spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor, num_queries: int
    ) -> SelectedQueries:
        """Select.

        Args:
            memory: [B, S, embed_dim] encoder output.
            spatial_shapes: (height, width) of each level.
            valid_sizes: [B, L, 2] unpadded (height, width) of each level.
            num_queries: how many; fewer where the levels have fewer pixels together.
        """
        anchors, valid = self.anchors(spatial_shapes, valid_sizes)
        features = self.norm(self.projection(memory * valid[..., None]))
        logits = self.heads.classify(features)
        ranking = logits.detach().amax(dim=-1)
        if self.suppress_invalid:
            ranking = ranking.masked_fill(~valid, -torch.inf)
        tokens = ranking.topk(min(num_queries, ranking.shape[1]), dim=1).indices

        def select(values: Tensor) -> Tensor:
            return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))

        features = select(features)
        boxes = (select(anchors) + self.heads.regress(features)).sigmoid()
        return SelectedQueries(Prediction(select(logits), boxes), features, tokens)

    def anchors(self, spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, 4] of the boxes that pixels start from, and [B, S] whether a pixel may propose.

        A pixel proposes where it is not padding and its centre is not within a hundredth of the border.
        """
        centres = pixel_centres(spatial_shapes, valid_sizes)
        sizes = torch.cat(
            [
                torch.full((height * width,), self.proposal_size * 2.0**level, device=centres.device)
                for level, (height, width) in enumerate(spatial_shapes)
            ]
        )
        boxes = torch.cat([centres, sizes[:, None].expand(centres.shape)], dim=-1)
        valid = ((boxes > 0.01) & (boxes < 0.99)).all(dim=-1)
        # Pixels that may not propose keep a finite anchor (the published code has infinity), so that nothing
        # downstream can turn into NaN should they ever be selected for want of others.
        boxes = torch.where(valid[..., None], boxes, boxes.new_tensor(1 - 1e-6))
        return torch.logit(boxes), valid
