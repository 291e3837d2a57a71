"""Where compiled kernels are kept between runs."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE_VARIABLE = "ALIGN_DETR_CACHE"
"""Environment variable that overrides the folder of compiled kernels."""
DIGEST_BYTES = 32


class BackendUnavailableError(RuntimeError):
    """A backend cannot be used on this machine; the message is one line that says why."""


def cache_folder() -> Path:
    """The folder of compiled kernels: $ALIGN_DETR_CACHE, else the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
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
    """The file ``name`` of the cache, built if it is not there whole.

    ``build`` writes the path it is given, which is renamed into place: processes that build the same file at the same
    time waste work, but none ever sees half a file. The file ends with a digest of what was built: one that a full disk
    or a crash has cut short is built again. Loaders of ELF files do not look at what comes behind.

    Without a home folder, or where the folder cannot be written, the file lives in a temporary folder of this process.

    Raises:
        OSError: there is no temporary folder either.
    """
    try:
        return _whole_file(cache_folder() / name, build)
    except BackendUnavailableError:
        raise
    except (OSError, RuntimeError):
        return _whole_file(Path(_temporary_folder().name) / name, build)


def is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of what comes before."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    return len(data) > DIGEST_BYTES and hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def _whole_file(path: Path, build: Callable[[Path], None]) -> Path:
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        built = Path(scratch) / path.name
        build(built)
        with built.open("ab") as file:
            file.write(hashlib.sha256(built.read_bytes()).digest())
        built.replace(path)
    return path


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="align-detr-")
