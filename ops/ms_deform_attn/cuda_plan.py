"""How a call of the CUDA kernels is cut into blocks, and what they are compiled for; no GPU is needed here."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_SIDE = 32767
"""Height and width of a map: the backward adds up a window's columns in 32 bits."""
MAX_SAMPLES = 512
"""L*P: those of one query must fit into shared memory, with every architecture's 48 KiB."""
MAX_CHANNELS = 1024
MAX_PIXELS = 2**26
"""Of an image, over all levels: four bits of an index are needed for something else."""
Tiles = tuple[tuple[int, int], ...]
TILES: Tiles = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1))
"""Width and height in queries of a block's tile, largest first."""
HALOS = (4, 3, 2)
"""Pixels around a tile's own that its window takes up, as many as there is room for."""
FORWARD_THREADS = 256
PASS_QUERIES = 32
"""So many queries of a tile the backward holds in shared memory at a time."""
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
    channels: int
    levels: int
    points: int
    reference_size: int
    """2 or 4; 0 for the unfused form."""
    tiled: bool
    """Queries are the pixels, in the same order."""


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
def forward_plan(signature: Signature, tiles: Tiles | None = None, threads: int = FORWARD_THREADS) -> Plan:
    """The forward: the first tile whose samples fit into the shared memory that every architecture has, or the last."""
    samples = signature.levels * signature.points
    for width, height in tiles or (TILES if signature.tiled else TILES[1:]):
        shared = width * height * ((samples | 1) * 16 + 8) + signature.levels * 16
        if shared <= PLAIN_SHARED_BYTES:
            break
    return _plan("forward.cu", signature, (width, height), 1, signature.tiled, threads, shared, ())


@functools.cache
def backward_plan(
    signature: Signature,
    shared_limit: int,
    deterministic: bool,
    tiles: Tiles | None = None,
    halos: tuple[int, ...] = HALOS,
    pass_queries: int = PASS_QUERIES,
    warps: int | None = None,
) -> Plan:
    """The backward: with windows if they fit into ``shared_limit`` bytes of shared memory, if possible twice.

    At most ``pass_queries`` of a tile are held in shared memory at a time.
    """
    extra = (("DETERMINISTIC", str(int(deterministic))),)
    if signature.tiled:
        # A warp for each window, and twice as many that gather.
        threads = 32 * (warps or min(3 * max(signature.levels, 2), 16))
        for limit in (shared_limit // 2 - RESERVED_SHARED_BYTES, shared_limit):
            for tile, halo in itertools.product(tiles or TILES[:3], halos):
                passes = _passes(tile, pass_queries)
                windows = _windows(signature.levels, tile, halo)
                floats = sum(w * h for w, h in windows) * signature.channels
                shared = _backward_bytes(signature, tile, passes, True) + (floats + 3) // 4 * 16
                if shared <= limit:
                    text = "{" + ",".join(f"{{{w},{h}}}" for w, h in windows) + "}"
                    return _plan(
                        "backward.cu", signature, tile, passes, True, threads, shared, (*extra, ("WINDOWS", text))
                    )
    for tile in tiles or TILES[1:]:
        shared = _backward_bytes(signature, tile, 1, False)
        if shared <= PLAIN_SHARED_BYTES:
            break
    return _plan("backward.cu", signature, tile, 1, False, 32 * (warps or 4), shared, extra)


def _windows(levels: int, tile: tuple[int, int], halo: int) -> list[tuple[int, int]]:
    """Width and height of each level's window, for levels that halve from one to the next."""
    margin = 2 * halo + 1
    return [(-(-tile[0] // 2**level) + margin, -(-tile[1] // 2**level) + margin) for level in range(levels)]


def _passes(tile: tuple[int, int], pass_queries: int) -> int:
    """Passes of the backward over a tile, among which the tile's rows are dealt out."""
    return next(
        n
        for n in range(1, tile[1] + 1)
        if tile[1] % n == 0 and (tile[0] * tile[1] // n <= pass_queries or n == tile[1])
    )


def _backward_bytes(signature: Signature, tile: tuple[int, int], passes: int, tiled: bool) -> int:
    """Shared memory of the backward without windows: see ``struct Shared`` of csrc/backward.cu."""
    queries, samples = tile[0] * tile[1] // passes, signature.levels * signature.points
    query = (signature.channels + 3) // 4 * 16 + 8 + (0 if tiled else 4 * (samples | 1))
    sample = 60 if tiled else 28
    return queries * (query + samples * sample) + signature.levels * 24


def _plan(
    source: str,
    signature: Signature,
    tile: tuple[int, int],
    passes: int,
    tiled: bool,
    threads: int,
    shared: int,
    extra: tuple[tuple[str, str], ...],
) -> Plan:
    macros = {
        "VALUE_TYPE": signature.value_type,
        "SAMPLE_TYPE": signature.sample_type,
        "CHANNELS": signature.channels,
        "LEVELS": signature.levels,
        "POINTS": signature.points,
        "FUSED": int(signature.reference_size > 0),
        "REFERENCE_SIZE": signature.reference_size or 2,
        "TILED": int(tiled),
        "TILE_WIDTH": tile[0],
        "TILE_HEIGHT": tile[1],
        "PASSES": passes,
        "THREADS": threads,
    }
    blocks = 2 if tiled and source == "backward.cu" else 1024 // threads  # as the sources' launch bounds
    named = tuple((name, str(number)) for name, number in macros.items())
    if source == "forward.cu":
        named = (*named, ("DETERMINISTIC", "0"))
    return Plan(source, named + extra, tile, tiled, threads, shared, blocks)


@functools.cache
def problem_type(levels: int) -> type[ctypes.Structure]:
    """Mirrors ``struct Problem`` of csrc/samples.cuh."""

    class Problem(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in POINTERS),
            ("pixels", ctypes.c_longlong),
            ("queries", ctypes.c_longlong),
            ("heads", ctypes.c_int),
            ("tiles", ctypes.c_int),
            ("shapes", ctypes.c_int * 4 * levels),
        )

    return Problem


def lay_out(
    plan: Plan, spatial_shapes: Sequence[int], images: int, pixels: int, queries: int, heads: int
) -> tuple[ctypes.Structure, int]:
    """The kernel's argument, pointers not yet set, and the number of blocks."""
    width, height = plan.tile
    levels = len(spatial_shapes) // 2
    problem = problem_type(levels)(pixels=pixels, queries=queries, heads=heads)
    first_pixel = tiles = 0
    for level in range(levels):
        h, w = spatial_shapes[2 * level : 2 * level + 2]
        problem.shapes[level][:] = [h, w, first_pixel, tiles]
        first_pixel += h * w
        tiles += -(-w // width) * -(-h // height)
    if not plan.tiled:
        tiles = -(-queries // (width * height))
    problem.tiles = tiles
    return problem, images * tiles * heads
