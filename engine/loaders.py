"""What the engine needs of data loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from structures import Batch


class Skipped(Protocol):
    """Unreadable images."""

    @property
    def count(self) -> int:
        """How often this process met one."""


class Loader(Protocol):
    """Batches to go through once."""

    def __len__(self) -> int:
        """Number of batches, for progress."""

    def __iter__(self) -> Any:
        """Batches of this process."""


class EvalLoader(Loader, Protocol):
    """Batches of a validation set."""

    @property
    def skipped(self) -> Skipped:
        """Unreadable images, which were left out."""


class TrainLoader(Protocol):
    """The same batches for the same position, however often it is asked."""

    @property
    def skipped(self) -> Skipped:
        """Unreadable images, which were replaced by others."""

    @property
    def worker_restarts(self) -> int:
        """How often data-loading workers died and were replaced."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training set."""

    def iterate(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        """For each optimizer step of the epoch from ``start_step`` on: this process's micro-batches."""
