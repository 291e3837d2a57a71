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
    not want to wait. Data-loading workers, which inherit the handlers, leave the matter to their parent.
    """

    def __init__(self, *, process_ends: bool = False) -> None:
        """Prepare to listen, from entering the context on.

        Args:
            process_ends: whether this process ends once it has stopped. Then the handlers stay after a signal, and a
                second Ctrl-C ends the process whatever it is doing, for a thread of its own sees to that. Otherwise the
                former handlers always come back, and have the second Ctrl-C: Python's raises KeyboardInterrupt.
        """
        self.signal_number = 0
        self._process_ends = process_ends
        self._since = 0.0
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
        threading.Thread(target=_listen, args=(reader, self._process_ends), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal_number and self._process_ends:
            # And should do so with its own exit code: torchrun sends SIGTERM to all others once the first has ended.
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
        if os.getpid() != self._owner:
            return
        if not self.signal_number:
            self.signal_number, self._since = number, time.monotonic()
            if self._waiting:
                raise StopWaiting
        elif not self._process_ends and _is_impatient(number, self._since):
            former = self._former[number]
            if callable(former):
                former(number, frame)


def _is_impatient(number: int, since: float) -> bool:
    """Whether a signal is a person's second Ctrl-C, the first signal having come at ``since``."""
    return number == signal.SIGINT and time.monotonic() - since >= SAME_REQUEST_SECONDS


def _listen(reader: int, process_ends: bool) -> None:
    """Read the numbers of the signals that this process gets, until nothing writes them any more."""
    first: float | None = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                log.info("%s: stopping after this step; Ctrl-C ends at once", signal.Signals(number).name)
            elif process_ends and _is_impatient(number, first):
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
