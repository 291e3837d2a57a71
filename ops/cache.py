"""Where compiled kernels are kept between runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE_VARIABLE = "ALIGN_DETR_CACHE"
"""Environment variable that overrides the folder of compiled kernels."""


class BackendUnavailableError(RuntimeError):
    """A backend cannot be used on this machine; the message is one line that says why."""


def cache_folder() -> Path:
    """The folder of compiled kernels: $ALIGN_DETR_CACHE, else the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align_detr"


def key_of(*parts: str | bytes) -> str:
    """A name for what is built from ``parts``, and from nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:24]


def cached_file(name: str, build: Callable[[Path], None]) -> Path:
    """The file ``name`` of the cache, built if it is not there.

    ``build`` writes the path it is given, which is renamed into place: processes that build the same file at the same
    time waste work, but none ever sees half a file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = cache_folder()
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        built = Path(scratch) / name
        build(built)
        built.replace(path)
    return path
