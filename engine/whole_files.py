"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".*.writing"
"""Pattern of what a killed process may leave behind."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes ``path`` at the end; after an error nothing is left of it."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
