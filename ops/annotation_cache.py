"""What is made of a large annotation file, kept for all processes of a machine, which map one file of tensors."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ops.cache import cache_folder, cached_file, key_of

LEAST_BYTES = 2**25
"""Smaller files are read anew each time: that takes a fraction of a second."""
SETTLED_SECONDS = 2.0
"""A file that has just been written may be written again without its times telling; it is not kept."""
MOST_FILES = 8
"""Older ones are deleted."""
_FORMAT = "1"
"""Raised with every change of what is kept."""

_logger = logging.getLogger(__name__)


def shared(path: Path | str, made: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, from the cache where it is there for this very file.

    One process at a time makes it. A file is known by its place, its size and the times of its last changes, to the
    nanosecond; what is kept ends with a digest, so that a damaged file is made again. Without a folder to write to
    each process makes its own.

    Args:
        path: the annotation file.
        made: says what is made of it, and of which settings.
        make: returns tensors, numbers, texts, and lists and dictionaries of them.
    """
    try:
        before = _fingerprint(path)
        if before[2] < LEAST_BYTES or time.time() - max(before[3:]) / 1e9 < SETTLED_SECONDS:
            return make()
        name = f"annotations-{key_of(_FORMAT, made, str(Path(path).resolve()), str(before))}.pt"
        cache_folder().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no such file, which make says better; or no folder
        return make()
    result: list[dict[str, Any]] = []

    def build(target: Path) -> None:
        result.append(make())
        if _fingerprint(path) != before:
            raise OSError(f"{path} changes while it is read")
        torch.save(result[0], target)

    try:
        with _alone(cache_folder() / f".{name}.lock"):
            kept = cached_file(name, build)
        os.utime(kept)
        for old in sorted(kept.parent.glob("annotations-*.pt"), key=os.path.getmtime)[:-MOST_FILES]:
            old.unlink(missing_ok=True)
        return result[0] if result else torch.load(kept, mmap=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        _logger.warning("%s is not kept for other processes: %s", path, error)
        return result[0] if result else make()


def _fingerprint(path: Path | str) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits for other processes in here; the lock of one that dies is given free."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)
