"""Choosing, building and caching the backends."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deform_cases import make_case

from ops.cache import DIGEST_BYTES, BackendUnavailableError, cache_folder, cached_file, key_of
from ops.ms_deform_attn import (
    available_backends,
    backends,
    cpu,
    cuda,
    describe_backend,
    fused_ms_deform_attn,
    set_default_backend,
)
from ops.native import load_library

ROOT = Path(__file__).parents[2]
RUN = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
sys.path.insert(0, "tests/ops")
from deform_cases import make_case
from ops.ms_deform_attn import available_backends, describe_backend, fused_ms_deform_attn
case = make_case(0)
value, *rest = (t.detach() for t in case.fused(torch.float32))
for _ in range(2):
    output = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, *rest)
print("sum", round(output.sum().item(), 3))
print(describe_backend("cpu"))
"""


def run_python(cache: Path, compiler: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ALIGN_DETR_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CXX": compiler}
    return subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As at the start of a process: nothing chosen, nothing built."""
    monkeypatch.setattr(backends, "_default", "auto")
    monkeypatch.setattr(backends, "_failures", {})
    cpu.library.cache_clear()
    yield monkeypatch
    cpu.library.cache_clear()


def test_without_a_compiler_one_warning_and_the_reference(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("CXX", "no-such-compiler")
    case = make_case(0)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    arguments = (value, case.shapes, case.valid_sizes, reference, offsets, logits)
    with caplog.at_level(logging.WARNING):
        outputs = [fused_ms_deform_attn(*arguments) for _ in range(3)]
    assert torch.equal(outputs[0], fused_ms_deform_attn(*arguments, backend="reference"))
    assert len(caplog.records) == 1
    assert "no-such-compiler" in caplog.text
    assert "no-such-compiler" in describe_backend("cpu")
    assert describe_backend("cpu").startswith("reference")
    assert "no-such-compiler" in str(available_backends()["cpu"])
    with pytest.raises(ValueError, match=r"backend 'cpu'.*no-such-compiler"):
        fused_ms_deform_attn(*arguments, backend="cpu")
    with pytest.raises(ValueError, match=r"backend 'cpu'.*no-such-compiler"):
        set_default_backend("cpu")


def test_a_compiler_that_fails_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: too old' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    fresh.setenv("CXX", str(broken))
    fresh.setenv("ALIGN_DETR_CACHE", str(tmp_path / "cache"))
    assert "too old" in str(available_backends()["cpu"])
    assert not list((tmp_path / "cache").glob("*"))


def test_a_check_that_fails_does_not_count_as_working(fresh: pytest.MonkeyPatch) -> None:
    """Whatever it fails with: what is no RuntimeError is passed on, and the next call asks again."""
    errors = [MemoryError("first"), RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be ...")]

    def check() -> None:
        raise errors.pop(0)

    fresh.setattr(cuda, "check", check)
    with pytest.raises(MemoryError):
        available_backends()
    assert available_backends()["cuda"] == "CUDA error: unknown error"
    assert available_backends()["cuda"] == "CUDA error: unknown error"
    with pytest.raises(ValueError, match=r"backend 'cuda'.*unknown error"):
        set_default_backend("cuda")


def test_the_default_can_be_set(fresh: pytest.MonkeyPatch) -> None:
    assert backends.resolve("auto", "meta", False) == "reference"
    set_default_backend("reference")
    assert backends.resolve("auto", "cpu", False) == "reference"
    assert describe_backend("cpu") == "reference: plain PyTorch, as configured"
    with pytest.raises(ValueError, match="one of auto, reference, cpu, cuda"):
        set_default_backend("fast")
    if available_backends()["cpu"] is None:
        set_default_backend("cpu")
        assert describe_backend("cpu").startswith("cpu: ")
        with pytest.raises(ValueError, match="cannot take value on device 'cuda'"):
            backends.resolve("auto", "cuda", False)


def test_an_unknown_device_is_explained() -> None:
    assert describe_backend("mps") == "reference: plain PyTorch (mps: no kernel for device mps)"


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ compiler")
def test_processes_that_build_at_once_do_not_clash(tmp_path: Path) -> None:
    """The compiler is one that takes its time to copy what was built before, in two halves."""
    built = Path(cpu.library()._name)
    compiler, cache = tmp_path / "slow-c++", tmp_path / "cache"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo slow 1.0\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'head -c 1000 {built} > "$2"; sleep 1; tail -c +1001 {built} >> "$2"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    processes = [run_python(cache, str(compiler)) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert "cpu: C++ kernels" in outputs[0]
    assert "WARNING" not in outputs[0]
    libraries = [path.name for path in cache.iterdir()]
    assert len(libraries) == 1
    assert libraries[0].endswith(".so")


def test_cache_key_tells_its_parts_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("ab", b"c") == key_of(b"ab", "c")


def test_cached_file_is_built_once_and_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path / "deep" / "cache"))
    assert cache_folder() == tmp_path / "deep" / "cache"
    builds = []

    def build(path: Path) -> None:
        builds.append(path)
        path.write_text("half")
        if len(builds) == 1:
            raise BackendUnavailableError("interrupted")
        path.write_text("whole")

    with pytest.raises(BackendUnavailableError):
        cached_file("kernel", build)
    assert list(cache_folder().iterdir()) == []
    assert built_text("kernel", build) == "whole"
    assert built_text("kernel", build) == "whole"
    assert len(builds) == 2


def built_text(name: str, build: Callable[[Path], None]) -> str:
    return cached_file(name, build).read_bytes()[:-DIGEST_BYTES].decode()


@pytest.mark.parametrize("kept", [0, 10, 1000, 1031])
def test_a_cached_file_that_was_cut_short_is_built_again(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path))
    builds = []

    def build(path: Path) -> None:
        builds.append(path)
        path.write_text("k" * 1000)

    path = cached_file("kernel", build)
    path.write_bytes(path.read_bytes()[:kept])
    assert built_text("kernel", build) == built_text("kernel", build) == "k" * 1000
    assert len(builds) == 2


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ compiler")
def test_a_library_that_was_cut_short_is_built_again(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, cache = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text('extern "C" int answer() { return 42; }\n')
    fresh.setenv("ALIGN_DETR_CACHE", str(cache))
    cache.mkdir()
    load_library("answer", source, (), ("-O1",))
    (path,) = cache.glob("answer-*.so")
    content = path.read_bytes()
    path.unlink()  # this process still has the first one loaded
    path.write_bytes(content[:5000])
    assert load_library("answer", source, (), ("-O1",)).answer() == 42
    assert path.read_bytes() == content


@pytest.mark.parametrize("trouble", ["no home folder", "a file in the way"])
def test_without_a_cache_folder_files_live_as_long_as_the_process(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # what pathlib says without HOME and user

    if trouble == "no home folder":
        monkeypatch.delenv("ALIGN_DETR_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("ALIGN_DETR_CACHE", str(tmp_path / "file"))
    builds = []

    def build(path: Path) -> None:
        builds.append(path)
        path.write_text(trouble)

    name = f"kernel-{tmp_path.name}"
    path = cached_file(name, build)
    assert path == cached_file(name, build)
    assert built_text(name, build) == trouble
    assert len(builds) == 1
    assert str(path).startswith(tempfile.gettempdir())

    def fail(path: Path) -> None:
        raise BackendUnavailableError("too old")

    with pytest.raises(BackendUnavailableError, match="too old"):
        cached_file(f"{name}-2", fail)
