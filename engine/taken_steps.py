"""Optimizer steps one after the other, each of which counts once it is known that it was finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from engine import distributed
from engine.runs.faults import NonFiniteSteps, TakenStep
from engine.step import OnHost, OptimizerStep, seed_step
from structures import Batch, BatchSize, LossOutput


class TakenSteps:
    """Takes steps.

    Whether a gradient was finite is asked once that of the next step is computed, or before anything else looks at the
    state: until then the host would wait for the device.
    """

    def __init__(
        self, optimizer_step: OptimizerStep, faults: NonFiniteSteps, count: Callable[[Sequence[LossOutput]], None]
    ) -> None:
        """
        Args:
            optimizer_step: what is taken.
            faults: are told of steps that were not finite.
            count: called after each step that was, with its losses, before the weights move again.
        """
        self.optimizer_step, self.faults, self.count = optimizer_step, faults, count
        self.norm = math.nan
        """Of the last gradient that :meth:`settle` knew of, before clipping."""
        self._last: TakenStep | None = None

    def take(self, step: int, batches: list[Batch], size: BatchSize) -> None:
        """Take the 0-based ``step``; arguments as for ``OptimizerStep.backward``."""
        taken = self._gradients(step, batches, size)
        if not self.settle():  # which took the step before out of the buffers, and this one out of the gradients
            taken = self._gradients(step, batches, size)
        self.optimizer_step.update(taken.norm.value)
        self._last = taken

    def settle(self) -> bool:
        """Count the last step, or make it as if it had not been; returns whether it was finite.

        All processes must call it together.

        Raises:
            DivergedError: if it was not finite once more than allowed.
        """
        taken, self._last = self._last, None
        if taken is None:
            return True
        self.norm = taken.norm.read()
        if math.isfinite(self.norm):
            self.count(taken.losses)
            return True
        self.faults.handle(self.optimizer_step, taken)
        return False

    def _gradients(self, step: int, batches: list[Batch], size: BatchSize) -> TakenStep:
        seed_step(self.faults.seed, distributed.rank(), step)
        buffers, scale = self.faults.buffers(self.optimizer_step.module), float(self.optimizer_step.scaler.get_scale())
        norm, losses = self.optimizer_step.backward(batches, size)
        return TakenStep(step, batches, size, losses, scale, buffers, OnHost(norm))
