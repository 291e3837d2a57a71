"""SIGTERM and SIGINT as requests to stop after the current step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did so in good order
    """The run has stopped on request, after writing a checkpoint."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signal_number


class StopRequest:
    """Remembers the first SIGTERM or SIGINT instead of dying from it; later ones change nothing.

    A scheduler often signals every process of a job, and torchrun passes its own signal on to processes that have
    had one already. Data-loading workers, which inherit the handlers, leave the matter to their parent.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._owner = os.getpid()
        self._former: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in STOPPING:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal_number:
            # The process is about to end, and should do so with its own exit code: torchrun sends SIGTERM to all
            # others as soon as the first has ended.
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner and not self.signal_number:
            self.signal_number = number


def kill_children() -> None:
    """End data-loading workers that are left at the end of the run, so that they cannot delay its exit."""
    for child in multiprocessing.active_children():
        child.kill()
