"""How many SASS instructions a kernel executes, estimated from its PTX as executed and from both line tables."""

from __future__ import annotations

import collections
import importlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MEMORY_IN_PTX = r"(ld|st|red|atom)\.(global|shared)|shfl|ex2"
MEMORY_IN_SASS = r"(LDG|STG|LDS|STS|RED|REDG|ATOM|ATOMG|SHFL|MUFU)$"


def lines_of_ptx(ptx: str) -> dict[int, tuple[int, int]]:
    """The source file and line of every line of PTX."""
    found, current = {}, (0, 0)
    for number, line in enumerate(ptx.splitlines()):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            current = int(location[1]), int(location[2])
        found[number] = current
    return found


def lines_of_sass(binary: bytes, ptx: str) -> list[tuple[tuple[int, int], str]] | None:
    """Source line and name of every instruction; None without nvdisasm."""
    tool = shutil.which("nvdisasm")
    if tool is None:
        try:
            tool = str(Path(importlib.import_module("triton").__file__ or "").parent / "backends/nvidia/bin/nvdisasm")
        except ImportError:
            return None
    names = {Path(name).name: int(n) for n, name in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "-g", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found, current = [], (0, 0)
    for line in text.splitlines():
        if location := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            current = names.get(Path(location[1]).name, 0), int(location[2])
        elif (instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ +)?([A-Z]\w*)", line)) and instruction[
            1
        ] != "NOP":
            found.append((current, instruction[1]))
    return found


def innermost_loops(kernel: Any) -> list[tuple[int, int] | None]:
    """First and last segment of the smallest loop around each."""
    loops: list[tuple[int, int] | None] = [None] * len(kernel.segments)
    for last, segment in enumerate(kernel.segments):
        if segment.instructions and segment.instructions[-1].name.startswith("bra"):
            first = kernel.labels[segment.instructions[-1].operands]
            for i in range(first, last + 1):
                known = loops[i]
                if known is None or known[1] - known[0] > last - first:
                    loops[i] = first, last
    return loops


def instructions_executed(kernel: Any, executed: dict[int, int], binary: bytes, ptx: str) -> float:
    """SASS instructions of warps: PTX instructions times what their source lines became.

    A loop that the assembler has unrolled has more of them than it executes: by how much, its accesses to memory tell.
    """
    sass = lines_of_sass(binary, ptx)
    if sass is None:
        return sum(executed.values())
    where = lines_of_ptx(ptx)
    in_sass = collections.Counter(line for line, _ in sass)
    memory_in_sass = collections.Counter(line for line, name in sass if re.match(MEMORY_IN_SASS, name))
    in_ptx, memory_in_ptx, loop_of = collections.Counter[Any](), collections.Counter[Any](), {}
    loops = innermost_loops(kernel)
    lines_in_loop: dict[Any, set[tuple[int, int]]] = collections.defaultdict(set)
    for index, segment in enumerate(kernel.segments):
        for instruction in segment.instructions:
            line = where[instruction.number]
            in_ptx[line] += 1
            memory_in_ptx[line] += bool(re.match(MEMORY_IN_PTX, instruction.name))
            loop_of[instruction.number] = loops[index]
            lines_in_loop[loops[index]].add(line)
    alone = collections.Counter(line for lines in lines_in_loop.values() for line in lines)
    unrolled = {
        loop: max([1.0] + [memory_in_sass[x] / memory_in_ptx[x] for x in lines if memory_in_ptx[x] and alone[x] == 1])
        for loop, lines in lines_in_loop.items()
    }
    unrolled[None] = 1.0
    return sum(
        times * in_sass[where[number]] / in_ptx[where[number]] / unrolled[loop_of[number]]
        for number, times in executed.items()
    )
