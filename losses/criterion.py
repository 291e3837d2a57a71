"""What is supervised, by what: decoder layers, encoder output and denoising queries through the same code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.binary import at_least_float32
from losses.boxes import OverlapLoss, box_losses
from losses.classification import Classification
from losses.diagnostics import instability, matching_diagnostics
from losses.focal import Focal
from losses.ranking import prime_sample_weights, rank_within
from matchers import Hungarian, Matcher
from ops.boxes import cxcywh_to_xyxy, paired_iou
from structures import Denoising, DetectorOutputs, LossOutput, Matches, Prediction, Targets


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors of the terms in the total."""

    classification: float = 1.0
    """Weight of the classification loss."""
    bbox: float = 5.0
    """Weight of the L1 loss of boxes."""
    giou: float = 2.0
    """Weight of the overlap loss of boxes, whichever ``criterion.overlap`` picks."""

    def __post_init__(self) -> None:
        if min(self.classification, self.bbox, self.giou) < 0:
            raise ValueError("criterion.weights must not be negative")


class _Supervision(NamedTuple):
    """Predictions that are supervised together: [L, B, Q, ·] and their matches."""

    layers: list[str]
    """Their L names, such as decoder.5."""
    prediction: Prediction
    matches: Matches
    candidates: tuple[int, ...] | None
    """Queries that a target may take in each layer; None if the matches are given, not found: then they are neither
    ranked nor described."""
    image_scale: Tensor | None = None
    """[B] factor of the losses of each image; None for 1."""
    valid: Tensor | None = None
    """[B, Q] False where a query is not supervised; None for everywhere."""


class _Pairs(NamedTuple):
    """M matched pairs of all supervisions in their order: those that are ranked come first."""

    layer_names: list[str]
    """Of all supervisions."""
    ranked: int
    """How many pairs are ranked."""
    layer: Tensor
    """[M] index into ``layer_names``."""
    rows: list[Tensor]
    """For each supervision, indices of its pairs into its [L·B·Q] rows."""
    target: Tensor
    label: Tensor
    score: Tensor
    """[M] of the target's class, detached."""
    iou: Tensor
    """[M] of the predicted box with its target, detached."""
    boxes: Tensor
    """[M, 4] predicted."""
    target_boxes: Tensor
    scale: Tensor | None
    """[M] factor of each pair's losses; None for 1."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The criterion: ``criterion(outputs, targets)`` gives the losses. Its defaults are those of DINO.

    Every term is a sum over queries (of boxes: over matches), divided by the number of targets.
    """

    classification: Classification = field(default_factory=Focal)
    """Loss of the class logits."""
    matcher: Matcher = field(default_factory=Hungarian)
    """Which queries are matched with which targets."""
    prime_sample_tau: float | None = None
    """Prime sample weighting (arXiv 2304.07527, section 3.4): the candidate of rank r of a target (0 is the best)
    weighs e^(−r/τ); null for equal weights. Denoising queries are not ranked."""
    overlap: OverlapLoss = "giou"
    """Overlap loss of boxes, beside L1."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Factors of the terms in the total."""

    def __post_init__(self) -> None:
        if self.prime_sample_tau is not None and not self.prime_sample_tau > 0:
            raise ValueError(f"criterion.prime_sample_tau must be positive or null, not {self.prime_sample_tau}")

    def check(self, num_decoder_layers: int, has_encoder_output: bool) -> None:
        """Raise ValueError if the matcher does not fit a model of this many supervised layers."""
        self.matcher.layer_candidates(num_decoder_layers + has_encoder_output)

    def __call__(
        self, outputs: DetectorOutputs, targets: Targets, num_targets: float | Tensor | None = None
    ) -> LossOutput:
        """Losses of a batch, computed in float32 whatever the autocast state.

        Args:
            outputs: of a detector; the encoder output and the denoising queries may be missing.
            targets: of the same images, on the same device; labels in 0..C-1. Never modified.
            num_targets: number of targets in the global batch (over processes and accumulation steps), the
                normaliser of all terms, taken as 1 if it is less; None for that of ``targets``.

        Returns:
            total with gradient; detached terms and diagnostics by layer. Terms are unweighted.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite; names supervision, layer and image.
            ValueError: the matcher lists candidates for another number of layers.
        """
        with torch.autocast(outputs.decoder.logits.device.type, enabled=False):
            supervisions = self._match(outputs, targets)
            pairs = _collect_pairs(supervisions, targets)
            rank, weight = self._rank(pairs, targets)
            normaliser = _normaliser(num_targets, targets)
            sums = {
                "class": self._classification_sums(supervisions, pairs, weight) / normaliser,
                **{name: values / normaliser for name, values in self._box_sums(pairs, weight).items()},
            }
            weights = (self.weights.classification, self.weights.bbox, self.weights.giou)
            total = torch.stack([w * s.sum() for w, s in zip(weights, sums.values(), strict=True)]).sum()
            terms = {
                f"{layer}/{name}": value
                for name, values in sums.items()
                for layer, value in zip(pairs.layer_names, values.detach().unbind(0), strict=True)
            }
            return LossOutput(total, terms, _describe(supervisions, pairs, rank, len(targets.labels)))

    def _match(self, outputs: DetectorOutputs, targets: Targets) -> list[_Supervision]:
        """Everything that is supervised, with its matches: encoder output, decoder layers, denoising queries."""
        names = {"decoder": [f"decoder.{i}" for i in range(outputs.decoder.logits.shape[0])]}
        predictions = {"decoder": outputs.decoder}
        if outputs.encoder is not None:
            logits, boxes = outputs.encoder
            predictions = {"encoder": Prediction(logits[None], boxes[None]), **predictions}
            names["encoder"] = ["encoder"]
        denoising = [] if outputs.denoising is None else [_denoising_supervision(outputs.denoising)]
        watched = {"denoising": denoising[0].prediction} if denoising else None
        found = self.matcher.match(predictions, targets, watched)
        candidates = self.matcher.layer_candidates(sum(len(layers) for layers in names.values()))
        supervisions = []
        for name, prediction in predictions.items():
            own, candidates = candidates[: len(names[name])], candidates[len(names[name]) :]
            supervisions.append(_Supervision(names[name], prediction, found[name], own))
        return supervisions + denoising

    def _rank(self, pairs: _Pairs, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """Rank of each ranked pair among the candidates of its target, and weights of all pairs (None: equal)."""
        quality = self.classification.quality(pairs.score[: pairs.ranked], pairs.iou[: pairs.ranked])
        rank = rank_within(quality, (pairs.layer * len(targets.labels) + pairs.target)[: pairs.ranked])
        if self.prime_sample_tau is None:
            return rank, None
        weight = prime_sample_weights(rank, self.prime_sample_tau, pairs.iou.dtype)
        return rank, F.pad(weight, (0, len(pairs.iou) - pairs.ranked), value=1.0)

    def _classification_sums(self, supervisions: list[_Supervision], pairs: _Pairs, weight: Tensor | None) -> Tensor:
        """Summed classification loss of each layer of all supervisions."""
        sums, first = [], 0
        for supervision, rows in zip(supervisions, pairs.rows, strict=True):
            own = slice(first, first + len(rows))
            first += len(rows)
            logits, matches = supervision.prediction.logits, supervision.matches
            losses = self.classification(
                logits.reshape(-1, logits.shape[-1]),
                rows,
                pairs.label[own],
                pairs.iou[own],
                None if weight is None else weight[own],
                matches.layer * logits.shape[1] + matches.image,
            ).view(logits.shape[:-1])
            if supervision.valid is not None:
                losses = losses.where(supervision.valid, 0)
            losses = losses.sum(-1)
            sums.append((losses if supervision.image_scale is None else losses * supervision.image_scale).sum(-1))
        return torch.cat(sums)

    def _box_sums(self, pairs: _Pairs, weight: Tensor | None) -> dict[str, Tensor]:
        """Summed L1 and overlap losses of each layer of all supervisions."""
        losses = torch.stack(box_losses(pairs.boxes, pairs.target_boxes, self.overlap))  # [2, M]
        if weight is not None:
            losses = losses * weight
        if pairs.scale is not None:
            losses = losses * pairs.scale
        # A masked sum instead of index_add: the same bits in every run, on every device.
        index = torch.arange(len(pairs.layer_names), device=losses.device)[:, None]
        bbox, overlap = torch.where(pairs.layer == index, losses[:, None], 0).sum(-1)
        return {"bbox": bbox, self.overlap: overlap}


def _collect_pairs(supervisions: list[_Supervision], targets: Targets) -> _Pairs:
    """The matched pairs of all supervisions, so that what concerns pairs is computed once for all."""
    layer, rows, boxes, logits, scale = [], [], [], [], []
    names: list[str] = []
    for supervision in supervisions:
        prediction, matches = supervision.prediction, supervision.matches
        _, num_images, num_queries, num_classes = prediction.logits.shape
        own = (matches.layer * num_images + matches.image) * num_queries + matches.query
        layer.append(matches.layer + len(names))
        rows.append(own)
        boxes.append(at_least_float32(prediction.boxes.reshape(-1, 4)[own]))
        entry = prediction.logits.detach().reshape(-1, num_classes)[own, targets.labels[matches.target]]
        logits.append(at_least_float32(entry))
        if supervision.image_scale is not None:
            scale.append(supervision.image_scale[matches.image])
        names += supervision.layers
    target = torch.cat([supervision.matches.target for supervision in supervisions])
    matched, target_boxes = torch.cat(boxes), targets.boxes[target].to(boxes[0].dtype)
    num_unscaled = len(target) - sum(len(part) for part in scale)
    return _Pairs(
        layer_names=names,
        ranked=sum(len(own) for own, s in zip(rows, supervisions, strict=True) if s.candidates),
        layer=torch.cat(layer),
        rows=rows,
        target=target,
        label=targets.labels[target],
        score=torch.cat(logits).sigmoid(),
        iou=paired_iou(cxcywh_to_xyxy(matched.detach()), cxcywh_to_xyxy(target_boxes)),
        boxes=matched,
        target_boxes=target_boxes,
        scale=F.pad(torch.cat(scale), (num_unscaled, 0), value=1.0) if scale else None,
    )


def _describe(supervisions: list[_Supervision], pairs: _Pairs, rank: Tensor, num_targets: int) -> dict[str, Tensor]:
    """Diagnostics of the supervisions whose matches were found here."""
    found = [supervision for supervision in supervisions if supervision.candidates]
    candidates = [k for supervision in found for k in supervision.candidates or ()]
    first = slice(pairs.ranked)
    described = matching_diagnostics(
        pairs.layer_names[: len(candidates)],
        candidates,
        pairs.layer[first],
        pairs.target[first],
        rank,
        pairs.score[first],
        pairs.iou[first],
        num_targets,
    )
    return described | instability([supervision[:3] for supervision in found])


def _denoising_supervision(denoising: Denoising) -> _Supervision:
    """Denoising queries with their given matches; whatever padding queries hold is replaced, not multiplied by 0."""
    padding = ~denoising.valid[..., None]
    logits, boxes = denoising.decoder
    prediction = Prediction(logits.masked_fill(padding, 0), boxes.masked_fill(padding, 0.5))
    return _Supervision(
        layers=[f"denoising.{i}" for i in range(logits.shape[0])],
        prediction=prediction,
        matches=denoising.matches,
        candidates=None,
        image_scale=1 / denoising.num_groups.float().clamp(min=1),
        valid=denoising.valid,
    )


def _normaliser(num_targets: float | Tensor | None, targets: Targets) -> float | Tensor:
    if isinstance(num_targets, Tensor):
        return num_targets.detach().float().clamp(min=1)
    return max(float(len(targets.labels) if num_targets is None else num_targets), 1.0)
