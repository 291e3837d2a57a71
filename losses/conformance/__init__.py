"""Tests of any detection loss ``loss(logits, boxes, targets) → scalar`` on plain tensors.

``check(loss)`` runs them all; ``python -m tools.check_loss module:function`` does from the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from losses.conformance.invariance import INVARIANCES
from losses.conformance.numerics import NUMERICS
from losses.conformance.problem import Finding, Loss, PlainLoss
from losses.criterion import Criterion
from ops.errors import describe_error
from structures import DetectorOutputs, Prediction, QueryGroup, Targets

__all__ = ["TESTS", "Finding", "PlainLoss", "Report", "check", "of_criterion"]

TESTS = {**NUMERICS, **INVARIANCES}
"""All tests by name."""


@dataclass(frozen=True)
class Report:
    """All findings on one loss."""

    loss: str
    """Its name."""
    findings: tuple[Finding, ...]
    """In the order of the tests."""

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are faults."""
        return tuple(finding for finding in self.findings if finding.verdict == "fault")

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {"loss": self.loss, "faults": len(self.faults), "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        lines = [f"{f.verdict:5}  {f.test}: {f.sentence}" for f in self.findings]
        return "\n".join([f"{self.loss}: {len(self.faults)} faults in {len(self.findings)} findings", *lines])


def check(
    loss: PlainLoss,
    *,
    name: str | None = None,
    fields: Mapping[str, Sequence[Any]] | None = None,
    num_logits: int = 4,
    no_object: bool = False,
) -> Report:
    """Test a detection loss from outside, as a function that matches, sums and normalises.

    Args:
        loss: called with logits [B, Q, C], boxes [B, Q, 4] (cxcywh in [0, 1]) and targets, a list of B dictionaries of
            ``labels`` [n] int64 and ``boxes`` [n, 4]; returns a scalar. If it takes ``num_targets`` or ``num_images``,
            these are the numbers of the global batch, by which the loss of a part of it is to be normalised.
        name: how the report calls it; by default as Python does.
        fields: keyword arguments of ``loss`` and the values to try for each.
        num_logits: C.
        no_object: whether the last logit means "no object", as under a softmax.

    Returns:
        Findings in sentences and numbers; a test that the loss cannot even run is a finding too.
    """
    subject, findings = Loss(loss, dict(fields or {}), num_logits, no_object), list[Finding]()
    for title, test in TESTS.items():
        try:
            findings += test(subject)
        except Exception as error:  # whatever somebody's loss raises is what the report is about
            findings.append(
                Finding(title, "fault", f"It raises {type(error).__name__} here: {describe_error(error):.160}")
            )
    return Report(name or str(getattr(loss, "__qualname__", loss)), tuple(findings))


def of_criterion(criterion: Criterion) -> PlainLoss:
    """A criterion as a function of plain tensors; further arguments replace fields of its classification loss."""

    def loss(
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        num_targets: float | None = None,
        num_images: int | None = None,
        **fields: Any,
    ) -> Tensor:
        own = dataclasses.replace(criterion, classification=dataclasses.replace(criterion.classification, **fields))
        labels, target_boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        joined = Targets(labels, target_boxes, tuple(len(target["labels"]) for target in targets))
        outputs = DetectorOutputs({"decoder": QueryGroup(Prediction(logits[None], boxes[None]))})
        return own(outputs, joined, num_targets, num_images).total

    return loss
