"""What happens to a step whose loss or gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import distributed
from engine.runs.diagnosis import StepRecord
from engine.step import OnHost, OptimizerStep
from ops.errors import describe_error
from structures import Batch, BatchSize, LossOutput

log = logging.getLogger(__name__)

MAX_DUMPS = 3
"""Non-finite steps that one process keeps on disk; each holds its batch and the weights."""


class DivergedError(RuntimeError):
    """Training stopped because a loss or gradient was not finite; the message says where it began."""


class TakenStep(NamedTuple):
    """A step of which it is not known yet whether it was finite; if it was not, the weights are still those it met."""

    step: int
    """0-based."""
    batches: list[Batch]
    """This process's micro-batches."""
    size: BatchSize
    """Of the global batch."""
    losses: Sequence[LossOutput]
    """Of each micro-batch."""
    scale: float
    """Of the loss, in fp16."""
    buffers: list[Tensor]
    """Of the model before the step, such as running statistics; empty where a step that is not finite ends the run."""
    norm: OnHost
    """Of the gradient, before clipping."""


class NonFiniteSteps:
    """Skips, counts, dumps, and after too many stops; on all processes alike."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], seed: int, allowed: int) -> None:
        """
        Args:
            directory: receives the dumps, from the process where the fault began.
            identity: of the run, for the dumps.
            seed: of the run.
            allowed: steps that may be skipped before training stops.
        """
        self.directory, self.identity, self.seed, self.allowed = directory, identity, seed, allowed
        self.counters = {"nonfinite_steps": 0, "overflows": 0}
        self._dumps = 0

    def buffers(self, model: nn.Module) -> list[Tensor]:
        """For ``TakenStep``: a forward pass writes running statistics, which a bad one would spoil for good."""
        return [buffer.clone() for buffer in model.buffers()] if self.allowed else []

    def handle(self, optimizer_step: OptimizerStep, taken: TakenStep) -> None:
        """Make a step that was not finite as if it had not been, and clear the gradients; by all processes together.

        Raises:
            DivergedError: if it is one more than allowed.
        """
        finite = all(distributed.gather(all(bool(torch.isfinite(loss.total)) for loss in taken.losses)))
        if optimizer_step.scaler.is_enabled() and taken.scale > 1 and finite:
            # Only the gradients overflow: ordinary life in fp16 while the loss scale finds its level.
            self.counters["overflows"] += 1
            count = self.counters["overflows"]
            log.info(
                "step %d: gradients overflow at loss scale %g, skipped (%d so far)", taken.step, taken.scale, count
            )
            optimizer_step.optimizer.zero_grad(set_to_none=True)
            return
        found = self._investigate(optimizer_step, taken)
        self.counters["nonfinite_steps"] += 1
        message = f"loss or gradient is not finite: {found}"
        if self.counters["nonfinite_steps"] > self.allowed:
            raise DivergedError(message)
        log.warning("%s; skipped, %d of %d", message, self.counters["nonfinite_steps"], self.allowed)

    def _investigate(self, optimizer_step: OptimizerStep, taken: TakenStep) -> str:
        """Run the step again, keep it where it went bad, and say what was found on which processes."""
        step, batches, size, _, scale, buffers, _ = taken
        record = StepRecord(self.seed, distributed.rank(), step, batches, size, optimizer_step.precision, scale)
        _restore(optimizer_step.module, buffers)
        diagnosis = record.run_again(optimizer_step.module, optimizer_step.criterion, optimizer_step.device)
        _restore(optimizer_step.module, buffers)
        begun_here = not diagnosis.is_finite
        # The others have only received the gradients. If nobody finds anything, everybody keeps the step.
        begun_somewhere = any(distributed.gather(begun_here))
        concerned = begun_here or not begun_somewhere
        text = f"step {record.step} on rank {record.rank}: {diagnosis.describe()}"
        if concerned and self._dumps < MAX_DUMPS:
            self._dumps += 1
            path = self.directory / f"nonfinite_step{record.step}_rank{record.rank}.pth"
            try:
                record.save(path, optimizer_step.module, diagnosis, self.identity)
                text += f" (to run it again: python -m tools.replay {path})"
            except OSError as error:
                text += f" (cannot keep it: {describe_error(error)})"
        return "; ".join(part for part in distributed.gather(text if concerned else "") if part)


def _restore(model: nn.Module, buffers: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=bool(buffers)):
            buffer.copy_(before)
