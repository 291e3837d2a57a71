"""CUDA sources to binaries by NVRTC, which needs neither a CUDA toolkit nor a GPU, nor any header."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ops.cache import BackendUnavailableError, cached_file, key_of
from ops.ms_deform_attn.cuda_plan import Plan

SOURCES = Path(__file__).parent / "csrc"
HEADERS = ("device.cuh", "samples.cuh", "backward.cuh", "sorted.cuh", "direct.cuh")
SHARED_MEMORY = "#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]\n"


def bindings() -> tuple[Any, Any]:
    """The modules cuda.bindings.nvrtc and cuda.bindings.driver."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise BackendUnavailableError(f"cuda.bindings cannot be imported: {error}") from error
    return nvrtc, driver


def checked(result: tuple[Any, ...]) -> Any:
    """The values of a call of cuda.bindings, which come behind its status.

    Raises:
        BackendUnavailableError: the status is not success.
    """
    status, *values = result
    if int(status) != 0:
        raise BackendUnavailableError(f"{status.name} ({int(status)})")
    return values[0] if len(values) == 1 else values


@functools.cache
def nvrtc_version() -> str:
    """As ``13.2``.

    Raises:
        BackendUnavailableError: the library is not installed.
    """
    nvrtc, _ = bindings()
    try:
        return ".".join(str(part) for part in checked(nvrtc.nvrtcVersion()))
    except RuntimeError as error:
        raise BackendUnavailableError(f"NVRTC cannot be loaded: {error}") from error


class Compiled(NamedTuple):
    """What the compiler makes of a kernel."""

    binary: bytes
    ptx: str
    report: str
    """The assembler's on registers and spills."""


def compile_kernel(plan: Plan, architecture: int, options: Sequence[str] = ()) -> Compiled:
    """Compile a kernel for one architecture (as 90).

    Raises:
        BackendUnavailableError: NVRTC is not installed, does not know the architecture, or fails.
    """
    nvrtc, _ = bindings()
    source = SHARED_MEMORY + f'#line 1 "{plan.source}"\n' + (SOURCES / plan.source).read_text()
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v", *options]
    options += [f"-D{name}={value}" for name, value in plan.macros]
    headers = [(SOURCES / name).read_bytes() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), plan.source.encode(), len(headers), headers, names))

    def output(kind: str) -> bytes:
        data = b" " * checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
        checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, data))
        return data

    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        report = output("ProgramLog").decode(errors="replace").strip("\0 \n")
        if int(status[0]) != 0:
            errors = re.findall(r".*error.*", report) or [report or str(status[0])]
            raise BackendUnavailableError(f"NVRTC for sm_{architecture}: {errors[0].strip()}")
        return Compiled(output("CUBIN"), output("PTX").decode().rstrip("\0"), report)
    finally:
        checked(nvrtc.nvrtcDestroyProgram(program))


def architectures() -> list[int]:
    """Those that NVRTC knows, as 90.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
    """
    nvrtc, _ = bindings()
    return sorted(int(architecture) for architecture in checked(nvrtc.nvrtcGetSupportedArchs()))


def architecture_for(capability: tuple[int, int]) -> int:
    """The newest architecture that NVRTC knows and a device can run: binaries run upwards within a major number.

    Raises:
        BackendUnavailableError: NVRTC is not installed, or knows none of that major number that is old enough.
    """
    major, minor = capability
    fitting = [architecture for architecture in architectures() if 10 * major <= architecture <= 10 * major + minor]
    if not fitting:
        raise BackendUnavailableError(f"NVRTC {nvrtc_version()} does not know compute capability {major}.{minor}")
    return max(fitting)


def cached_kernel(plan: Plan, architecture: int) -> bytes:
    """The binary of a kernel, compiled unless it has been before.

    Raises:
        BackendUnavailableError: as ``compile_kernel``.
    """
    sources = b"".join((SOURCES / name).read_bytes() for name in (*HEADERS, plan.source))
    key = key_of(sources, SHARED_MEMORY, nvrtc_version(), str(architecture), *(f"{k}={v}" for k, v in plan.macros))
    name = f"ms_deform_attn-{Path(plan.source).stem}-sm{architecture}-{key}.cubin"

    def build(path: Path) -> None:
        path.write_bytes(compile_kernel(plan, architecture).binary)

    try:
        return cached_file(name, build).read_bytes()
    except OSError:  # no place to keep it: compiled once a process
        return compile_kernel(plan, architecture).binary
