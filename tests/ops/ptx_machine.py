"""Runs kernels of ``ptx_kernel`` on the CPU: all blocks of a grid at once, with every access to memory checked.

Threads that stand at the same segment run it together; the first segment of the program that any thread stands at comes
first, so that threads which have parted meet again. A thread waits at a barrier for its block and at a shuffle for its
warp. What is not the GPU: approximate instructions are exact, nothing takes time, and threads of a segment run in step,
which is why races are found by who touched a word of shared memory last, not by what comes out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ptx_instructions import DTYPES
from ptx_kernel import END, Kernel
from ptx_numbers import from_bf16, high_product, to_bf16, to_integer, trunc_divide
from ptx_words import NOBODY, Words

Array = NDArray[Any]


class PtxFaultError(AssertionError):
    """A kernel has done what it must not; the message says what, where and by whom."""


class Region(NamedTuple):
    """A piece of global memory that the kernel may use."""

    start: int
    size: int
    writable: bool


class Access(NamedTuple):
    """What an instruction did to global or shared memory."""

    line: int
    space: str
    write: bool
    threads: Array
    """Indices in the grid of those that took part."""
    addresses: Array
    """One a thread: in bytes, of shared memory from the beginning of the block's."""
    size: int
    """Bytes of a thread."""


Observer = Callable[[Access], None]


class Machine:
    """One launch of a kernel: of its grid, the blocks named, each of ``threads`` threads.

    A grid of more than one axis has its sizes in ``grid``; its blocks are counted along the first axis first.

    Raises (``run``):
        PtxFaultError: misaligned, out of bounds, uninitialised, racing, or waiting for ever.
    """

    def __init__(
        self,
        kernel: Kernel,
        threads: int,
        blocks: Sequence[int],
        shared_bytes: int,
        parameter: bytes,
        regions: Sequence[Region],
        observer: Observer | None = None,
        grid: Sequence[int] = (),
    ) -> None:
        self.grid = (*grid, 1, 1) if grid else (max(blocks) + 1, 1, 1)
        self.kernel, self.threads, self.blocks, self.observer = kernel, threads, np.array(blocks), observer
        self.shared_bytes = shared_bytes
        size = threads * len(blocks)
        self.everyone = np.arange(size)
        self.block = (self.everyone // threads).astype(np.int32)
        self.warp = (self.everyone // 32).astype(np.int32)
        self.segment = np.zeros(size, np.int32)
        self.adds = 0
        """Numbers added to global memory."""
        self.issued = np.zeros(len(kernel.segments), np.int64)
        """Times that a warp ran each segment."""
        self.memory = {
            "param": np.frombuffer(parameter.ljust(-(-len(parameter) // 16) * 16, b"\0"), np.uint8),
            "const": np.frombuffer(kernel.constant_bytes.ljust(16, b"\0"), np.uint8),
            "shared": np.full(-(-shared_bytes // 16) * 16 * len(blocks), 0xFF, np.uint8),
        }
        self.stride = -(-shared_bytes // 16) * 16
        self.words = Words(self.stride // 4 * len(blocks))
        self.block_time = np.zeros(len(blocks), np.int32)
        self.warp_time = np.zeros(size // 32, np.int32)
        self.regions = sorted(regions)
        self.starts = np.array([r.start for r in self.regions], np.uint64)
        self.ends = np.array([r.start + r.size for r in self.regions], np.uint64)
        self.bytes = [np.frombuffer((ctypes.c_char * r.size).from_address(r.start), np.uint8) for r in self.regions]
        self.owner = [np.full(r.size // 2 if r.writable else 0, NOBODY, np.int32) for r in self.regions]
        self.names = self._names(size)

    def _names(self, size: int) -> dict[str, Any]:
        """What the kernel's functions see."""
        place = self.blocks[self.block]
        names: dict[str, Any] = {
            **{name: getattr(np, name) for name in dir(np) if not name.startswith("_")},
            "np": np,
            "END": END,
            "SHARED_AS_GENERIC": np.uint64(1 << 47),
            **self.kernel.literals,
            "tid": (self.everyone % self.threads).astype(np.uint32),
            "ctaid": (place % self.grid[0]).astype(np.uint32),
            "ctaid_y": (place // self.grid[0] % self.grid[1]).astype(np.uint32),
            "ctaid_z": (place // self.grid[0] // self.grid[1]).astype(np.uint32),
            "ntid": np.uint32(self.threads),
            "nctaid": np.uint32(self.grid[0]),
            "load": self.load,
            "store": self.store,
            "add_to": self.add_to,
            "add_to_bf16": self.add_to_bf16,
            "leave": self.leave,
            "exchange": self.exchange,
            "lanes_alike": self.lanes_alike,
            "any_lane": self.any_lane,
            "warp_is_in_order": self.warp_is_in_order,
            "block_is_in_order": self.block_is_in_order,
            "from_bf16": from_bf16,
            "to_bf16": to_bf16,
            "high_product": high_product,
            "to_integer": to_integer,
            "trunc_divide": trunc_divide,
        }
        arrays = {name: np.full(size, 0xDD, dtype) for name, dtype in self.kernel.arrays.items() if dtype.kind != "f"}
        arrays |= {name: np.full(size, np.nan, t) for name, t in self.kernel.arrays.items() if t.kind == "f"}
        names |= arrays
        names |= {f"{name}_{kind}": arrays[name].view(DTYPES[kind]) for name, kind in self.kernel.views}
        exec(self.kernel.code, names)
        return names

    def run(self) -> None:
        """Until all threads have left."""
        functions = [self.names[f"segment_{i}"] for i in range(len(self.kernel.segments))]
        with np.errstate(all="ignore"):
            while (current := int(self.segment.min())) != END:
                mask = self._ready(current)
                while mask is not None and mask is not True and not mask.any():
                    later = self.segment[(self.segment > current) & (self.segment != END)]
                    if not len(later):
                        number = self.kernel.segments[int(self.segment.min())].instructions[0].number
                        self.fail(
                            "threads wait for each other for ever", number, np.flatnonzero(self.segment != END)[0]
                        )
                    current = int(later.min())
                    mask = self._ready(current)
                warps = len(self.warp_time) if mask is True else int(mask.reshape(-1, 32).any(1).sum())
                self.issued[current] += warps
                functions[current](mask)

    def _ready(self, current: int) -> Any:
        """Who can run a segment: True for all, else a mask."""
        here = self.segment == current
        if here.all():
            return True
        waits_for = self.kernel.segments[current].waits_for
        if waits_for == "warp":
            here = np.repeat(here.reshape(-1, 32).all(1), 32)
        elif waits_for == "block":
            arrived = here | (self.segment == END)
            here = np.repeat(arrived.reshape(len(self.blocks), -1).all(1), self.threads) & here
        return here

    def executed(self) -> dict[int, int]:
        """Times that a warp has issued the instruction of each line."""
        return {
            instruction.number: int(count)
            for segment, count in zip(self.kernel.segments, self.issued, strict=True)
            for instruction in segment.instructions
        }

    def fail(self, what: str, line: int, thread: int) -> None:
        """Raise, naming instruction and thread."""
        block, inner = self.blocks[thread // self.threads], thread % self.threads
        text = " ".join(self.kernel.text[line].split())
        raise PtxFaultError(f"{what}: block {block}, thread {inner}, line {line + 1}: {text}")

    # What the kernel's functions call ---------------------------------------------------------------------------------

    def leave(self, mask: Any, taken: Any, target: int, following: int) -> None:
        """Set where threads go on."""
        where_to = target if taken is True else np.where(taken, np.int32(target), np.int32(following))
        np.copyto(self.segment, where_to, where=mask)

    def _active(self, address: Any, mask: Any) -> tuple[Array, Array]:
        who = self.everyone if mask is True else np.flatnonzero(mask)
        address = np.asarray(address)
        return who, np.broadcast_to(address, len(who)) if address.ndim == 0 else address[who]

    def load(self, space: str, address: Any, mask: Any, dtype: str, count: int, line: int, read_only: bool) -> Any:
        """A list of arrays: what each thread reads."""
        item = np.dtype(dtype).itemsize
        if space in ("param", "const"):
            who, address = self._active(address, mask)
            self._check_place(address, item * count, line, who, len(self.memory[space]))
            values = self.memory[space].view(dtype)[address // np.uint64(item) + np.arange(count, dtype="u8")[:, None]]
        elif space == "shared":
            who, index = self._in_shared(address, mask, item, count, line, False)
            values = self.memory[space].view(dtype)[index]
        else:
            who, region, index = self._in_global(address, mask, item, count, line, False)
            if read_only and self.regions[region].writable:
                self.fail("read through the cache for constants of what the kernel writes", line, who[0])
            values = self._elements(region, dtype)[index]
        if len(who) == len(self.everyone):
            return values
        result = np.zeros((count, len(self.everyone)), dtype)
        result[:, who] = values
        return result

    def store(self, space: str, address: Any, mask: Any, dtype: str, values: list[Any], line: int) -> None:
        """Write one number or more a thread; threads may write the same one to the same place of shared memory."""
        item = np.dtype(dtype).itemsize
        if space == "shared":
            who, index = self._in_shared(address, mask, item, len(values), line, True)
            memory = self.memory[space].view(dtype)
        else:
            who, region, index = self._in_global(address, mask, item, len(values), line, True)
            memory = self._elements(region, dtype)
            halves = np.arange(item // 2)
            for row in index:
                owners = self.owner[region][row[:, None] * (item // 2) + halves]
                if (other := (owners != NOBODY).any(1) & (owners != who[:, None]).any(1)).any():
                    self.fail("two threads write one address", line, who[other.argmax()])
                self.owner[region][row[:, None] * (item // 2) + halves] = who[:, None]
        for row, value in zip(index, values, strict=True):
            sent = np.broadcast_to(np.asarray(value, dtype), self.everyone.shape)[who]
            memory[row] = sent
            if (lost := memory[row].view(f"u{item}") != sent.view(f"u{item}")).any():
                self.fail("two threads write one address", line, who[lost.argmax()])

    def add_to(self, space: str, address: Any, mask: Any, dtype: str, values: list[Any], line: int) -> None:
        """Add to global memory, one thread after the other."""
        item = np.dtype(dtype).itemsize
        who, region, index = self._in_global(address, mask, item, len(values), line, True)
        for row, value in zip(index, values, strict=True):
            np.add.at(self._elements(region, dtype), row, value[who] if np.ndim(value) else value)
        self.adds += index.size

    def add_to_bf16(self, space: str, address: Any, mask: Any, dtype: str, values: list[Any], line: int) -> None:
        """The same of bfloat16, rounded after each thread."""
        who, region, index = self._in_global(address, mask, 2, len(values), line, True)
        memory = self._elements(region, dtype)
        for row, value in zip(index, values, strict=True):
            added = np.broadcast_to(value, len(self.everyone))[who]
            while len(row):
                _, first = np.unique(row, return_index=True)  # one thread of those that add to the same
                memory[row[first]] = to_bf16(from_bf16(memory[row[first]]) + added[first])
                row, added = np.delete(row, first), np.delete(added, first)
        self.adds += index.size

    def exchange(self, source: Any, step: Any, clamp: Any, members: Any, mask: Any, line: int) -> Array:
        """A butterfly: what the lane has whose number differs by ``step``."""
        self._check_members(members, mask, line)
        if ((np.asarray(clamp) != 31) & mask).any():
            self.fail("a shuffle within parts of a warp", line, 0)
        return np.asarray(source)[self.everyone ^ (np.asarray(step).astype(np.int64) & 31)]

    def lanes_alike(self, value: Any, members: Any, mask: Any, line: int) -> Array:
        """A bit for each lane of the warp that has the same number."""
        self._check_members(members, mask, line)
        lanes = np.broadcast_to(value, len(self.everyone)).reshape(-1, 32)
        alike = lanes[:, :, None] == lanes[:, None, :]
        return (alike * (np.uint32(1) << np.arange(32, dtype=np.uint32))).sum(-1, dtype=np.uint32).ravel()

    def any_lane(self, value: Any, members: Any, mask: Any, line: int) -> Array:
        """Whether any lane of the warp has it."""
        self._check_members(members, mask, line)
        return np.repeat(np.broadcast_to(value, len(self.everyone)).reshape(-1, 32).any(1), 32)

    def _check_members(self, members: Any, mask: Any, line: int) -> None:
        if ((np.asarray(members) != 0xFFFFFFFF) & mask).any():
            self.fail("a part of a warp does together", line, 0)

    def warp_is_in_order(self, mask: Any, line: int, members: Any) -> None:
        """What lanes did to memory comes before what they do next."""
        self._check_members(members, mask, line)
        self.warp_time += True if mask is True else mask[::32]

    def block_is_in_order(self, mask: Any) -> None:
        """The same of a block's threads."""
        self.block_time += True if mask is True else mask.reshape(len(self.blocks), -1).any(1)

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_place(self, address: Array, size: int, line: int, who: Array, limit: int) -> None:
        if (wrong := address % np.uint64(size) != 0).any():
            self.fail(f"misaligned access of {size} bytes", line, who[wrong.argmax()])
        if (wrong := address + np.uint64(size) > limit).any():
            self.fail("out of bounds", line, who[wrong.argmax()])

    def _in_shared(self, address: Any, mask: Any, item: int, count: int, line: int, write: bool) -> tuple[Array, Array]:
        who, address = self._active(address, mask)
        self._check_place(address, item * count, line, who, self.shared_bytes)
        if self.observer:
            self.observer(Access(line, "shared", write, who, address, item * count))
        start = address.astype(np.int64) + self.block[who] * self.stride
        for word in range(max(item * count // 4, 1)):
            fault = self.words.touch(
                start // 4 + word, who.astype(np.int32), self.warp[who], self.block_time[self.block[who]],
                self.warp_time[self.warp[who]], write,
            )  # fmt: skip
            if fault:
                self.fail(fault[0], line, who[fault[1]])
        return who, start // item + np.arange(count)[:, None]

    def _in_global(
        self, address: Any, mask: Any, item: int, count: int, line: int, write: bool
    ) -> tuple[Array, int, Array]:
        who, address = self._active(address, mask)
        if not len(who):
            return who, 0, np.zeros((count, 0), np.int64)
        size = np.uint64(item * count)
        if (wrong := address % size != 0).any():
            self.fail(f"misaligned access of {size} bytes", line, who[wrong.argmax()])
        region = int(np.searchsorted(self.starts, address[0], "right")) - 1
        outside = (address < self.starts[region]) | (address + size > self.ends[region]) | (region < 0)
        if outside.any():
            self.fail("out of bounds", line, who[outside.argmax()])
        if write and not self.regions[region].writable:
            self.fail("an input is written", line, who[0])
        if self.observer:
            self.observer(Access(line, "global", write, who, address, item * count))
        return who, region, (address - self.starts[region]).astype(np.int64) // item + np.arange(count)[:, None]

    def _elements(self, region: int, dtype: str) -> Array:
        data = self.bytes[region]
        return data[: len(data) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize].view(dtype)
