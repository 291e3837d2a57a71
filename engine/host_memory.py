"""What a process keeps of memory that it no longer uses.

Batches of many sizes leave holes in glibc's heap that the next batch, of another size, does not fill: after hundreds of
steps a process holds several times what its largest batch needs, most of it free (docs/reliability.md has figures).
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any

TRIM_EVERY = 10
"""Optimizer steps after which free memory is returned: stays near the need of one step, and hardly costs time."""

MAPPED_BYTES = 4 * 2**20
"""Blocks of this size and more are mapped on their own and leave no hole; smaller ones would cost many page faults."""
_M_MMAP_THRESHOLD = -3

_trim: Any = None
_mallopt: Any = None
with suppress(AttributeError, OSError, TypeError):  # another C library: macOS, musl
    _trim, _mallopt = ctypes.CDLL(None).malloc_trim, ctypes.CDLL(None).mallopt


def map_large_blocks() -> None:
    """Have blocks of ``MAPPED_BYTES`` and more go back to the system as soon as they are free; glibc only.

    glibc maps large blocks anyway, but raises what it calls large, up to 32 MiB, with each that is freed. Who has set a
    threshold in the environment keeps it.
    """
    said = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if _trim is not None and not said:
        _mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def return_free_memory() -> None:
    """Give pages that hold nothing any more back to the system, also those between used ones; glibc only."""
    if _trim is not None:
        _trim(0)
