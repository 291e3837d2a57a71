"""What is supervised, by what: every group of queries of a detector through the same code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.balance import Balance, balanced_weights
from losses.boxes import OverlapLoss, box_losses
from losses.classification import Classification
from losses.diagnostics import instability, matching_diagnostics
from losses.focal import Focal
from losses.pairs import Pairs, collect_pairs, matches_of
from losses.ranking import prime_sample_weights, rank_within
from losses.unlabelled import Unlabelled, without_unlabelled
from matchers import Hungarian, LayerwiseMatcher, Matcher, SoftmaxCost, match_groups
from structures import DetectorOutputs, LossOutput, Prediction, QueryGroup, Targets


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


@dataclass(frozen=True, kw_only=True)
class GroupSupervision:
    """How the supervision of one group of queries differs from that of the others."""

    matcher: Matcher | None = None
    """A matcher for this group alone; null for the criterion's, which treats all its groups together."""
    weight: float = 1.0
    """Factor of all losses of the group in the total."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"criterion.groups: a weight must not be negative, found {self.weight}")


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
    prime_sample_terms: tuple[Literal["class", "bbox", "giou"], ...] = ("class", "bbox", "giou")
    """The terms in which ranks weigh; giou stands for whichever overlap loss ``overlap`` picks."""
    overlap: OverlapLoss = "giou"
    """Overlap loss of boxes, beside L1."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Factors of the terms in the total."""
    groups: dict[str, GroupSupervision] = field(default_factory=dict)
    """What is different for a group of queries, by the group's name, such as one_to_many or denoising."""
    query_groups: int = 1
    """Parts of the queries that are each matched with all targets (Group-DETR, arXiv 2207.13085): all terms are
    divided by this as well."""
    unlabelled: Unlabelled = "background"
    """Whether queries in crowds and ignored regions, and classes that an image says nothing about, count as background,
    as published, or are ignored."""
    class_weights: tuple[float, ...] | Balance | None = None
    """Factors of the entries of each class in the classification loss: a list, or found from the training data as the
    inverse of the classes' frequency or of its root; null for 1."""

    def __post_init__(self) -> None:
        if self.prime_sample_tau is not None and not self.prime_sample_tau > 0:
            raise ValueError(f"criterion.prime_sample_tau must be positive or null, not {self.prime_sample_tau}")
        if self.query_groups < 1:
            raise ValueError(f"criterion.query_groups must be at least 1, not {self.query_groups}")
        if isinstance(self.class_weights, tuple) and min(self.class_weights, default=-1.0) < 0:
            raise ValueError("criterion.class_weights must be a list of numbers that are not negative")

    def for_classes(self, counts: Sequence[int]) -> Criterion:
        """This criterion with numbers as ``class_weights``, from how many targets of each class the data hold.

        Raises:
            ValueError: the weights given are not one for each class.
        """
        if isinstance(self.class_weights, str):
            return dataclasses.replace(self, class_weights=balanced_weights(self.class_weights, counts))
        if self.class_weights is not None and len(self.class_weights) != len(counts):
            given = len(self.class_weights)
            raise ValueError(f"criterion.class_weights lists {given} numbers, but the data have {len(counts)} classes")
        return self

    def check(self, found: Mapping[str, int], given: tuple[str, ...] = (), no_object: bool = False) -> None:
        """Raise ValueError if the criterion does not fit a detector.

        Args:
            found: layers of each group whose matches the matcher finds, in the order of supervision.
            given: names of the groups whose matches are known beforehand.
            no_object: whether the detector's last logit stands for "no object", under a softmax.
        """
        if self.classification.no_object != no_object:
            kind = 'has a logit for "no object"' if no_object else 'has no logit for "no object"'
            raise ValueError(f"criterion.classification: {self.classification.name} does not fit: the detector {kind}")
        for matcher in (self.matcher, *(group.matcher for group in self.groups.values())):
            if matcher is not None and isinstance(matcher.cost, SoftmaxCost) != no_object:
                raise ValueError(f"criterion: the matching cost {matcher.cost.name} is not for its scores")
        for name, supervision in self.groups.items():
            if name not in (*found, *given):
                known = ", ".join((*found, *given))
                raise ValueError(f"criterion.groups: the detector has no group '{name}', but {known}")
            if name in given and supervision.matcher is not None:
                raise ValueError(f"criterion.groups.{name}.matcher: the matches of this group are known beforehand")
        self._candidates(found)

    def __call__(
        self,
        outputs: DetectorOutputs,
        targets: Targets,
        num_targets: float | Tensor | None = None,
        num_images: int | None = None,
    ) -> LossOutput:
        """Losses of a batch, computed in float32 whatever the autocast state.

        Args:
            outputs: of a detector, with any groups of queries.
            targets: of the same images, on the same device; labels in 0..C-1. Never modified.
            num_targets: number of targets in the global batch (over processes and accumulation steps), the
                normaliser of all terms, taken as 1 if it is less; None for that of ``targets``.
            num_images: number of images in the global batch, for losses that average over queries; None for that of
                ``targets``.

        Returns:
            total with gradient; detached terms and diagnostics by layer. Terms are unweighted.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite; names group, layer and image.
            ValueError: the matcher lists candidates for another number of layers.
        """
        with torch.autocast(targets.boxes.device.type, enabled=False):
            groups, candidates = self.match(outputs.groups, targets)
            pairs = collect_pairs(list(groups.values()), targets, self.classification.score)
            rank, weight = self._rank(pairs, len(targets.labels), [groups[name] for name in candidates])
            normaliser = _normaliser(num_targets, targets)
            images = len(targets.counts) if num_images is None else num_images
            class_sums = self._class_sums(pairs, targets, weight, normaliser, images)
            sums = torch.cat([class_sums[None], self._box_sums(groups, pairs, weight) / normaliser])  # [3, layers]
            weights = (self.weights.classification, self.weights.bbox, self.weights.giou)
            in_total = self._in_total(groups, targets.boxes)
            parts = (sums if in_total is None else sums * in_total).sum(1).unbind(0)
            total = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum()
            names = [layer for name, group in groups.items() for layer in _layer_names(name, group)]
            terms = {
                f"{layer}/{name}": value
                for name, values in zip(("class", "bbox", self.overlap), sums.detach().unbind(0), strict=True)
                for layer, value in zip(names, values.unbind(0), strict=True)
            }
            found = {name: groups[name] for name in candidates}
            described = _describe(found, candidates, pairs, rank, len(targets.labels))
            return LossOutput(total, terms, described)

    def _candidates(self, layers: Mapping[str, int]) -> tuple[dict[str, LayerwiseMatcher], dict[str, tuple[int, ...]]]:
        """Matcher of each group, and the most queries a target may take in each layer, of groups without matches."""
        own = {name: group.matcher for name, group in self.groups.items() if group.matcher and name in layers}
        shared = {name: count for name, count in layers.items() if name not in own}
        found = self.matcher.candidates_by_layer(shared)
        for name, matcher in own.items():
            found |= matcher.candidates_by_layer({name: layers[name]})
        return {name: own.get(name, self.matcher) for name in layers}, {name: found[name] for name in layers}

    def match(
        self, groups: Mapping[str, QueryGroup], targets: Targets
    ) -> tuple[dict[str, QueryGroup], dict[str, tuple[int, ...]]]:
        """All groups with their matches, those whose matches were found here first, and the latter's candidates."""
        groups = {name: _without_padding(group) for name, group in groups.items()}
        layers = {name: len(group.prediction.logits) for name, group in groups.items() if group.matches is None}
        matchers, candidates = self._candidates(layers)
        matches = match_groups(groups, matchers, candidates, targets)
        found = {name: groups[name]._replace(matches=matches[name]) for name in layers}
        return found | {name: group for name, group in groups.items() if name not in found}, candidates

    def _rank(self, pairs: Pairs, num_targets: int, found: Sequence[QueryGroup]) -> tuple[Tensor, Tensor | None]:
        """Rank of each pair of the first groups among the candidates of its target; weights of all (None: equal)."""
        ranked = slice(sum(len(matches_of(group).target) for group in found))
        quality = self.classification.quality(pairs.score[ranked], pairs.iou[ranked])
        rank = rank_within(quality, (pairs.layer * num_targets + pairs.target)[ranked])
        if self.prime_sample_tau is None:
            return rank, None
        weight = prime_sample_weights(rank, self.prime_sample_tau, pairs.iou.dtype)
        return rank, F.pad(weight, (0, len(pairs.iou) - len(rank)), value=1.0)

    def _class_sums(
        self,
        pairs: Pairs,
        targets: Targets,
        weight: Tensor | None,
        num_targets: float | Tensor,
        num_images: int,
    ) -> Tensor:
        """Normalised classification loss of each layer of all groups."""
        sums, divide_by = [], self.classification.normaliser
        unweighted = weight is None or "class" not in self.prime_sample_terms
        weights = [None] * len(pairs.blocks) if weight is None or unweighted else pairs.split(weight)
        of_classes = self._class_weights(targets.boxes)
        ignored = self.unlabelled == "ignored" and targets.unlabelled is not None
        for block, iou, own in zip(pairs.blocks, pairs.split(pairs.iou), weights, strict=True):
            logits = without_unlabelled(block, targets) if ignored else block.logits
            columns = None if block.class_agnostic else of_classes
            losses = self.classification(logits, block.rows, block.labels, iou, own, block.images, columns)
            for group, part in zip(block.groups, block.split(losses), strict=True):
                part = part if group.valid is None else part * group.valid
                summed = part.sum((1, 2)) if group.image_scale is None else (part.sum(2) * group.image_scale).sum(1)
                sums.append(summed / divide_by(num_targets, num_images * part.shape[-1], num_images))
        return torch.cat(sums) if self.query_groups == 1 else torch.cat(sums) / self.query_groups

    def _class_weights(self, like: Tensor) -> Tensor | None:
        if isinstance(self.class_weights, str):
            raise ValueError(f"criterion.class_weights={self.class_weights} needs the data's counts: call for_classes")
        return None if self.class_weights is None else like.new_tensor(self.class_weights)

    def _box_sums(self, groups: Mapping[str, QueryGroup], pairs: Pairs, weight: Tensor | None) -> Tensor:
        """Summed L1 and overlap losses of each layer of all groups, [2, layers]."""
        losses = torch.stack(box_losses(pairs.boxes, pairs.target_boxes, self.overlap, pairs.overlap))  # [2, M]
        if weight is not None:
            ones = torch.ones_like(weight)
            losses = losses * torch.stack([weight if t in self.prime_sample_terms else ones for t in ("bbox", "giou")])
        if self.query_groups != 1:
            losses = losses / self.query_groups
        if pairs.scale is not None:
            losses = losses * pairs.scale
        # A masked sum instead of index_add: the same bits in every run, on every device.
        num_layers = sum(len(group.prediction.logits) for group in groups.values())
        index = torch.arange(num_layers, device=losses.device)[:, None]
        return losses[:, None].masked_fill(pairs.layer != index, 0).sum(-1)

    def _in_total(self, groups: Mapping[str, QueryGroup], like: Tensor) -> Tensor | None:
        """Factor of each layer of all groups; None if none is weighted."""
        if all(group.weight == 1 for group in self.groups.values()):
            return None
        weights = {name: group.weight for name, group in self.groups.items()}
        return torch.cat([like.new_full((len(g.prediction.logits),), weights.get(n, 1.0)) for n, g in groups.items()])


def _layer_names(name: str, group: QueryGroup) -> list[str]:
    """encoder; decoder.0, decoder.1, …: the encoder's proposals are no layers."""
    return [name] if name == "encoder" else [f"{name}.{i}" for i in range(len(group.prediction.logits))]


def _without_padding(group: QueryGroup) -> QueryGroup:
    """The group with constants where it is not valid: whatever stands there is replaced, not multiplied by 0."""
    if group.valid is None:
        return group
    padding = ~group.valid[..., None]
    logits, boxes = group.prediction
    return group._replace(prediction=Prediction(logits.masked_fill(padding, 0), boxes.masked_fill(padding, 0.5)))


def _describe(
    found: Mapping[str, QueryGroup],
    candidates: Mapping[str, tuple[int, ...]],
    pairs: Pairs,
    rank: Tensor,
    num_targets: int,
) -> dict[str, Tensor]:
    """Diagnostics of the groups whose matches were found here."""
    if not found:
        return {}
    names = {name: _layer_names(name, group) for name, group in found.items()}
    first = slice(len(rank))
    described = matching_diagnostics(
        [layer for layers in names.values() for layer in layers],
        [k for name in names for k in candidates[name]],
        pairs.layer[first],
        pairs.target[first],
        rank,
        pairs.score[first],
        pairs.iou[first],
        num_targets,
    )
    return described | instability(
        [(names[name], group.prediction, matches_of(group)) for name, group in found.items()]
    )


def _normaliser(num_targets: float | Tensor | None, targets: Targets) -> float | Tensor:
    if isinstance(num_targets, Tensor):
        return num_targets.detach().float().clamp(min=1)
    return max(float(len(targets.labels) if num_targets is None else num_targets), 1.0)
