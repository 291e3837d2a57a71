"""What a process keeps of memory that it no longer uses.

Batches of many sizes leave holes in glibc's heap that the next batch, of another size, does not fill: after hundreds of
steps a process holds several times what its largest batch needs, most of it free (docs/reliability.md has figures).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

TRIM_EVERY = 10
"""Optimizer steps after which free memory is returned: stays near the need of one step, and hardly costs time."""

_trim: Any = None
with suppress(AttributeError, OSError, TypeError):  # another C library: macOS, musl
    _trim = ctypes.CDLL(None).malloc_trim


def return_free_memory() -> None:
    """Give pages that hold nothing any more back to the system, also those between used ones; glibc only."""
    if _trim is not None:
        _trim(0)
