"""What a process on the CPU keeps of memory that it no longer uses.

glibc maps large blocks one by one, and unmaps them as soon as they are free. The next step then waits for the system to
map and clear the same pages again: a sixth of an inference with ResNet-50 (docs/results.md). So free memory is kept.
But batches of many sizes leave holes in the heap that the next batch, of another size, does not fill: after hundreds of
steps a process would hold two to three times what its largest batch needs, most of it free (docs/reliability.md). So
free memory is given back whenever the process has grown, and only then.

Holes stay where small blocks that live on lie between large ones. Most of those are kernels: oneDNN makes one for every
shape of every convolution and keeps the last 1,024, made in the midst of steps, in case the shape comes again. Where
batches are of many sizes it rarely does, and nothing is kept of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

GROWTH = 1.1
"""How far a process may grow beyond what it held after a step without older free memory."""
FIRST = 10
"""Steps before free memory is first given back: the first ones also build caches and, in training, an optimizer."""
log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_STATM = Path("/proc/self/statm")

_trim: Any = None
_mallopt: Any = None
with suppress(AttributeError, OSError, TypeError):  # another C library: macOS, musl
    _trim, _mallopt = ctypes.CDLL(None).malloc_trim, ctypes.CDLL(None).mallopt


def keep_free_memory() -> None:
    """Have the allocator keep what is freed, large blocks too; glibc only.

    Who has tuned the allocator in the environment (``MALLOC_MMAP_THRESHOLD_=1048576``, ``GLIBC_TUNABLES``) keeps that.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if _trim is not None and not tuned:
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, -1)


def forget_kernels() -> None:
    """Have oneDNN keep no kernels, for batches that hardly ever have a size again.

    It reads the environment once, at its first kernel: whatever has computed a convolution in this process before, an
    earlier training or a ``Predictor``, makes this do nothing. The environment's own setting stands. PyTorch keeps some
    beside oneDNN (``LRU_CACHE_CAPACITY``, read by ``torch.set_num_threads`` too), at least one.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the older name of the same
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    log.info("images of many sizes: no kernels of convolutions are kept")


class Growth:
    """Gives free memory back when the process holds ``GROWTH`` times what a step needs; glibc on Linux only.

    What a step needs is the most that was held after a step that began without free memory. Where all batches are alike
    that is soon found, and nothing is given back any more.

    Args:
        first: steps after which free memory is given back for the first time.
    """

    def __init__(self, first: int = FIRST) -> None:
        self._first = first
        self._steps = 0
        self._need: int | None = None
        self._fresh = False

    def end_step(self) -> None:
        """Called after each step of training or batch of an evaluation."""
        self._steps += 1
        if _trim is None or not _STATM.exists():
            return
        held = int(_STATM.read_text().split()[1])  # pages
        if self._fresh:
            self._need = max(self._need or 0, held)
        if held > GROWTH * self._need if self._need else self._steps >= self._first:
            self.give_back()
        else:
            self._fresh = False

    def give_back(self) -> None:
        """Give all free memory back, also the pages between used ones; for instance after work that is no step."""
        self._fresh = self._steps >= self._first
        if _trim is not None:
            _trim(0)
