"""The CUDA kernels compile for every architecture within their bounds, and say what they cannot take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.cache import BackendUnavailableError
from ops.ms_deform_attn import available_backends, cuda, cuda_compile
from ops.ms_deform_attn.cuda_plan import Plan, Signature, backward_plan, forward_plan
from ops.native import compile_shared, compiler_command

HERE = Path(__file__).parent

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 120)
SHARED_BYTES = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory that a block may have."""
MODEL = Signature(value_type=0, sample_type=0, heads=8, channels=32, levels=4, points=4, reference_size=2, tiled=True)


def has_nvrtc() -> bool:
    try:
        cuda_compile.nvrtc_version()
    except RuntimeError:
        return False
    return True


def registers(plan: Plan, architecture: int) -> int:
    """Compile, hold that nothing is spilled, and return the registers of a thread."""
    binary, _, report = cuda_compile.compile_kernel(plan, architecture)
    assert binary[:4] == b"\x7fELF"
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert re.search(r"\b0 bytes stack frame", report), report
    found = re.search(r"Used (\d+) registers", report)
    assert found, report
    return int(found[1])


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for_every_architecture(architecture: int) -> None:
    """With 64 registers a thread, 1024 threads run on a multiprocessor, half of what it can hold; sorted taps leave
    room for fewer."""
    assert registers(forward_plan(MODEL), architecture) <= 64
    for value_type, deterministic in ((0, False), (0, True), (1, False)):
        backward = backward_plan(
            MODEL._replace(value_type=value_type), SHARED_BYTES[architecture] * 1024, deterministic
        )
        assert backward.tiled
        assert registers(backward, architecture) <= 128
    assert registers(backward_plan(MODEL._replace(tiled=False), 48 * 1024, False), architecture) <= 64


VARIANTS = {
    "bfloat16, boxes": MODEL._replace(value_type=1, sample_type=1, reference_size=4, tiled=False),
    "float16": MODEL._replace(value_type=2, sample_type=0),
    "unfused, 64 channels": MODEL._replace(reference_size=0, channels=64, tiled=False),
    "odd": MODEL._replace(channels=33, levels=3, points=5),
}


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", [75, 90])
def test_variants_compile(variant: str, architecture: int) -> None:
    signature = VARIANTS[variant]
    assert registers(forward_plan(signature), architecture) <= 64
    backward = backward_plan(signature, SHARED_BYTES[architecture] * 1024, True)
    assert registers(backward, architecture) <= (128 if backward.tiled else 64)


def test_plans_fit_into_shared_memory() -> None:
    sizes = [(1, 1, 1), (4, 4, 32), (5, 8, 64), (4, 128, 16), (1, 512, 1024), (512, 1, 1024)]
    for levels, points, channels in sizes:
        signature = MODEL._replace(levels=levels, points=points, channels=channels)
        assert forward_plan(signature).shared_bytes <= 48 * 1024
        for limit in SHARED_BYTES.values():
            for tiled in (True, False):
                plan = backward_plan(signature._replace(tiled=tiled), limit * 1024, False)
                assert plan.shared_bytes <= (limit * 1024 if plan.tiled else 48 * 1024)
                assert plan.tiled <= tiled


def test_blocks_leave_the_rest_of_the_memory_to_the_cache() -> None:
    """Of an H100's 228 KiB, four blocks of the backward take 164, and three of 16 bits 196: steps of the device."""
    limit = 228 * 1024
    backward = backward_plan(MODEL, 227 * 1024, False)
    assert (backward.blocks, 132 / 228 < backward.carve_out(limit) / 100 <= 164 / 228) == (4, True)
    narrow = backward_plan(MODEL._replace(value_type=1), 227 * 1024, False)
    assert (narrow.blocks, 164 / 228 < narrow.carve_out(limit) / 100 <= 196 / 228) == (3, True)
    assert forward_plan(MODEL).carve_out(limit) / 100 <= 100 / 228
    assert backward._replace(shared_bytes=200 * 1024).carve_out(limit) == 100


def test_limits_of_the_kernels() -> None:
    value, samples = torch.empty(1, 12, 2, 32), torch.empty(1, 5, 2, 1, 4, 2)
    assert cuda.supports(value, [3, 4], samples)
    assert not cuda.supports(torch.empty(1, 40000, 2, 32, device="meta"), [1, 40000], samples)
    assert not cuda.supports(value, [3, 4], torch.empty(1, 5, 2, 1, 513, 2))
    assert cuda.supports(torch.empty(1, 2**26 - 1, 1, 32, device="meta"), [8191, 8193], samples)
    assert not cuda.supports(torch.empty(1, 2**26, 1, 32, device="meta"), [8192, 8192], samples)
    assert not cuda.supports(torch.empty(1, 12, 2, 1025), [3, 4], samples)


@pytest.mark.skipif(not has_nvrtc() or available_backends()["cpu"] is not None, reason="no NVRTC or no C++ compiler")
def test_launch_reaches_the_driver_as_meant(tmp_path: Path) -> None:
    """Through the real cuda.bindings to a library in the place of the driver."""
    plan = backward_plan(Signature(0, 0, 8, 32, 4, 4, 2, True), 227 * 1024, False)
    cuda_compile.cached_kernel(plan, 90)  # NVRTC asks the driver for more than the library has
    compile_shared(
        compiler_command(), ("-fPIC", "-shared", "-ldl"), HERE / "recording_driver.cpp", tmp_path / "libcuda.so.1"
    )
    script = HERE / "launch_on_recording_driver.py"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "CUDA_ERROR_INVALID_VALUE (1)\n"


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
def test_a_newer_architecture_takes_the_binary_of_an_older_one() -> None:
    """Within a major number; what the compiler knows none for is a failure with a reason."""
    assert cuda_compile.architecture_for((9, 0)) == 90
    assert cuda_compile.architecture_for((8, 8)) >= 87
    newest = cuda_compile.architectures()[-1]
    assert cuda_compile.architecture_for((newest // 10, 9)) == newest
    with pytest.raises(BackendUnavailableError, match=r"does not know compute capability 55\.0"):
        cuda_compile.architecture_for((55, 0))


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
def test_a_binary_that_was_cut_short_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path))
    plan = forward_plan(MODEL)
    binary = cuda_compile.cached_kernel(plan, 90)
    (path,) = tmp_path.glob("*.cubin")
    path.write_bytes(b"")
    assert cuda_compile.cached_kernel(plan, 90) == binary


def test_a_machine_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert available_backends()["cuda"] == "no CUDA device"
