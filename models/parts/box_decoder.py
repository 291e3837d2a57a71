"""The decoder: queries conditioned on boxes that every layer refines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.parts.attention import as_bias
from models.parts.heads import PredictionHeads, classify, refine_boxes, regress
from models.parts.layers import MLP, Decoder, DecoderLayer
from models.parts.memory import Memory
from models.parts.multi_scale import PublishedDetails
from models.parts.position_encoding import encode_boxes
from structures import Prediction


class BoxDecoder(Decoder):
    """A stack of decoder layers with iterative box refinement, looking forward twice (DINO, arXiv 2203.03605)."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embed_dim: int,
        look_forward_twice: bool = True,
        published: PublishedDetails | None = None,
    ) -> None:
        super().__init__(layers, nn.LayerNorm(embed_dim))
        self.position_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        for layer in self.position_head.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        self.look_forward_twice = look_forward_twice
        self.published = published or PublishedDetails()

    def forward(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Memory,
        heads: Sequence[PredictionHeads],
        mask: Tensor | None = None,
    ) -> Prediction:
        """Predict from every layer.

        Args:
            content: [B, Q, embed_dim] content of the queries.
            boxes: [B, Q, 4] initial cxcywh boxes in (0, 1), without gradient.
            memory: encoder output.
            heads: class and box heads of each layer (the same object where they are shared).
            mask: [B, 1, Q, Q] bool, True where a query (row) may look at another; None allows everything.

        Returns:
            Logits [L, B, Q, C] and boxes [L, B, Q, 4] of all layers, float32.
        """
        contents, references, mask = [], [], as_bias(mask, content.dtype)
        for index, head in enumerate(heads):
            content = self.look(index, content, boxes, memory, mask)
            contents.append(content)
            references.append(boxes)
            if index + 1 < len(heads):
                # The published models refine with the features before the last normalisation, but predict with those
                # after it; with weights trained that way it makes a difference.
                with torch.no_grad():
                    boxes = refine_boxes(boxes, head.regress(content))
        features, reference = torch.stack(contents), torch.stack(references)
        normed = self.norm(features)
        if self.look_forward_twice and torch.is_grad_enabled():
            # What refined the boxes, once more with its gradient: of all layers at once it takes few operations.
            changes, refining = regress(heads, torch.cat([normed, features], dim=1)).chunk(2, dim=1)
            reference = torch.cat([reference[:1], refine_boxes(reference, refining)[:-1]])
        else:
            changes = regress(heads, normed)
        return Prediction(classify(heads, normed), refine_boxes(reference, changes, self.published.prediction_eps))

    def look(self, index: int, content: Tensor, boxes: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:
        """Content [B, Q, embed_dim] of the queries after layer ``index``."""
        seen = on_padded_image(boxes, memory) if self.published.padded_query_positions else boxes
        position = self.position_head(encode_boxes(seen, content.shape[-1] // 2)).to(content.dtype)
        return self.run(index, content, position, boxes, memory, mask)


def on_padded_image(boxes: Tensor, memory: Memory) -> Tensor:
    """cxcywh boxes [B, Q, 4] relative to the padded image, of those relative to the unpadded one."""
    height, width = memory.spatial_shapes[0]
    rows, columns = memory.valid_sizes[:, 0].float().unbind(-1)
    return boxes * torch.stack([columns / width, rows / height], dim=-1).repeat(1, 2)[:, None]
