"""SIGTERM, SIGINT and SIGHUP as requests to stop after the current step; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

SAME_REQUEST_SECONDS = 1.0
"""So soon after the first, further signals are copies of it: torchrun passes on what its processes had already."""

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did so in good order
    """The run has stopped on request, after writing a checkpoint."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
        return 128 + self.signal_number


class StopWaiting(BaseException):
    """Raised in the main thread, wherever it waits for data, when a signal asks the run to stop."""


class StopRequest:
    """Remembers the first signal instead of dying from it; later ones change nothing, except for a second Ctrl-C.

    A scheduler often signals every process of a job, and torchrun passes its own signal on to processes that have
    had one already. A SIGINT that comes ``SAME_REQUEST_SECONDS`` or more after the first signal is a person's, who does
    not want to wait: it ends the process whatever this is doing, for a thread of its own sees to that. Data-loading
    workers, which inherit the handlers, leave the matter to their parent.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._owner = os.getpid()
        self._former: dict[int, signal._HANDLER] = {}
        self._waiting = False

    def __enter__(self) -> StopRequest:
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            self._former[number] = signal.signal(number, self._note)
        # Handlers in Python run when the main thread comes back from what it does; this pipe is written at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_second_interrupt, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal_number:
            # The process is about to end, and should do so with its own exit code: torchrun sends SIGTERM to all
            # others as soon as the first has ended.
            return
        signal.set_wakeup_fd(self._former_writer)
        os.close(self._writer)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def wait_for(self, stream: Iterator[T]) -> T | None:
        """The next of ``stream``, or None as soon as a signal asks to stop, though nothing should ever come."""
        found = None
        with suppress(StopWaiting):
            self._waiting = True
            if not self.signal_number:
                found = next(stream)
            self._waiting = False
        self._waiting = False
        return found

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner and not self.signal_number:
            self.signal_number = number
            if self._waiting:
                raise StopWaiting


def _end_at_second_interrupt(reader: int) -> None:
    """Read the numbers of the signals that this process gets, until nothing writes them any more."""
    first: float | None = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                log.info("%s: stopping after this step; Ctrl-C ends at once", signal.Signals(number).name)
            elif number == signal.SIGINT and time.monotonic() - first >= SAME_REQUEST_SECONDS:
                kill_children()
                with suppress(OSError):
                    print(
                        "error: ended at once by a second Ctrl-C: steps since the last checkpoint are lost, "
                        "go on from there with --resume auto", file=sys.stderr, flush=True,
                    )  # fmt: skip
                os._exit(128 + signal.SIGINT)
    os.close(reader)


def kill_children() -> None:
    """End data-loading workers that are left at the end of the run, so that they cannot delay its exit."""
    for child in multiprocessing.active_children():
        child.kill()
