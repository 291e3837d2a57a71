"""Free memory is kept while a process holds what a step needs, and goes back when it has grown, wherever it lies."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import Options, train

from datasets.shapes import ShapesConfig, generate
from engine import host_memory
from engine.run_log import memory_gib

ROOT = Path(__file__).resolve().parents[2]
needs_glibc = pytest.mark.skipif(host_memory._trim is None, reason="this C library has no malloc_trim")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def held() -> float:
    return memory_gib(torch.device("cpu"))


@needs_glibc
def test_holes_in_the_heap_are_returned_once_the_process_has_grown() -> None:
    growth = host_memory.Growth()
    for _ in range(host_memory.FIRST + 1):  # the last of them began without free memory: this is what a step needs
        growth.end_step()
    needed = held()
    blocks = [bytearray(100_000) for _ in range(int(needed * 10_000))]  # as much again, too small to be mapped
    kept = blocks[::50]
    grown = held()
    del blocks
    assert held() > grown - 0.1 * needed, "nothing goes back by itself: used blocks lie in between"
    growth.end_step()
    assert held() < needed * 1.15
    assert len(kept) > 40


@needs_glibc
def test_nothing_is_returned_where_steps_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = []
    monkeypatch.setattr(host_memory, "_trim", trims.append)
    growth = host_memory.Growth()
    for _ in range(50):
        torch.zeros(2**20)
        growth.end_step()
    assert len(trims) == 1, "the first time alone, by which the need of a step is found"


@needs_glibc
def test_the_need_of_a_step_is_that_of_the_largest(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    trimmed: list[int] = []
    statm = tmp_path / "statm"
    monkeypatch.setattr(host_memory, "_STATM", statm)
    monkeypatch.setattr(host_memory, "_trim", lambda _: trimmed.append(pages))
    growth = host_memory.Growth()
    for pages in [*range(81, 91), 50, 54, 56, 100, 109, 111, 105, 117]:
        statm.write_text(f"9999 {pages} 0")
        growth.end_step()
    # 50 is needed at first; 56 is a tenth more, so that what follows, 100, is known to be needed
    assert trimmed == [90, 56, 111, 117]


def test_what_evaluations_and_checkpoints_leave_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    done: list[int] = []
    monkeypatch.setattr(host_memory.Growth, "end_step", lambda growth: done.append(len(done) + 1))
    given_back: list[int] = []
    monkeypatch.setattr(host_memory.Growth, "give_back", lambda growth: given_back.append(len(done)))
    train(Options(str(tmp_path / "run"), steps=6, checkpoint_every=4, eval_every_steps=3))
    assert given_back == [3, 4, 6]


KEPT = """
import resource
import torch
from engine import host_memory
host_memory.keep_free_memory()
for step in range(40):
    if step == 20:  # the heap has grown by what alignment takes
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@needs_glibc
@pytest.mark.parametrize(("environment", "least", "most"), [
    ({}, 0, 40_000),
    ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, 200_000, 230_000),
    ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}, 200_000, 230_000),
])  # fmt: skip
def test_large_blocks_are_not_asked_for_again(environment: dict[str, str], least: int, most: int) -> None:
    """Twenty blocks of 10,240 pages; a process of its own, for the setting cannot be taken back."""
    command = [sys.executable, "-c", KEPT]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert least <= int(ran.stdout) < most


KERNELS = """
import ctypes
import sys
import torch
from engine import host_memory
class Blocks(ctypes.Structure):  # mallinfo2's ten figures; the eighth: bytes in use
    _fields_ = [("figures", ctypes.c_size_t * 10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Blocks
if "forget" in sys.argv:
    host_memory.forget_kernels()
convolution = torch.nn.Conv2d(16, 16, 3, padding=1)
for size in range(20, 120):
    if size == 40:
        before = libc.mallinfo2().figures[7]
    convolution(torch.ones(1, 16, size, 2 * size, requires_grad=True)).sum().backward()
    convolution.zero_grad()
print(libc.mallinfo2().figures[7] - before)
"""


def without_capacities() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}


@needs_onednn
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33, or none")
@pytest.mark.parametrize(("arguments", "environment", "least", "most"), [
    ([], {}, 2**20, 2**30),
    (["forget"], {}, -(2**30), 2**17),
    (["forget"], {"DNNL_PRIMITIVE_CACHE_CAPACITY": "1024"}, 2**20, 2**30),
])  # fmt: skip
def test_kernels_of_sizes_that_come_once_are_not_kept(
    arguments: list[str], environment: dict[str, str], least: int, most: int
) -> None:
    """Bytes in use after eighty sizes, beyond those after twenty; the environment's own setting stands."""
    command = [sys.executable, "-c", KERNELS, *arguments]
    ran = subprocess.run(command, env=without_capacities() | environment, capture_output=True, text=True, check=True)
    assert least < int(ran.stdout) < most


@needs_onednn
@pytest.mark.parametrize("many", [False, True])
def test_a_training_on_many_sizes_keeps_no_kernel(many: bool, tmp_path: Path) -> None:
    """As oneDNN itself tells: nothing comes before the setting, which would be read too late."""
    generate(tmp_path / "data", ShapesConfig(train_images=8, val_images=2, image_size=64, max_object_size=40), 1)
    crop = "{name: random_size_crop, min_size: 32, max_size: 64}" if many else ""
    options = [
        *(f"data.{split}.images={tmp_path}/data/images/{split}" for split in ("train", "val")),
        *(f"data.{split}.annotations={tmp_path}/data/annotations/instances_{split}.json" for split in ("train", "val")),
        f"data.train.transforms=[{crop}]", "schedule.steps=2", "trainer.device=cpu", f"output_dir={tmp_path}/run",
    ]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "main.py", "--cfg", "tests/golden/align_detr.yaml", *options],
        env=without_capacities() | {"ONEDNN_VERBOSE": "2"}, capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "cache_miss" in ran.stdout
    assert ("cache_hit" in ran.stdout) is not many
    assert ("no kernels of convolutions are kept" in ran.stdout) is many


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_trim", None)
    host_memory.keep_free_memory()
    growth = host_memory.Growth()
    for _ in range(host_memory.FIRST + 1):
        growth.end_step()
