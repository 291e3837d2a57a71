"""The CUDA backend: kernels compiled by NVRTC at first use, launched through the driver on the current stream.

Both come with PyTorch's CUDA packages, so that neither a CUDA toolkit nor a C++ compiler nor any header is needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from ctypes import addressof, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.cache import BackendUnavailableError, cached_file, key_of
from ops.ms_deform_attn.arguments import Arguments
from ops.ms_deform_attn.cuda_plan import (
    MAX_CHANNELS,
    MAX_SAMPLES,
    MAX_SIDE,
    TYPES,
    Plan,
    Signature,
    backward_plan,
    forward_plan,
    lay_out,
)

SOURCES = Path(__file__).parent / "csrc"
HEADERS = ("device.cuh", "samples.cuh")
SHARED_MEMORY = "#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]\n"
LOWEST_CAPABILITY = (7, 5)
FIXED_POINT_BITS = 61


def check() -> None:
    """Compile a kernel for the current device, to find out whether that works.

    Raises:
        BackendUnavailableError: it does not; the message says why.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        raise BackendUnavailableError(f"compute capability {capability[0]}.{capability[1]}, at least 7.5 is needed")
    _function(forward_plan(Signature(0, 0, 32, 4, 4, 2, True)), device.index)


def describe(device: torch.device) -> str:
    """One line about the kernels for ``device``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"kernels built by NVRTC {nvrtc_version()} for sm_{major}{minor} ({torch.cuda.get_device_name(device)})"


def supports(value: Tensor, spatial_shapes: Sequence[int], samples: Tensor) -> bool:
    """Whether the kernels can index these tensors and hold one query in shared memory."""
    L, P = samples.shape[3:5]
    fits = L * P <= MAX_SAMPLES and value.shape[3] <= MAX_CHANNELS and max(spatial_shapes) <= MAX_SIDE
    return fits and value.shape[1] < 2**31 and samples.shape[0] * samples.shape[1] * samples.shape[2] < 2**31


def _bindings() -> tuple[Any, Any]:
    """The modules cuda.bindings.nvrtc and cuda.bindings.driver."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise BackendUnavailableError(f"cuda.bindings cannot be imported: {error}") from error
    return nvrtc, driver


def _checked(result: tuple[Any, ...]) -> Any:
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
    nvrtc, _ = _bindings()
    try:
        return ".".join(str(part) for part in _checked(nvrtc.nvrtcVersion()))
    except RuntimeError as error:
        raise BackendUnavailableError(f"NVRTC cannot be loaded: {error}") from error


def compile_kernel(plan: Plan, architecture: int) -> tuple[bytes, str]:
    """The binary of a kernel for one architecture (as 90), and the assembler's report on registers and spills.

    Raises:
        BackendUnavailableError: NVRTC is not installed, does not know the architecture, or fails.
    """
    nvrtc, _ = _bindings()
    source = SHARED_MEMORY + f'#line 1 "{plan.source}"\n' + (SOURCES / plan.source).read_text()
    headers = [(SOURCES / name).read_bytes() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in plan.macros]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), plan.source.encode(), len(headers), headers, names))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        report = log.decode(errors="replace").strip("\0 \n")
        if int(status[0]) != 0:
            errors = re.findall(r".*error.*", report) or [report or str(status[0])]
            raise BackendUnavailableError(f"NVRTC for sm_{architecture}: {errors[0].strip()}")
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary, report


def cached_kernel(plan: Plan, architecture: int) -> bytes:
    """The binary of a kernel, compiled unless it has been before.

    Raises:
        BackendUnavailableError: as ``compile_kernel``.
    """
    sources = b"".join((SOURCES / name).read_bytes() for name in (*HEADERS, plan.source))
    key = key_of(sources, SHARED_MEMORY, nvrtc_version(), str(architecture), *(f"{k}={v}" for k, v in plan.macros))
    name = f"ms_deform_attn-{Path(plan.source).stem}-sm{architecture}-{key}.cubin"

    def build(path: Path) -> None:
        path.write_bytes(compile_kernel(plan, architecture)[0])

    try:
        return cached_file(name, build).read_bytes()
    except OSError:  # no place to keep it: compiled once a process
        return compile_kernel(plan, architecture)[0]


@functools.cache
def _context(device: int) -> Any:
    """The device's primary context, which PyTorch uses; a thread of autograd need not have made it current."""
    _, driver = _bindings()
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@functools.cache
def _function(plan: Plan, device: int) -> Any:
    """The kernel loaded into the device's primary context, which PyTorch uses."""
    _, driver = _bindings()
    major, minor = torch.cuda.get_device_capability(device)
    binary = cached_kernel(plan, 10 * major + minor)
    with torch.cuda.device(device):
        _checked(driver.cuCtxSetCurrent(_context(device)))
        module = _checked(driver.cuModuleLoadData(binary))
        name = f"ms_deform_attn_{Path(plan.source).stem}"
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, plan.shared_bytes))
    return function


def launch(plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
    """Queue a kernel on the device's current stream."""
    _, driver = _bindings()
    function = _function(plan, device.index)
    arguments = (c_void_p * 1)(addressof(problem))
    with torch.cuda.device(device):
        _checked(driver.cuCtxSetCurrent(_context(device.index)))
        stream = torch.cuda.current_stream(device).cuda_stream
        _checked(
            driver.cuLaunchKernel(
                function, blocks, 1, 1, plan.threads, 1, 1, plan.shared_bytes, stream, addressof(arguments), 0
            )
        )


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a device."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def forward(arguments: Arguments) -> Tensor:
    """As ``cpu.forward``."""
    call = _Call(arguments)
    value = arguments.value
    B, Q, H = arguments.samples.shape[:3]
    output = torch.empty(B, Q, H * value.shape[3], dtype=value.dtype, device=value.device)
    call.run(forward_plan(call.signature), output=output)
    return output


def backward(
    grad_output: Tensor, arguments: Arguments, needs_reference: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """As ``cpu.backward``; bitwise repeatable under ``torch.use_deterministic_algorithms``."""
    value, _, valid_sizes, reference, samples, weights = arguments
    call = _Call(arguments)
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = backward_plan(call.signature, shared_limit(value.device), deterministic)
    gradients: dict[str, Tensor] = {
        "grad_value": torch.zeros(
            value.shape, dtype=torch.int64 if deterministic else torch.float32, device=value.device
        ),
        "grad_samples": torch.empty_like(call.samples),
        "grad_weights": torch.empty_like(call.weights),
    }
    if reference is not None and needs_reference:
        heads = (*reference.shape[:2], value.shape[2], reference.shape[2])
        gradients["grad_reference"] = torch.empty(heads, dtype=torch.float32, device=value.device)
    if deterministic and not call.empty:
        gradients["scale"] = _fixed_point_scale(grad_output, None if valid_sizes is not None else weights, samples)
    call.run(plan, grad_output=_aligned(grad_output.to(value.dtype)), **gradients)
    grad_value = gradients["grad_value"]
    if "scale" in gradients:
        grad_value = grad_value * gradients["scale"].reciprocal()  # of a power of two: rounded once, to float32
    grad_reference = gradients.get("grad_reference")
    if grad_reference is not None and reference is not None:
        grad_reference = grad_reference.sum(2).to(reference.dtype)
    return (
        grad_value.to(value.dtype),
        grad_reference,
        gradients["grad_samples"].to(samples.dtype),
        gradients["grad_weights"].to(weights.dtype),
    )


def _fixed_point_scale(grad_output: Tensor, weights: Tensor | None, samples: Tensor) -> Tensor:
    """The power of two by which contributions to ``grad_value`` become integers whose sum cannot overflow.

    Not finite gradients give a scale of 0 or NaN, and with it NaN in the result.
    """
    largest = grad_output.abs().amax().float()
    if weights is not None:
        largest = largest * weights.abs().amax().float()
    contributions = samples.shape[1] * samples.shape[4]  # at most one a sample of the pixel's level
    bits = FIXED_POINT_BITS - contributions.bit_length()
    exponent = bits - largest.clamp_min(1e-30).log2().ceil()
    return exponent.clamp_max(100).exp2()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and fit for 16-byte accesses, which a view into another tensor need not be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _Call:
    """Arguments of one call in the kernels' layout and types."""

    def __init__(self, arguments: Arguments) -> None:
        value, spatial_shapes, valid_sizes, reference, samples, weights = arguments
        dtype = samples.dtype if samples.dtype == weights.dtype and samples.dtype in TYPES else torch.float32
        self.value, self.spatial_shapes = _aligned(value), spatial_shapes
        self.samples, self.weights = _aligned(samples.to(dtype)), _aligned(weights.to(dtype))
        self.reference = None if reference is None else _aligned(reference.float())
        self.valid = None if valid_sizes is None else _aligned(valid_sizes.to(torch.int64))
        B, Q, _, L, P, _ = samples.shape
        size = 0 if reference is None else reference.shape[-1]
        tiled = value.shape[1] == Q
        self.signature = Signature(TYPES[value.dtype], TYPES[dtype], value.shape[3], L, P, size, tiled)
        self.empty = B * Q == 0

    def run(self, plan: Plan, **tensors: Tensor) -> None:
        """Launch the kernel unless there is nothing to do."""
        if self.empty:
            return
        images, pixels, heads, _ = self.value.shape
        problem, blocks = lay_out(plan, self.spatial_shapes, images, pixels, self.samples.shape[1], heads)
        own = {"value": self.value, "valid": self.valid, "reference": self.reference}
        for name, tensor in {**own, "samples": self.samples, "weights": self.weights, **tensors}.items():
            if tensor is not None:
                setattr(problem, name, tensor.data_ptr())
        launch(plan, problem, blocks, self.value.device)
