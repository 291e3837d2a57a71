"""Loading batches in worker processes: carrying on when one of them dies, giving up when nothing comes any more."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from torch.utils.data import DataLoader, Sampler

from datasets.coco import CocoDataset, SampleKey
from datasets.collate import Collate, Loaded
from datasets.samplers import EvalBatchSampler, TrainBatchSampler
from datasets.workers import (
    LostBatch,
    Overdue,
    alarm,
    collect_remains,
    is_death_of_worker,
    kill_workers,
    signals_held_back,
    start_worker,
)
from structures import Batch

WorkerStart = Literal["fork", "spawn", "forkserver"]

MAX_RESTARTS = 3
"""So often in a row, without a batch in between, workers may die before loading gives up."""

FILES_NAMED = 8
"""The most files that the error of a batch that does not come lists."""

_REMEDY = (
    "give it more shared memory (docker run --shm-size=8g) or file handles (ulimit -n 4096), or take a smaller "
    "data.num_workers and data.prefetch (with 0 workers, the training process itself loads)"
)

_logger = logging.getLogger(__name__)


class SkippedImages:
    """Which images could not be read so far, and how often one was asked for."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        """By image id."""
        self.count = 0
        """Every time counts, in this process."""

    def add(self, skipped: tuple[tuple[int, str], ...]) -> None:
        for image_id, reason in skipped:
            self.count += 1
            if image_id not in self.reasons:
                self.reasons[image_id] = reason
                _logger.warning("skipped unreadable image %d: %s", image_id, reason)


class _Rest(Sampler[list[SampleKey]]):
    """What another sampler yields after the first ``done`` batches."""

    def __init__(self, sampler: Sampler[list[SampleKey]]) -> None:
        self.sampler = sampler
        self.done = 0
        self.pending: deque[list[SampleKey]] = deque()
        """Batches that were asked for and have not come yet; they come in this order."""

    def __iter__(self) -> Iterator[list[SampleKey]]:
        self.pending.clear()
        for keys in islice(iter(self.sampler), self.done, None):
            self.pending.append(keys)
            yield keys

    def count(self) -> None:
        """One more has come."""
        self.done += 1
        self.pending.popleft()


class WorkerPool:
    """A torch DataLoader that is started again, at the place reached, when one of its workers dies."""

    def __init__(
        self,
        dataset: CocoDataset,
        sampler: Sampler[list[SampleKey]],
        collate: Collate,
        *,
        num_workers: int,
        worker_start: WorkerStart,
        prefetch: int,
        persistent: bool,
        timeout: float,
    ) -> None:
        self.dataset, self.sampler, self.collate = dataset, _Rest(sampler), collate
        self.num_workers, self.worker_start, self.prefetch = num_workers, worker_start, prefetch
        self.persistent, self.timeout = persistent, timeout
        self.restarts = 0
        """How often workers died and were replaced."""
        self._loader: DataLoader[Loaded] | None = None

    def __iter__(self) -> Iterator[Loaded]:
        """Goes through what the sampler yields from its present position.

        Raises:
            ValueError: workers died again and again, cannot pass on what they loaded, or no batch came for ``timeout``
                seconds.
        """
        self.sampler.done = 0
        failures, cause = 0, ""
        while failures <= MAX_RESTARTS:
            try:
                for loaded in self._batches():
                    self.sampler.count()
                    failures = 0
                    yield loaded
                return
            except (RuntimeError, OSError, EOFError) as error:
                # torch says one of the two in words, where a batch comes and cannot be taken.
                handles = {os.strerror(number) for number in (errno.EMFILE, errno.ENFILE)}
                if short_of := [text for text in handles if text in str(error)]:
                    kill_workers()
                    collect_remains(error)
                    raise ValueError(f"cannot load data in workers ({short_of[0]}): {_REMEDY}") from error
                if not self.num_workers or not is_death_of_worker(error):
                    raise
                cause = str(error).splitlines()[0] if str(error) else "a data-loading worker closed its connection"
            # Outside the except block, where nothing holds on to the broken loader any more.
            self._loader = None
            failures += 1
            self.restarts += 1
            _logger.warning("%s; starting the data-loading workers again", cause)
        raise ValueError(
            f"data-loading workers died {failures} times in a row ({cause}); if the machine was short of something, "
            f"{_REMEDY}"
        )

    def _batches(self) -> Iterator[Loaded]:
        iterator = self._start()
        while True:
            try:
                with alarm(self.timeout):
                    loaded: Loaded | LostBatch | None = next(iterator, None)
            except Overdue:
                kill_workers()
                files = [str(self.dataset.image_path(key.image_index)) for key in (*self.sampler.pending, [])[0]]
                more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
                raise ValueError(
                    f"no batch came for data.timeout={self.timeout:g} seconds while one of these files was being read: "
                    f"{', '.join(files[:FILES_NAMED])}{more}; is the disk or share they are on still there?"
                ) from None
            if loaded is None:
                return
            if isinstance(loaded, LostBatch):
                kill_workers()
                raise ValueError(f"a data-loading worker cannot pass on a batch ({loaded.reason}): {_REMEDY}")
            yield loaded

    def _start(self) -> Iterator[Loaded]:
        if self._loader is None or not self.persistent:
            self._loader = self._make_loader()
        if not self.num_workers:
            return iter(self._loader)
        previous = signal.getsignal(signal.SIGCHLD)
        with signals_held_back():
            iterator = iter(self._loader)
        if signal.getsignal(signal.SIGCHLD) is not previous:
            # torch's handler raises wherever the main thread happens to be when a worker dies, be it in the optimizer.
            # Without it the death is noticed where it can be handled: when the next batch does not come.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)
        return iterator

    def _make_loader(self) -> DataLoader[Loaded]:
        workers = self.num_workers > 0
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            multiprocessing_context=multiprocessing.get_context(self.worker_start) if workers else None,
            prefetch_factor=self.prefetch if workers else None,
            persistent_workers=workers and self.persistent,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            # Without its own generator a loader draws from the global one of the main process.
            generator=torch.Generator().manual_seed(0),
        )


class TrainLoader:
    """Batches for training, one optimizer step at a time."""

    def __init__(self, pool: WorkerPool, sampler: TrainBatchSampler) -> None:
        self._pool, self._sampler = pool, sampler
        self.skipped = SkippedImages()
        """Unreadable images met by this process."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; an incomplete last global batch is left out."""
        return self._sampler.steps_per_epoch

    @property
    def worker_restarts(self) -> int:
        """How often dead workers were replaced."""
        return self._pool.restarts

    def iterate(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step of an epoch, from ``start_step`` on.

        Raises:
            ValueError: hardly an image can be read, or workers died again and again.
        """
        self._sampler.set_position(epoch, start_step)
        step: list[Batch] = []
        for loaded in self._pool:
            self.skipped.add(loaded.skipped)
            if not loaded.batches:
                count, (_, reason) = len(loaded.skipped), loaded.skipped[-1]
                raise ValueError(f"{count} training images in a row cannot be read, the last one {reason}")
            step.extend(loaded.batches)
            if len(step) == self._sampler.accumulation_steps:
                yield step
                step = []


class EvalLoader:
    """Batches for evaluation; every image is on one rank, once. Ranks may have different numbers of batches."""

    def __init__(self, pool: WorkerPool, sampler: EvalBatchSampler) -> None:
        self._pool, self._sampler = pool, sampler
        self.skipped = SkippedImages()
        """Unreadable images met by this process; nothing is detected in them."""

    def __len__(self) -> int:
        """Batches of this rank (the files' sizes may force a few more, see ``Collate``)."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self._pool:
            self.skipped.add(loaded.skipped)
            yield from loaded.batches
