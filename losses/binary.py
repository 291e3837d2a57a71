"""What all classification losses share: one entry of each matched row is special, all others are negatives."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SMALLEST_BASE = 1e-12
_CPU_CHUNK = 1 << 16
"""Entries of logits that are computed at a time on a CPU."""


class Negatives(NamedTuple):
    """The loss of every entry that is not matched: scale·s^γ·BCE(s, 0)."""

    gamma: float
    """Exponent of the modulation, at least 0."""
    scale: float = 1.0
    """Factor."""
    detached: bool = False
    """Whether s^γ is a constant in the gradient."""


class ClassificationLoss:
    """Base of the classification losses: subclasses say what a matched entry costs, and what all others do.

    s is the sigmoid of a logit, u the IoU of the predicted box with its target, w the weight of the match, t the
    target that follows from them, always detached. Everything is computed from logits in float32 (float64 for float64
    logits), whatever the autocast state, and is finite with a finite gradient at any finite logit.
    """

    no_object: ClassVar[bool] = False
    """Whether the loss is a softmax whose last logit stands for "no object"; such a loss has a call of its own."""

    def negatives(self) -> Negatives:
        """Loss of the entries that are not matched."""
        raise NotImplementedError

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        """Loss [M] of the matched entries from their logits [M] (float32); other arguments as for the call."""
        raise NotImplementedError

    def quality(self, score: Tensor, iou: Tensor) -> Tensor:
        """By what the candidates of a target are ranked, best first: [M], detached; here the IoU.

        Args:
            score: [M] sigmoid of the logit of the target's class.
            iou: [M] of the predicted box with its target.
        """
        return iou.detach()

    def score(self, logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Score [M] of the target's class in the matched rows, detached; arguments as for the call."""
        return at_least_float32(logits.detach()[rows, labels]).sigmoid()

    def normaliser(self, num_targets: float | Tensor, num_queries: int, num_images: int) -> float | Tensor:
        """By what the loss of a layer is divided, summed over the global batch; here the number of targets.

        Args:
            num_targets: in the global batch, at least 1.
            num_queries: of the layer, in the global batch.
            num_images: in the global batch.
        """
        return num_targets

    def __call__(
        self,
        logits: Tensor,
        rows: Tensor,
        labels: Tensor,
        iou: Tensor,
        weight: Tensor | None = None,
        groups: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of each row.

        Args:
            logits: [N, C] of any floating type; a row is a query of a layer of an image.
            rows: [M] int64, the rows that are matched with a target, each at most once; all others are negatives.
            labels: [M] int64 in 0..C-1, the class of the target of each.
            iou: [M] in [0, 1], of the predicted box of each with its target.
            weight: [M] prime sample weights in (0, 1], which scale the targets t; None for 1.
            groups: [M] int64, the image (of a layer) each match belongs to, for losses that normalise within one;
                None if all are of one image.
            class_weights: [C] float32 factors of the entries of each class; None for 1.

        Returns:
            [N] float32 (float64 for float64 logits), summed over classes, not divided by anything.
        """
        with torch.autocast(logits.device.type, enabled=False):
            gamma, scale, detached = self.negatives()
            logits = at_least_float32(logits)
            negatives, matched = _NegativeRows.apply(logits, rows, labels, gamma, detached, class_weights)
            if scale != 1:
                negatives = negatives * scale
            if weight is not None:
                weight = weight.detach().to(matched.dtype)
            matched = self.matched(matched, iou.detach().to(matched.dtype), weight, groups)
            if class_weights is not None:
                matched = matched * class_weights[labels]
            return negatives.index_add(0, rows, matched)


class _NegativeRows(torch.autograd.Function):
    """Sum over each row of s^γ·BCE(s, 0) without the matched entries, and the logits of the matched entries.

    The gradient is computed along with the loss, in a third of the passes over [N, C] that autograd would take and
    with one saved tensor. The matched entries are cut out by a logit of −∞, where loss and gradient are exactly 0:
    subtracting them afterwards would lose the small terms beside one large one.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, gamma: float, detached: bool, columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        matched = logits[rows, labels]
        # A copy of the logits that chunk by chunk becomes the gradient: the only temporary of this size.
        buffer = logits.index_put((rows, labels), logits.new_full((), float("-inf")))
        sums = [_negatives(chunk, gamma, detached, columns) for chunk in buffer.split(_chunk_rows(buffer))]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(buffer, rows, labels)
        return torch.cat(sums), matched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_matched: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows, labels = ctx.saved_tensors
        gradient = gradient * grad_rows[:, None]
        gradient[rows, labels] = grad_matched  # each row is matched at most once
        return gradient, None, None, None, None, None


def _negatives(buffer: Tensor, gamma: float, detached: bool, columns: Tensor | None) -> Tensor:
    """Row sums [n] of s^γ·BCE(s, 0) of the logits in ``buffer`` [n, C], which are replaced by its gradient.

    Columns [C] are factors of each class; None for 1.
    """
    score = buffer.sigmoid()
    base = score.detach() if detached else score
    modulation = base * base if gamma == 2 else base.pow(gamma)
    loss = modulation * F.softplus(buffer)
    torch.mul(modulation, score, out=buffer)  # s^γ · dBCE/dx
    if not detached and gamma != 0:  # + γ·s^γ·(1−s)·BCE = γ·(loss − s·loss)
        buffer.add_(loss, alpha=gamma).sub_(score.mul_(loss), alpha=gamma)
    if columns is not None:
        buffer.mul_(columns)
        loss.mul_(columns)
    return loss.sum(1)


def _chunk_rows(buffer: Tensor) -> int:
    """Rows at a time: on a CPU so few that temporaries stay in its cache, elsewhere all."""
    rows, columns = buffer.shape
    return max(1, min(rows, _CPU_CHUNK // max(1, columns))) if buffer.device.type == "cpu" else max(1, rows)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precisions widened to float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for base ≥ 0, with a finite gradient at base = 0 for every exponent ≥ 0 (0^0 = 1)."""
    if exponent == 0:
        return torch.ones_like(base)
    if exponent == 1:
        return base
    if exponent == 2:
        return base * base
    return base.clamp(min=_SMALLEST_BASE).pow(exponent) if exponent < 1 else base.pow(exponent)


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """BCE(s, t) = −t·log s − (1−t)·log(1−s), elementwise from logits; finite at any logit."""
    return F.softplus(logit) - target * logit


def weighted(target: Tensor, weight: Tensor | None) -> Tensor:
    """w·t (prime sample weighting, arXiv 2304.07527), detached; t itself without weights."""
    target = target.detach()
    return target if weight is None else target * weight


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
