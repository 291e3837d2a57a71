"""PTX of one kernel to Python functions over NumPy arrays that hold a register of all threads of a grid.

The kernel is cut into segments of which a thread runs all instructions or none: at labels, behind branches, and before
every instruction that waits for other threads. ``ptx_machine`` decides who runs which segment when.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from types import CodeType
from typing import NamedTuple

import numpy as np
from ptx_instructions import DTYPES, PLAIN, UFUNCS, Instructions, UnknownInstructionError

END = np.iinfo(np.int32).max
"""The segment of threads that have left the kernel."""


@dataclass
class Segment:
    """Instructions in a row, whom they wait for first, and the Python lines that stand for them."""

    waits_for: str = ""
    """``warp`` or ``block`` if all threads of one must have come here before any goes on."""
    instructions: list[Instruction] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class Instruction(NamedTuple):
    """One line of PTX, taken apart."""

    number: int
    negated: str
    guard: str | None
    name: str
    operands: str

    @property
    def ends_segment(self) -> bool:
        """Whether it says where its threads go on."""
        return self.name.split(".")[0] in ("bra", "ret", "exit")

    @property
    def waits_for(self) -> str:
        """As of a segment."""
        if self.name in ("bar.sync", "barrier.sync"):
            return "block"
        return "warp" if self.name.startswith(("shfl.sync", "bar.warp", "match.", "vote.")) else ""

    @property
    def registers(self) -> list[str]:
        """All that it names."""
        return re.findall(r"%(\w+)", self.operands) + ([self.guard] if self.guard else [])


class Kernel(Instructions):
    """A kernel that can be run."""

    def __init__(self, ptx: str) -> None:
        self.text = ptx.splitlines()
        super().__init__()
        self.constant_bytes = b""
        self.parameter_bytes = self.static_shared = 0
        self.arrays: dict[str, np.dtype] = {}
        """That hold registers."""
        self.segments = [Segment()]
        self.labels: dict[str, int] = {}
        self._read()
        self.place = self._places()
        for index, segment in enumerate(self.segments):
            for instruction in segment.instructions:
                segment.lines += self._translate(instruction, index)
        self.code = self._compile()

    def _read(self) -> None:
        inside = False
        for number, raw in enumerate(self.text):
            line = re.sub(r"//.*", "", raw).strip()
            line = re.sub(r"^\{ \.reg \.b\d+ tmp; (.*) \}$", r"\1", line)  # half of a register, which nobody reads
            if table := re.match(r"\.const .*\.b8 (\w+)\[(\d+)\] = \{(.*)\};", line):
                self._add_constant(table[1], int(table[2]), table[3])
            elif parameter := re.match(
                r"\.param (?:\.align \d+ )?\.\w?(\d+) (?:\.ptr .* )?(\w+)(?:\[(\d+)\])?,?$", line
            ):
                size = int(parameter[1]) // 8
                self.symbols[parameter[2]] = offset = -(-self.parameter_bytes // size) * size
                self.parameter_bytes = offset + size * int(parameter[3] or 1)
            elif array := re.match(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];", line):
                self.symbols[array[2]] = -(-self.static_shared // int(array[1])) * int(array[1])
                self.static_shared = self.symbols[array[2]] + int(array[3] or 0)
            elif declared := re.match(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line):
                inside = True
                dtype = DTYPES[declared[1]]
                self.registers.update({f"{declared[2]}{i}": dtype for i in range(int(declared[3]))})
            elif inside and (label := re.fullmatch(r"(\$\w+):", line)):
                if self.segments[-1].instructions:
                    self.segments.append(Segment())
                self.labels[label[1]] = len(self.segments) - 1
            elif inside and line and line not in "{}" and not line.startswith("."):
                found = re.fullmatch(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?;", line)
                if not found:
                    raise UnknownInstructionError(line)
                self._append(Instruction(number, found[1], found[2], found[3], found[4] or ""))

    def _append(self, instruction: Instruction) -> None:
        if instruction.waits_for and self.segments[-1].instructions:
            self.segments.append(Segment())
        self.segments[-1].waits_for = self.segments[-1].waits_for or instruction.waits_for
        self.segments[-1].instructions.append(instruction)
        if instruction.ends_segment:
            self.segments.append(Segment())

    def _places(self) -> dict[str, str]:
        """The array of each register: registers that one segment alone names take turns with a few."""
        used_by = defaultdict(set)
        for index, segment in enumerate(self.segments):
            for instruction in segment.instructions:
                for register in instruction.registers:
                    used_by[register].add(index)
        place: dict[str, str] = {}
        for segment in self.segments:
            last = {r: i for i, instruction in enumerate(segment.instructions) for r in instruction.registers}
            free: dict[np.dtype, list[str]] = defaultdict(list)
            counts: dict[np.dtype, int] = defaultdict(int)
            for i, instruction in enumerate(segment.instructions):
                for register in instruction.registers:
                    if register in place or register not in self.registers:
                        continue
                    dtype = self.registers[register]
                    if len(used_by[register]) > 1:
                        place[register] = register
                    elif free[dtype]:
                        place[register] = free[dtype].pop()
                    else:
                        place[register] = f"local_{dtype.str[1:].replace('?', '')}_{counts[dtype]}"
                        counts[dtype] += 1
                    self.arrays[place[register]] = dtype
                for register in set(instruction.registers):
                    if register in self.registers and len(used_by[register]) == 1 and last[register] == i:
                        free[self.registers[register]].append(place[register])
        return place

    def _add_constant(self, name: str, size: int, values: str) -> None:
        data = bytes(int(value) & 255 for value in values.split(","))
        self.symbols[name] = len(self.constant_bytes)
        self.constant_bytes += data.ljust(-(-size // 16) * 16, b"\0")

    def _translate(self, instruction: Instruction, segment: int) -> list[str]:
        """The lines of Python."""
        operation, *modifiers = instruction.name.split(".")
        mask, lines = "m", []
        if instruction.guard:
            mask = "g"
            lines.append(f"g = m & {'~' * bool(instruction.negated)}{self.read('%' + instruction.guard, 'pred')}")
        if instruction.ends_segment:
            target = self.labels[instruction.operands] if operation == "bra" else END
            return [*lines, f"leave(m, {mask if instruction.guard else True}, {target}, {segment + 1})"]
        pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", instruction.operands)
        args = [piece.strip() for piece in pieces if piece.strip()]
        try:
            method = getattr(self, f"_{operation}", None)
            if method is not None:
                return lines + method(modifiers, args, mask, instruction.number)
            if operation in UFUNCS and set(modifiers[:-1]) <= PLAIN:
                return [*lines, self.arithmetic(UFUNCS[operation], modifiers[-1], args, mask)]
            raise UnknownInstructionError(instruction.name)
        except (KeyError, IndexError, ValueError) as error:
            text = self.text[instruction.number].strip()
            raise UnknownInstructionError(f"line {instruction.number + 1}: {text} ({error})") from error

    def _compile(self) -> CodeType:
        """One function a segment; a grid's arrays are their global names."""
        source = []
        for index, segment in enumerate(self.segments):
            if not (segment.instructions and segment.instructions[-1].ends_segment):
                segment.lines.append(f"leave(m, True, {index + 1}, {index + 1})")
            source.append(f"def segment_{index}(m):\n" + "\n".join(f"    {line}" for line in segment.lines) + "\n")
        return compile("\n".join(source), "<ptx>", "exec")
