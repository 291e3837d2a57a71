"""From predictions to detections."""

from __future__ import annotations

import torch
from torch import Tensor

from structures import Detections, Prediction


def postprocess(prediction: Prediction, original_sizes: Tensor, top_k: int = 300) -> list[Detections]:
    """The best ``top_k`` of all (query, class) pairs, each with its query's box (Deformable DETR, DINO).

    Args:
        prediction: logits [B, Q, C], boxes [B, Q, 4] cxcywh in [0, 1] of the unpadded image.
        original_sizes: [B, 2] (height, width) in pixels to which the boxes are scaled.
        top_k: detections per image (fewer where Q·C is less).

    Returns:
        One :class:`Detections` per image, best first, boxes clipped to the image.
    """
    num_classes = prediction.logits.shape[-1]
    scores, index = prediction.logits.float().sigmoid().flatten(1).topk(min(top_k, prediction.logits[0].numel()))
    query = index.div(num_classes, rounding_mode="floor")
    boxes = prediction.boxes.float().gather(1, query[..., None].expand(-1, -1, 4))
    centre, size = boxes[..., :2], boxes[..., 2:]
    boxes_xyxy = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)
    boxes_xyxy = boxes_xyxy * original_sizes.flip(-1).to(boxes_xyxy.dtype).repeat(1, 2)[:, None]
    labels = index % num_classes
    return [Detections(s, c, b) for s, c, b in zip(scores, labels, boxes_xyxy, strict=True)]
