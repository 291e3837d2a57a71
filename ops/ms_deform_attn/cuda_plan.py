"""How a call of the CUDA kernels is cut into blocks, and what they are compiled for; no GPU is needed here."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_SIDE = 32767
"""Height and width of a map."""
MAX_SAMPLES = 512
"""L*P: those of one query must fit into shared memory, with every architecture's 48 KiB."""
MAX_CHANNELS = 1024
MAX_PIXELS = 2**26
"""Of an image, over all levels: four bits of an index are needed for something else."""
MAX_SORTED_PIXELS = 2**20 - 1
"""The same where the backward sorts taps: it needs twelve bits, and a number for none."""
MAX_SORTED_SAMPLES = 1024
"""Of a block's queries and all levels."""
Tiles = tuple[tuple[int, int], ...]
TILES: Tiles = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1))
"""Width and height in queries of a block's tile, largest first."""
SORTED_BLOCKS = 3
"""At most so many blocks a multiprocessor are to have registers: 80 for each of 256 threads. Float32
without determinism asks for one more, in smaller tiles that leave shared memory for it: faster on an H100."""
PLAIN_SHARED_BYTES = 48 * 1024
RESERVED_SHARED_BYTES = 1024
"""Of each block, for the system."""

POINTERS = (
    *("value", "valid", "reference", "samples", "weights", "output"),
    *("grad_output", "grad_value", "grad_samples", "grad_weights", "grad_reference", "scale"),
)


class Signature(NamedTuple):
    """What a kernel is specialised for."""

    value_type: int
    sample_type: int
    heads: int
    channels: int
    levels: int
    points: int
    reference_size: int
    """2 or 4; 0 for the unfused form."""
    tiled: bool
    """Queries are the pixels, in the same order."""

    @property
    def vector(self) -> int:
        """Channels that a lane reads at a time."""
        return math.gcd(self.channels, 4 if self.value_type == 0 else 8)

    @property
    def lanes(self) -> int:
        """That read a row, a power of two."""
        return min(1 << (self.channels // self.vector - 1).bit_length(), 32)


class Plan(NamedTuple):
    """A kernel and how to launch it."""

    source: str
    macros: tuple[tuple[str, str], ...]
    tile: tuple[int, int]
    tiled: bool
    threads: int
    shared_bytes: int
    blocks: int
    """That a multiprocessor is to have at a time."""

    def carve_out(self, limit: int) -> int:
        """How much of ``limit``, a multiprocessor's shared memory, its blocks need, in per cent: the rest is cache."""
        return min(100, -(-100 * self.blocks * (self.shared_bytes + RESERVED_SHARED_BYTES) // limit))


@functools.cache
def forward_plan(signature: Signature, tiles: Tiles | None = None, threads: int | None = None) -> Plan:
    """The forward: the first tile whose samples fit into the shared memory that every architecture has, or the last."""
    for width, height in tiles or TILES[0 if signature.tiled else 2 :]:
        shared = _forward_bytes(signature, width * height)
        if shared <= PLAIN_SHARED_BYTES:
            break
    extra = (("DETERMINISTIC", "0"),)
    threads = threads or (32 * min(max(signature.lanes, 4), 8) if signature.tiled else 128)
    return _plan("forward.cu", signature, (width, height), signature.tiled, threads, shared, 1024 // threads, extra)


@functools.cache
def backward_plan(
    signature: Signature,
    shared_limit: int,
    deterministic: bool,
    tiles: Tiles | None = None,
    warps: int | None = None,
    blocks: int | None = None,
) -> Plan:
    """The backward: with sorted taps if they fit into ``shared_limit`` bytes of shared memory, if possible twice."""
    if signature.tiled:
        warps_sorted = warps or min(2 * max(signature.levels, 2), 16)
        many = int(signature.value_type == 0 and not deterministic)
        blocks = blocks or SORTED_BLOCKS + many
        for limit in (shared_limit // 2 - RESERVED_SHARED_BYTES, shared_limit):
            for tile in tiles or TILES[many:3]:
                shared = _backward_bytes(signature, tile, warps_sorted)
                if shared <= limit and tile[0] * tile[1] * signature.levels * signature.points <= MAX_SORTED_SAMPLES:
                    fitting = max((shared_limit + RESERVED_SHARED_BYTES) // (shared + RESERVED_SHARED_BYTES), 1)
                    together = min(blocks, fitting, 1024 // (32 * warps_sorted))
                    return _backward_plan(signature, deterministic, tile, True, warps_sorted, shared, together)
    warps = warps or 4
    for tile in tiles or TILES[3:]:
        shared = _backward_bytes(signature, tile, 0)
        if shared <= PLAIN_SHARED_BYTES:
            break
    return _backward_plan(signature, deterministic, tile, False, warps, shared, 32 // warps)


def _forward_bytes(signature: Signature, queries: int) -> int:
    """Shared memory of the forward: see ``struct Shared`` of csrc/forward.cu."""
    narrow = signature.channels // signature.vector <= 4
    padding = (1 + (signature.points % 2 == 0)) * narrow
    return 16 * signature.levels + 8 * queries * (signature.levels * signature.points + padding)


def _backward_bytes(signature: Signature, tile: tuple[int, int], sorting_warps: int) -> int:
    """Shared memory of the backward: see ``struct Shared`` of csrc/backward.cuh."""
    queries, item = tile[0] * tile[1], 4 if signature.value_type == 0 else 2
    level_samples = queries * signature.points
    rows = (queries + (sorting_warps > 0)) * signature.channels * item
    tables = signature.levels * (level_samples + (8 if sorting_warps else 0))
    dots = -(-tables // 32) * 32 if sorting_warps else tables + 8
    groups = 32 // signature.lanes
    entries = groups * -(-level_samples // (4 * groups)) * 4
    lists = sorting_warps * entries * 8
    small = 16 * signature.levels + (sorting_warps * 64 * 4 or 4 * queries)
    return -(-rows // 16) * 16 + 16 * dots + small + lists + (20 if sorting_warps else 16) * tables


def _backward_plan(
    signature: Signature,
    deterministic: bool,
    tile: tuple[int, int],
    sort: bool,
    warps: int,
    shared: int,
    blocks: int,
) -> Plan:
    extra = (("DETERMINISTIC", str(int(deterministic))), ("SORTED", str(int(sort))))
    return _plan("backward.cu", signature, tile, sort, 32 * warps, shared, blocks, extra)


def _plan(
    source: str,
    signature: Signature,
    tile: tuple[int, int],
    tiled: bool,
    threads: int,
    shared: int,
    blocks: int,
    extra: tuple[tuple[str, str], ...],
) -> Plan:
    macros = {
        "VALUE_TYPE": signature.value_type,
        "SAMPLE_TYPE": signature.sample_type,
        "HEADS": signature.heads,
        "CHANNELS": signature.channels,
        "LEVELS": signature.levels,
        "POINTS": signature.points,
        "FUSED": int(signature.reference_size > 0),
        "REFERENCE_SIZE": signature.reference_size or 2,
        "TILED": int(tiled),
        "TILE_WIDTH": tile[0],
        "TILE_HEIGHT": tile[1],
        "THREADS": threads,
        "BLOCKS": blocks,
    }
    named = tuple((name, str(number)) for name, number in macros.items())
    return Plan(source, named + extra, tile, tiled, threads, shared, blocks)


@functools.cache
def problem_type(levels: int) -> type[ctypes.Structure]:
    """Mirrors ``struct Problem`` of csrc/samples.cuh."""

    class Problem(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in POINTERS),
            ("pixels", ctypes.c_longlong),
            ("queries", ctypes.c_longlong),
            ("tiles", ctypes.c_int),
            ("shift", ctypes.c_int),
            ("shapes", ctypes.c_int * 4 * levels),
        )

    return Problem


def lay_out(
    plan: Plan, spatial_shapes: Sequence[int], images: int, pixels: int, queries: int, heads: int
) -> tuple[ctypes.Structure, int]:
    """The kernel's argument, pointers not yet set, and the number of blocks."""
    width, height = plan.tile
    levels = len(spatial_shapes) // 2
    problem = problem_type(levels)(pixels=pixels, queries=queries)
    first_pixel = tiles = 0
    for level in range(levels):
        h, w = spatial_shapes[2 * level : 2 * level + 2]
        problem.shapes[level][:] = [h, w, first_pixel, tiles]
        first_pixel += h * w
        tiles += -(-w // width) * -(-h // height)
    if not plan.tiled:
        tiles = -(-queries // (width * height))
    problem.tiles = tiles
    problem.shift = min(19, 28 - (max(spatial_shapes) + 1).bit_length())
    return problem, images * tiles * heads
