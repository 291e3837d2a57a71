"""From scores and boxes to detections: which queries, and where in pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ops.boxes import cxcywh_to_xyxy


def best_pairs(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``top_k`` of all (query, class) pairs (Deformable DETR, DINO); a query may be there for two classes.

    Args:
        scores: [B, Q, C].
        top_k: detections per image (fewer where Q·C is less).

    Returns:
        Score, label and query of each, best first: each [B, N].
    """
    num_queries, num_classes = scores.shape[-2:]
    values, index = scores.flatten(1).topk(min(top_k, num_queries * num_classes))
    return values, index % num_classes, index // num_classes


def best_classes(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best class of each query, of the best ``top_k`` queries (DETR): as :func:`best_pairs`."""
    best, labels = scores.max(-1)
    values, query = best.topk(min(top_k, scores.shape[1]))
    return values, labels.gather(1, query), query


def to_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """xyxy boxes [B, N, 4] in pixels, clipped to the image, of cxcywh boxes in [0, 1] and [B, 2] (height, width)."""
    corners = cxcywh_to_xyxy(boxes).clamp(0, 1)
    return corners * sizes.flip(-1).repeat(1, 2)[:, None].to(corners.dtype)


def without_duplicates(scores: Tensor, labels: Tensor, boxes: Tensor, nms_iou: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fast non-maximum suppression (arXiv 1904.02689): what a better detection of its class repeats gets score 0.

    Suppressed detections suppress others too: so there is no loop, and a GPU waits for nothing.

    Args:
        scores: [B, N], best first.
        labels: [B, N].
        boxes: [B, N, 4] xyxy.
        nms_iou: overlap up to which two detections are two objects.

    Returns:
        The three, best first again.
    """
    overlap = box_iou(boxes, boxes) * (labels[:, :, None] == labels[:, None])
    repeated = overlap.triu(diagonal=1).amax(dim=1) > nms_iou
    # What is dropped goes behind the rest, which stays in order (by distinct keys: a stable sort has no form in ONNX).
    places = torch.arange(scores.shape[1], device=scores.device)
    order = torch.where(repeated, places + scores.shape[1], places).argsort(dim=1)
    scores = scores.masked_fill(repeated, 0).gather(1, order)
    return scores, labels.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
