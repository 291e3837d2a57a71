"""Counts Deformable-DETR's own CUDA kernels, from a copy of their source, as count_ms_deform_attn does ours."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import count_ms_deform_attn as ours
from benchmarks import ms_deform_attn_cases as sizes
from ops.ms_deform_attn import ms_deform_attn
from ops.ms_deform_attn.cuda_compile import compile_source

KERNELS = {
    "forward": ("ms_deformable_im2col_gpu_kernel<float>", 1024),
    "backward": ("ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v1<float, 32>", 32),
}
"""What its launcher takes for 32 channels, and threads of a block."""


def device_part(file: str) -> str:
    """What is for the device: without headers of PyTorch, and up to the functions that launch it.

    Raises:
        ArgumentTypeError: there is no such file, or it holds something else.
    """
    path = Path(file)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{file} does not exist; give Deformable-DETR's ms_deform_im2col_cuda.cuh")
    text = re.sub(r"(?m)^#include.*$", "", path.read_text(errors="replace"))
    launcher = re.search(r"template <typename scalar_t>\s*void ms_deformable_im2col_cuda", text)
    if launcher is None:
        raise argparse.ArgumentTypeError(f"{file} is not Deformable-DETR's ms_deform_im2col_cuda.cuh; give that file")
    return "typedef long long int64_t;\n" + text[: launcher.start()]


def count(source: str, kernel: str, architecture: int, sampled: int) -> tuple[sizes.Inputs, dict[str, Any]]:
    """Inputs of the encoder's size, and the counts of a launch in float32; ``source`` as ``device_part`` returns it.

    Raises:
        AssertionError: the forward's output is not the reference's.
    """
    instance, threads = KERNELS[kernel]
    options = [f"--gpu-architecture=sm_{architecture}", "--generate-line-info", "--device-as-default-execution-space"]
    compiled = compile_source(source, "public.cu", options, instance)
    x = sizes.make_inputs("encoder, grid")
    B, S, H, D = x.value.shape
    Q, L, P = x.locations.shape[1], len(sizes.SHAPES), sizes.POINTS
    shapes = torch.tensor(sizes.SHAPES)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    inputs = [x.value, shapes, starts, x.locations, x.weights]
    outputs = [torch.zeros(B, Q, H, D)]
    if kernel == "backward":
        inputs = [torch.randn(B, Q, H, D), *inputs]
        outputs = [torch.zeros_like(t) for t in (x.value, x.locations, x.weights)]
    elements = B * Q * H * D
    blocks = -(-elements // threads)
    parameter = lay_out([elements, *inputs, B, S, H, D, L, Q, P, *outputs])
    region = ours.executor("ptx_machine").Region
    regions = [
        region(t.data_ptr(), t.nbytes, writable)
        for group, writable in ((inputs, False), (outputs, True))
        for t in group
    ]
    counts = ours.count_launch(compiled, threads, 0, parameter, regions, blocks, sampled * 1024 // threads)
    if kernel == "forward":
        done = outputs[0].view(B, Q, -1).ne(0).any(-1)[0]
        expected = ms_deform_attn(x.value, sizes.SHAPES, x.locations[:, done], x.weights[:, done], backend="reference")
        torch.testing.assert_close(outputs[0].view(B, Q, -1)[:, done], expected, rtol=0, atol=1e-4)
    return x, counts


def lay_out(arguments: list[int | Tensor]) -> bytes:
    """A kernel's parameters in memory: ints, and addresses at multiples of eight."""
    data = b""
    for argument in arguments:
        if isinstance(argument, int):
            data += argument.to_bytes(4, "little")
        else:
            data += bytes(-len(data) % 8) + argument.data_ptr().to_bytes(8, "little")
    return data
