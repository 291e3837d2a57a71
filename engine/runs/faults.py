"""What happens to a step whose loss or gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.runs.diagnosis import StepRecord
from engine.step import OptimizerStep
from structures import Batch, BatchSize, LossOutput

log = logging.getLogger(__name__)

MAX_DUMPS = 3
"""Non-finite steps that one process keeps on disk; each holds its batch and the weights."""


class DivergedError(RuntimeError):
    """Training stopped because a loss or gradient was not finite; the message says where it began."""


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
        self._buffers: list[Tensor] = []

    def remember_buffers(self, model: nn.Module) -> None:
        """Called before each step: a forward pass writes running statistics, which a bad one would spoil for good."""
        if self.allowed:
            self._buffers = [buffer.clone() for buffer in model.buffers()]

    def _restore_buffers(self, model: nn.Module) -> None:
        if self._buffers:
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), self._buffers, strict=True):
                    buffer.copy_(before)

    def handle(
        self,
        optimizer_step: OptimizerStep,
        step: int,
        batches: list[Batch],
        size: BatchSize,
        losses: Sequence[LossOutput],
    ) -> None:
        """Skip the step; called by all processes together.

        Raises:
            DivergedError: if it is one more than allowed.
        """
        scale = float(optimizer_step.scaler.get_scale())
        finite = all(distributed.gather(all(bool(torch.isfinite(loss.total)) for loss in losses)))
        if optimizer_step.scaler.is_enabled() and scale > 1 and finite:
            # Only the gradients overflow: ordinary life in fp16 while the loss scale finds its level.
            self.counters["overflows"] += 1
            count = self.counters["overflows"]
            log.info("step %d: gradients overflow at loss scale %g, skipped (%d so far)", step, scale, count)
            optimizer_step.skip()
            return
        record = StepRecord(self.seed, distributed.rank(), step, batches, size, optimizer_step.precision, scale)
        found = self._investigate(optimizer_step, record)
        optimizer_step.skip()
        self.counters["nonfinite_steps"] += 1
        message = f"loss or gradient is not finite: {found}"
        if self.counters["nonfinite_steps"] > self.allowed:
            raise DivergedError(message)
        log.warning("%s; skipped, %d of %d", message, self.counters["nonfinite_steps"], self.allowed)

    def _investigate(self, optimizer_step: OptimizerStep, record: StepRecord) -> str:
        """Run the step again, keep it where it went bad, and say what was found on which processes."""
        self._restore_buffers(optimizer_step.module)
        diagnosis = record.run_again(optimizer_step.module, optimizer_step.criterion, optimizer_step.device)
        self._restore_buffers(optimizer_step.module)
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
                text += f" (cannot keep it: {distributed.describe_error(error)})"
        return "; ".join(part for part in distributed.gather(text if concerned else "") if part)
