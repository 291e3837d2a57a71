"""What is supervised, by what: decoder layers, encoder output and denoising queries through the same code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from losses.boxes import OverlapLoss, box_losses
from losses.classification import Classification
from losses.diagnostics import instability, matching_diagnostics
from losses.entries import at_least_float32
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


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
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
        device = outputs.decoder.logits.device
        with torch.autocast(device.type, enabled=False):
            supervisions = self._match(outputs, targets)
            normaliser = _normaliser(num_targets, targets)
            total = torch.zeros((), device=device)
            terms: dict[str, Tensor] = {}
            diagnostics: dict[str, Tensor] = {}
            for supervision in supervisions:
                (classification, bbox, overlap), described = self._losses(supervision, targets)
                for name, weight, sums in (
                    ("class", self.weights.classification, classification / normaliser),
                    ("bbox", self.weights.bbox, bbox / normaliser),
                    (self.overlap, self.weights.giou, overlap / normaliser),
                ):
                    total = total + weight * sums.sum()
                    values = sums.detach().unbind(0)
                    terms |= {f"{layer}/{name}": v for layer, v in zip(supervision.layers, values, strict=True)}
                diagnostics |= described
            diagnostics |= instability([s[:3] for s in supervisions if s.candidates])
            return LossOutput(total, terms, diagnostics)

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

    def _losses(
        self, supervision: _Supervision, targets: Targets
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Sums [L] of classification, L1 and overlap losses over a supervision's images, and its diagnostics."""
        (logits, boxes), matches = supervision.prediction, supervision.matches
        num_layers, num_images, num_queries, num_classes = logits.shape
        logits = logits.reshape(-1, num_classes)
        groups = matches.layer * num_images + matches.image
        rows = groups * num_queries + matches.query
        labels = targets.labels[matches.target]
        matched_boxes = at_least_float32(boxes.reshape(-1, 4)[rows])
        target_boxes = targets.boxes[matches.target].to(matched_boxes.dtype)

        weight, described = None, {}
        iou = paired_iou(cxcywh_to_xyxy(matched_boxes.detach()), cxcywh_to_xyxy(target_boxes))
        if supervision.candidates:
            score = at_least_float32(logits.detach()[rows, labels]).sigmoid()
            of_target = matches.layer * len(targets.labels) + matches.target
            rank = rank_within(self.classification.quality(score, iou), of_target)
            if self.prime_sample_tau is not None:
                weight = prime_sample_weights(rank, self.prime_sample_tau, iou.dtype)
            described = matching_diagnostics(
                supervision.layers, supervision.candidates, matches, rank, score, iou, len(targets.labels)
            )

        row_losses = self.classification(logits, rows, labels, iou, weight, groups)
        row_losses = row_losses.view(num_layers, num_images, num_queries)
        pair_losses = torch.stack(box_losses(matched_boxes, target_boxes, self.overlap))  # [2, M]
        if weight is not None:
            pair_losses = pair_losses * weight
        if supervision.valid is not None:
            row_losses = row_losses.where(supervision.valid, 0)
        image_losses = row_losses.sum(-1)
        if supervision.image_scale is not None:
            image_losses = image_losses * supervision.image_scale
            pair_losses = pair_losses * supervision.image_scale[matches.image]
        # A masked sum instead of index_add: the same bits in every run, on every device.
        in_layer = matches.layer == torch.arange(num_layers, device=matches.layer.device)[:, None]
        bbox, overlap = torch.where(in_layer, pair_losses[:, None], 0).sum(-1)
        return (image_losses.sum(-1), bbox, overlap), described


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
