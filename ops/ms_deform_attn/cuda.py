"""The CUDA backend: kernels compiled by NVRTC at first use, launched through the driver on the current stream.

Both come with PyTorch's CUDA packages, so that neither a CUDA toolkit nor a C++ compiler nor any header is needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.cache import BackendUnavailableError
from ops.ms_deform_attn.arguments import Arguments
from ops.ms_deform_attn.cuda_compile import architecture_for, bindings, cached_kernel, checked, nvrtc_version
from ops.ms_deform_attn.cuda_plan import (
    MAX_CHANNELS,
    MAX_PIXELS,
    MAX_SAMPLES,
    MAX_SIDE,
    MAX_SORTED_PIXELS,
    TYPES,
    Plan,
    Signature,
    backward_plan,
    forward_plan,
    lay_out,
)

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
    _function(forward_plan(Signature(0, 0, 8, 32, 4, 4, 2, True)), device.index)


def describe(device: torch.device) -> str:
    """One line about the kernels for ``device``."""
    architecture = architecture_for(torch.cuda.get_device_capability(device))
    return f"kernels built by NVRTC {nvrtc_version()} for sm_{architecture} ({torch.cuda.get_device_name(device)})"


def supports(value: Tensor, spatial_shapes: Sequence[int], samples: Tensor) -> bool:
    """Whether the kernels can index these tensors and hold one query in shared memory."""
    L, P = samples.shape[3:5]
    fits = L * P <= MAX_SAMPLES and value.shape[3] <= MAX_CHANNELS and max(spatial_shapes) <= MAX_SIDE
    return fits and value.shape[1] < MAX_PIXELS and samples.shape[0] * samples.shape[1] * samples.shape[2] < 2**31


@functools.cache
def _context(device: int) -> Any:
    """The device's primary context, which PyTorch uses; a thread of autograd need not have made it current."""
    _, driver = bindings()
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device))))


@functools.cache
def _function(plan: Plan, device: int) -> Any:
    """The kernel loaded into the device's primary context, which PyTorch uses."""
    _, driver = bindings()
    binary = cached_kernel(plan, architecture_for(torch.cuda.get_device_capability(device)))
    properties: Any = torch.cuda.get_device_properties(device)
    names = driver.CUfunction_attribute
    attributes = {
        names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: plan.shared_bytes,
        names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: plan.carve_out(
            properties.shared_memory_per_multiprocessor
        ),
    }
    with torch.cuda.device(device):
        checked(driver.cuCtxSetCurrent(_context(device)))
        with _while_capturing(driver):
            module = checked(driver.cuModuleLoadData(binary))
            name = f"ms_deform_attn_{Path(plan.source).stem}"
            function = checked(driver.cuModuleGetFunction(module, name.encode()))
            for attribute, wanted in attributes.items():
                checked(driver.cuFuncSetAttribute(function, attribute, wanted))
    return function


@contextlib.contextmanager
def _while_capturing(driver: Any) -> Iterator[None]:
    """Allow this thread what a graph's capture forbids by default: loading a kernel is no work of a stream."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before))


def occupancy(plan: Plan, device: torch.device) -> int:
    """Blocks of a kernel that a multiprocessor of the device has room for at a time."""
    _, driver = bindings()
    function = _function(plan, device.index)
    with torch.cuda.device(device):
        return int(
            checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, plan.threads, plan.shared_bytes))
        )


def launch(plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
    """Queue a kernel on the device's current stream."""
    _, driver = bindings()
    function = _function(plan, device.index)
    arguments = (c_void_p * 1)(addressof(problem))
    with torch.cuda.device(device):
        checked(driver.cuCtxSetCurrent(_context(device.index)))
        stream = torch.cuda.current_stream(device).cuda_stream
        checked(
            driver.cuLaunchKernel(
                function, blocks, 1, 1, plan.threads, 1, 1, plan.shared_bytes, stream, addressof(arguments), 0
            )
        )


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a device."""
    properties: Any = torch.cuda.get_device_properties(device)  # not all stubs name this one
    return int(properties.shared_memory_per_block_optin)


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
    signature = call.signature._replace(tiled=call.signature.tiled and value.shape[1] < MAX_SORTED_PIXELS)
    plan = backward_plan(signature, shared_limit(value.device), deterministic)
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
    together = 1 if deterministic else min(signature.vector, 4)
    if "scale" in gradients or together < signature.vector:
        # From the order of csrc/backward.cuh, while the type changes anyway.
        sums = grad_value.unflatten(3, (signature.vector // together, -1, together)).transpose(3, 4)
        grad_value = torch.empty(sums.shape, dtype=torch.float32 if deterministic else value.dtype, device=value.device)
        if "scale" in gradients:  # a power of two: rounded once, to float32
            torch.mul(sums, gradients["scale"].reciprocal(), out=grad_value)
        else:
            grad_value.copy_(sums)
        grad_value = grad_value.view(value.shape)
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
        H, D = value.shape[2:]
        self.signature = Signature(TYPES[value.dtype], TYPES[dtype], H, D, L, P, size, tiled)
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
