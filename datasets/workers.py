"""Worker processes of data loading: how they start, are told apart from the living, and are given up."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NamedTuple

import torch

from ops.errors import describe_error

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LostBatch(NamedTuple):
    """Comes in the place of a batch that a worker has made but could not pass on."""

    reason: str
    """The error's text."""


class Overdue(BaseException):
    """Raised where the main thread waits for a batch; no decoder may take it for a fault of its file."""


def is_death_of_worker(error: Exception) -> bool:
    """Whether the main process failed to get a batch because the process that had it is gone.

    torch says so, unless it comes across a half-dead process: then fetching a tensor from its shared memory fails.
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid") or "ancillary data" in text
    raised_by_worker = "in DataLoader worker process" in text
    return isinstance(error, EOFError | ConnectionError | FileNotFoundError) and not raised_by_worker


def kill_workers() -> None:
    """So that the end of this process need not wait for those that are stuck."""
    for worker in multiprocessing.active_children():
        worker.kill()


def collect_remains(error: BaseException) -> None:
    """Free what torch has made for workers that could only half be started, after their ``error``.

    It would complain, with a traceback, of what it lacks when it is freed later.
    """
    complain, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = complain


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises ``Overdue`` in the body after so long, be it in a read that never returns; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    # Again every second: one ring can come to nothing, just before a read begins or where exceptions are ignored.
    signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Workers started in here get no signal to stop until ``start_worker`` is ready for it; nor does this process."""
    resource_tracker.ensure_running()  # started by the first spawned worker otherwise, which would end the holding back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_helper() -> None:
    """Runs in each process of a pool. Ctrl-C reaches the whole process group, but the main process ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def start_worker(worker: int) -> None:
    """Runs in each worker. Signals reach the whole process group, but when to stop is for the main process to say."""
    signal.set_wakeup_fd(-1)  # which a forked worker shares with its parent
    start_helper()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _overhear)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    # Where a full /dev/shm is noticed: by default a thread prints a traceback and the batch is never heard of again.
    multiprocessing.queues.Queue._on_queue_feeder_error = _report_lost_batch  # type: ignore[attr-defined]


def _report_lost_batch(queue: Any, error: Exception, item: Any) -> None:
    """Runs in each worker, when a batch cannot be put into shared memory or sent."""
    if not isinstance(item, tuple) or isinstance(item[1], LostBatch):
        os._exit(1)  # which the main process notices
    queue.put((item[0], LostBatch(describe_error(error))))


def _overhear(number: int, frame: FrameType | None) -> None:
    """Lets the first signal pass: the second is the main process getting rid of a worker that does not end."""
    signal.signal(number, signal.SIG_DFL)
