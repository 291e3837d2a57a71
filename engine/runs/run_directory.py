"""The directory of one run: claimed by one process at a time, never mixed with another run's files."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.records import read_records
from engine.whole_files import UNFINISHED, replacing

log = logging.getLogger(__name__)

CONFIG, METRICS, LOG, ENVIRONMENT, LOCK = "config.yaml", "metrics.jsonl", "log.txt", "environment.jsonl", ".lock"
LAUNCH_FILE = ".launch"
CURVES, PREDICTIONS = "curves.png", "predictions.png"
DETECTIONS = "detections.npz"


class RunDirectory:
    """Exclusive hold on an output directory, until :meth:`close` or the end of the process, however it ends."""

    def __init__(self, path: Path, *, resuming: bool, launchers: Sequence[str] = ()) -> None:
        """Create the directory where it is missing, and claim it.

        Args:
            path: the run's output directory.
            resuming: whether this run goes on with what the directory holds.
            launchers: what started the processes, see :func:`launched_by`.

        Raises:
            ValueError: if it is not a writable directory, is in use, or holds another run.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Checked by writing: permission bits say nothing about read-only or full file systems.
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"output_dir={path} cannot be written: {error.strerror}") from error
        try:
            self._lock_or_refuse()
            self._claim(resuming, launchers)
        except ValueError:
            os.close(self._lock)
            raise

    def _lock_or_refuse(self) -> None:
        try:
            # A record lock: the kernel drops it with this process, and forked data-loading workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("output_dir=%s: no locks on this file system, two runs could share it", self.path)
                return
            owner = os.pread(self._lock, 100, 0).decode(errors="replace").strip()
            by = f" (process {owner})" if owner else ""
            raise ValueError(
                f"output_dir={self.path} is in use by another run{by}: choose another output_dir"
            ) from error

    def _claim(self, resuming: bool, launchers: Sequence[str]) -> None:
        if not resuming:
            found = [
                name for name in (checkpoint.LAST, checkpoint.BEST, METRICS, CONFIG) if (self.path / name).exists()
            ]
            if found:
                raise ValueError(
                    f"output_dir={self.path} already holds a run ({found[0]}): continue it with --resume auto, "
                    "or choose another output_dir"
                )
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            for leftover in self.path.glob(UNFINISHED):
                leftover.unlink()
            (self.path / LAUNCH_FILE).write_text(json.dumps(list(launchers)), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output_dir={self.path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Give the directory free."""
        os.close(self._lock)


def launched_by(path: Path, launchers: Sequence[str]) -> bool:
    """Whether the directory was last claimed by processes of one of these launchers (``distributed.launcher``)."""
    try:
        recorded = json.loads((path / LAUNCH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(recorded, list) and not set(launchers).isdisjoint(recorded)


def record_start(directory: Path, config: str, environment: dict[str, Any]) -> None:
    """Write the resolved configuration, and one line more about where and how it is run."""
    (directory / CONFIG).write_text(config, encoding="utf-8")
    with (directory / ENVIRONMENT).open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment, ensure_ascii=False) + "\n")


def forget_after(directory: Path, step: int, *, evaluated: bool) -> None:
    """Remove records of what a resumed run is going to repeat, and lines a crash left half-written.

    Args:
        directory: of the run.
        step: optimizer steps the resumed checkpoint has taken.
        evaluated: whether its evaluation, if one is due there, is done.
    """
    file = directory / METRICS
    if not file.exists():
        return
    kept = []
    for record in read_records(file):
        last = step if evaluated or record.get("kind") == "train" else step - 1
        if record.get("step", 0) <= last:
            kept.append(json.dumps(record, ensure_ascii=False) + "\n")
    with replacing(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
