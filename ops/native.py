"""C++ sources to libraries: compiled by the machine's own compiler at first use, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ops.cache import BackendUnavailableError, cached_file, key_of

COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300


def compiler_command() -> list[str]:
    """$CXX, or the first C++ compiler of the search path.

    Raises:
        BackendUnavailableError: there is none.
    """
    override = os.environ.get("CXX")
    for name in [override] if override else COMPILERS:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise BackendUnavailableError(f"no C++ compiler ({override or ', '.join(COMPILERS)} not found)")


def compile_shared(compiler: list[str], flags: Sequence[str], source: Path, output: Path) -> None:
    """Compile one source file to a shared library.

    Raises:
        BackendUnavailableError: the compiler fails, with its first complaint.
    """
    done = _run([*compiler, *flags, str(source), "-o", str(output)], BUILD_SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BackendUnavailableError(f"{compiler[0]} failed: {lines[0].strip()}")


def load_library(name: str, source: Path, headers: Sequence[Path], flags: Sequence[str]) -> ctypes.CDLL:
    """The library of ``source``, compiled for this very processor unless it is in the cache.

    Args:
        name: of the file in the cache, before the key of everything that went into it.
        source: the C++ file.
        headers: what it includes beside the standard library.
        flags: of the compiler, without the choice of processor.

    Raises:
        BackendUnavailableError: there is no compiler, or it fails, or the cache cannot be written.
    """
    compiler = compiler_command()
    version = _run([*compiler, "--version"], 60).stdout
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64", "ppc64le") else "-march=native"
    flags = [*flags, native, "-fPIC", "-shared", "-pthread", "-w"]
    text = b"".join(path.read_bytes() for path in (*headers, source))
    file = f"{name}-{key_of(text, *compiler, version, *flags, _instruction_set())}.so"
    try:
        return ctypes.CDLL(str(cached_file(file, lambda output: compile_shared(compiler, flags, source, output))))
    except OSError as error:
        raise BackendUnavailableError(f"the compiled library cannot be kept or loaded: {error}") from error


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"{command[0]} could not be run: {error}") from error


def _instruction_set() -> str:
    """What distinguishes the processors of machines that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
