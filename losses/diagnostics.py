"""Scalars that describe the matching of a step: cheap, detached, without synchronisation.

Where there is nothing to average (a batch without targets), a value is 0 rather than NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.ranking import rank_within
from structures import Matches, Prediction


@torch.no_grad()
def matching_diagnostics(
    names: Sequence[str],
    candidates: Sequence[int],
    layer: Tensor,
    target: Tensor,
    rank: Tensor,
    score: Tensor,
    iou: Tensor,
    num_targets: int,
) -> dict[str, Tensor]:
    """How targets are matched in each of L layers.

    Args:
        names: of the layers.
        candidates: queries that a target may take in each layer.
        layer: [M] index of the layer of each matched pair.
        target: [M] index of its target.
        rank: [M] of each candidate among those of its target, 0 for the best.
        score: [M] of the target's class.
        iou: [M] of the predicted box with its target.
        num_targets: G in the batch.

    Returns:
        For each layer: ``candidates``, the mean number of queries of a matched target (the effective k);
        ``unmatched``, the number of targets without a query; ``iou_rank{r}`` and ``score_rank{r}``, means over the
        candidates of rank r; ``score_iou_correlation``, Spearman's over the matched queries (ties rank in order).
    """
    num_layers = len(names)
    in_layer = layer == torch.arange(num_layers, device=rank.device)[:, None]  # [L, M]
    count = in_layer.sum(-1)
    taken = torch.zeros(num_layers * num_targets, device=rank.device)
    # Not an assignment: in some versions, a number that is assigned is copied from the host.
    taken.index_fill_(0, layer * num_targets + target, 1)
    matched = taken.view(num_layers, num_targets).sum(-1)
    by_score, by_iou = rank_within(torch.stack([score, iou]), layer)
    difference = (by_score - by_iou).double().square()
    squares = torch.where(in_layer, difference, 0).sum(-1)
    correlation = torch.where(count > 1, 1 - 6 * squares / (count * (count * count - 1)).clamp(min=1), 0).float()

    ranks = torch.arange(max(candidates, default=1), device=rank.device)
    of_rank = in_layer & (rank == ranks[:, None, None])  # [K, L, M]
    members = of_rank.sum(-1).clamp(min=1)
    mean_iou, mean_score = (torch.where(of_rank, values, 0).sum(-1) / members for values in (iou, score))

    columns = {
        "candidates": count / matched.clamp(min=1),
        "unmatched": num_targets - matched,
        "score_iou_correlation": correlation,
    }
    described: dict[str, Tensor] = {}
    for column, values in columns.items():
        described |= {f"{name}/{column}": value for name, value in zip(names, values.unbind(0), strict=True)}
    for r, (ious, scores) in enumerate(zip(mean_iou, mean_score, strict=True)):
        for name, k, iou_of, score_of in zip(names, candidates, ious.unbind(0), scores.unbind(0), strict=True):
            if r < k:
                described |= {f"{name}/iou_rank{r}": iou_of, f"{name}/score_rank{r}": score_of}
    return described


@torch.no_grad()
def instability(supervised: Sequence[tuple[Sequence[str], Prediction, Matches]]) -> dict[str, Tensor]:
    """How many queries change their target from one layer to the next.

    The index vector of a layer holds the target of each query, or −1 (DN-DETR, arXiv 2203.01305, section 3.1, which
    compares it between epochs; here between layers). Instability is the share of queries whose entry differs from
    that of the layer before, among those that are matched in either of the two.

    Args:
        supervised: names of the layers, prediction [L, B, Q, ·] and matches of each supervision whose queries stand
            for the same objects; the first layer of one is compared with the last of the one before if Q is equal.

    Returns:
        ``{layer}/instability`` of every layer that has a layer before it.
    """
    described: dict[str, Tensor] = {}
    before: Tensor | None = None
    for names, prediction, matches in supervised:
        target = torch.full(prediction.logits.shape[:3], -1, device=matches.target.device)
        target[matches.layer, matches.image, matches.query] = matches.target
        if before is not None and before.shape == target.shape[1:]:
            target, names = torch.cat((before[None], target)), ["", *names]
        before = target[-1]
        if len(target) == 1:
            continue
        changed = (target[:-1] != target[1:]).sum((1, 2))
        matched = target >= 0
        involved = (matched[:-1] | matched[1:]).sum((1, 2))
        for name, value in zip(names[1:], (changed / involved.clamp(min=1)).unbind(0), strict=True):
            described[f"{name}/instability"] = value
    return described
