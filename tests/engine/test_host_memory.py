"""Memory that is free goes back to the system, wherever it lies."""

import os
import subprocess
import sys

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


HOLES = """
import sys
import torch
from engine import host_memory
from engine.run_log import memory_gib
if sys.argv[1] == "mapped":
    host_memory.map_large_blocks()
bytearray(30 * 2**20)  # freed: from now on glibc takes blocks of up to that for small ones
blocks = [torch.zeros(6 * 2**18) for _ in range(100)]
kept, held = blocks[::10], memory_gib(torch.device("cpu"))
del blocks
print(held - memory_gib(torch.device("cpu")))
"""


@pytest.mark.parametrize(("threshold", "environment", "least", "most"), [
    ("mapped", {}, 0.5, 0.6),
    ("dynamic", {}, -0.1, 0.1),
    ("mapped", {"MALLOC_MMAP_THRESHOLD_": "30000000"}, -0.1, 0.1),
])  # fmt: skip
def test_large_blocks_leave_no_holes(threshold: str, environment: dict[str, str], least: float, most: float) -> None:
    """Of 0.59 GiB, a tenth stays in use; a process of its own, for the setting cannot be taken back."""
    if host_memory._trim is None:
        pytest.skip("this C library has no mallopt")
    command = [sys.executable, "-c", HOLES, threshold]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert least < float(ran.stdout) < most


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_trim", None)
    host_memory.return_free_memory()
    host_memory.map_large_blocks()
