"""Memory that is free goes back to the system, wherever it lies."""

import pytest
import torch

from engine import host_memory
from engine.run_log import memory_gib


def test_holes_in_the_heap_are_returned() -> None:
    if host_memory._trim is None:
        pytest.skip("this C library has no malloc_trim")
    host_memory.return_free_memory()
    blocks = [bytearray(100_000) for _ in range(3000)]  # too small to be mapped on their own
    kept = blocks[::50]
    held = memory_gib(torch.device("cpu"))
    del blocks
    host_memory.return_free_memory()
    returned = held - memory_gib(torch.device("cpu"))
    assert returned > 0.2, "of 0.28 GiB, with used blocks in between"
    assert len(kept) == 60


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_trim", None)
    host_memory.return_free_memory()
