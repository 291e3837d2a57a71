"""What each PTX instruction means, as a line of Python over arrays that hold a register of all threads.

From NVIDIA's "Parallel Thread Execution ISA"; an instruction that is not known here is refused, never skipped.
"""

from __future__ import annotations

import re

import numpy as np

DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
       for bits in (8, 16, 32, 64)},
    "f32": np.dtype("f4"), "f16": np.dtype("f2"), "f64": np.dtype("f8"), "pred": np.dtype("?"),
    "bf16": np.dtype("u2"),  # unknown to NumPy: the bits, which are read as float32 and rounded when they are written
}  # fmt: skip


class UnknownInstructionError(ValueError):
    """The kernel holds an instruction whose meaning is not written down here."""


UFUNCS = {
    "sub": "subtract",
    "mul": "multiply",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "add": "add",
    "not": "invert",
    "neg": "negative",
    "abs": "absolute",
}
COMPARISONS = {
    "eq": "{a} == {b}",
    "neu": "{a} != {b}",
    "ne": "({a} < {b}) | ({a} > {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "lt": "{a} < {b}",
    "le": "{a} <= {b}",
    "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "nan": "({a} != {a}) | ({b} != {b})",
    "num": "({a} == {a}) & ({b} == {b})",
}
SPECIAL = {
    "%tid.x": "tid",
    "%ntid.x": "ntid",
    "%nctaid.x": "nctaid",
    "%ctaid.x": "ctaid",
    "%ctaid.y": "ctaid_y",
    "%ctaid.z": "ctaid_z",
}
"""Registers that tell a thread who it is."""
PLAIN = {"rn", "lo", "sync", "to", "approx", "relaxed", "gpu"}
"""Modifiers that change nothing here: approximations are exact, and threads take turns."""


class Instructions:
    """Translates instructions, given which array holds each register."""

    def __init__(self) -> None:
        self.registers: dict[str, np.dtype] = {}
        self.place: dict[str, str] = {}
        """The array of each register."""
        self.symbols: dict[str, int] = {}
        """Where each parameter, table of constants and array in shared memory begins in its space."""
        self.views: set[tuple[str, str]] = set()
        """Arrays and the types that they are seen as."""
        self.literals: dict[str, np.generic] = {}

    # Operands ---------------------------------------------------------------------------------------------------------

    def read(self, operand: str, kind: str) -> str:
        """A Python expression for an operand, as a number of a type."""
        dtype = DTYPES[kind]
        if kind == "bf16":
            return f"from_bf16({self.read(operand, 'u16')})"
        if operand.startswith("%") and operand[1:] in self.registers:
            own = self.registers[operand[1:]]
            if own.itemsize == dtype.itemsize:
                return self.view(operand[1:], kind)
            if own.itemsize < dtype.itemsize or "f" in kind:
                raise UnknownInstructionError(f"{operand} as {kind}")
            return f"{self.place[operand[1:]]}.astype({dtype.str!r})"
        if operand.startswith("%"):
            return SPECIAL[operand]
        if double := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            number: np.generic = np.uint64(int(double[1], 16)).view(np.float64)
        elif bits := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            number = np.uint32(int(bits[1], 16)).view(np.float32 if kind == "f32" else np.uint32)
        elif kind == "pred":
            number = np.bool_(int(operand))
        elif re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
            number = np.array(int(operand, 0) & (2 ** (8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)[()]
        elif operand in self.symbols:
            number = np.uint64(self.symbols[operand])
        else:
            raise UnknownInstructionError(operand)
        name = f"k{len(self.literals)}"
        self.literals[name] = number
        return name

    def view(self, register: str, kind: str) -> str:
        """The array of a register, seen as another type of the same size."""
        self.views.add((self.place[register], kind))
        return f"{self.place[register]}_{kind}"

    def write(self, register: str, kind: str, value: str, mask: str) -> str:
        """A line that sets a register where the mask is; smaller numbers are extended."""
        if kind == "bf16":
            kind, value = "u16", f"to_bf16({value})"
        own = self.registers[register[1:]]
        if own.itemsize == DTYPES[kind].itemsize:
            return f"copyto({self.view(register[1:], kind)}, {value}, where={mask}, casting='unsafe')"
        wide = f"{'s' if kind[0] == 's' else 'u'}{8 * own.itemsize}"
        value = f"asarray({value}).astype({DTYPES[kind].str!r})"
        return f"copyto({self.view(register[1:], wide)}, {value}, where={mask}, casting='unsafe')"

    def arithmetic(self, function: str, kind: str, args: list[str], mask: str) -> str:
        """A line for a function of NumPy whose operands and result are of one type."""
        inputs = ", ".join(self.read(arg, kind) for arg in args[1:])
        return f"{function}({inputs}, out={self.view(args[0][1:], kind)}, where={mask})"

    def address(self, operand: str) -> str:
        """The 64-bit address in brackets; those of shared memory may stand in 32 bits."""
        found = re.fullmatch(r"\[\s*([^+\]]+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise UnknownInstructionError(operand)
        narrow = self.registers.get(found[1][1:]) == DTYPES["u32"]
        base = f"{self.read(found[1], 'u32')}.astype('u8')" if narrow else self.read(found[1], "u64")
        return f"{base} + {self.read(found[2], 'u64')}" if found[2] else base

    # Instructions: modifiers and operands to lines --------------------------------------------------------------------

    def _mov(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        (kind,) = modifiers
        bits = int(kind[1:]) if kind != "pred" else 0
        if args[0].startswith("{"):
            value = self.read(args[1], kind)
            halves = zip(re.findall(r"%?\w+", args[0]), (value, f"{value} >> np.uint{bits}({bits // 2})"), strict=True)
            return [self.write(half, f"u{bits // 2}", shifted, mask) for half, shifted in halves if half != "tmp"]
        if args[1].startswith("{"):
            low, high = (f"asarray({self.read(part, f'u{bits // 2}')}, 'u8')" for part in re.findall(r"%?\w+", args[1]))
            return [
                self.write(args[0], kind, f"({low} | {high} << np.uint64({bits // 2})).astype('u{bits // 8}')", mask)
            ]
        return [self.write(args[0], kind, self.read(args[1], kind), mask)]

    def _mul(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        kind = modifiers[-1]
        if modifiers == ["hi", "u64"]:
            return [
                self.write(args[0], kind, f"high_product({self.read(args[1], kind)}, {self.read(args[2], kind)})", mask)
            ]
        if modifiers[0] in ("wide", "hi"):
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = self.read(args[1], kind), self.read(args[2], kind)
            product = f"multiply({a}, {b}, dtype={DTYPES[wide].str!r})"
            if modifiers[0] == "hi":
                return [self.write(args[0], kind, f"{product} >> {int(kind[1:])}", mask)]
            return [self.write(args[0], wide, product, mask)]
        if not set(modifiers[:-1]) <= PLAIN:
            raise UnknownInstructionError("mul")
        if kind == "bf16":
            return [self.write(args[0], kind, f"{self.read(args[1], kind)} * {self.read(args[2], kind)}", mask)]
        return [self.arithmetic("multiply", kind, args, mask)]

    def _mad(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        kind = modifiers[-1]
        a, b = self.read(args[1], kind), self.read(args[2], kind)
        if modifiers[0] == "wide":
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            product = f"multiply({a}, {b}, dtype={DTYPES[wide].str!r})"
            return [self.write(args[0], wide, f"{product} + {self.read(args[3], wide)}", mask)]
        if modifiers[0] != "lo":
            raise UnknownInstructionError("mad")
        return [self.write(args[0], kind, f"{a} * {b} + {self.read(args[3], kind)}", mask)]

    def _dp2a(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """Two halves of a register times two bytes of another, added to a third."""
        if modifiers != ["lo", "u32", "u32"]:
            raise UnknownInstructionError("dp2a")
        a, b, c = (self.read(arg, "u32") for arg in args[1:])
        low = f"(asarray({a}) & np.uint32(0xFFFF)) * (asarray({b}) & np.uint32(0xFF))"
        high = f"(asarray({a}) >> np.uint32(16)) * (asarray({b}) >> np.uint32(8) & np.uint32(0xFF))"
        return [self.write(args[0], "u32", f"{low} + {high} + {c}", mask)]

    def _fma(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """Rounded twice, to float64 and then to float32, which differs from once in one of some 2^29 cases."""
        if modifiers != ["rn", "f32"]:
            raise UnknownInstructionError("fma")
        a, b, c = (self.read(arg, "f32") for arg in args[1:])
        return [self.write(args[0], "f32", f"multiply({a}, {b}, dtype='f8') + {c}", mask)]

    def _div(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        kind = modifiers[-1]
        a, b = self.read(args[1], kind), self.read(args[2], kind)
        if kind == "f32":
            return [self.write(args[0], kind, f"{a} / {b}", mask)]
        wide = "i8" if kind[0] == "s" else "u8"  # towards zero, as C++ has it
        quotient = f"trunc_divide(asarray({a}, {wide!r}), asarray({b}, {wide!r}))"
        return [self.write(args[0], kind, quotient, mask)]

    def _rem(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        (kind,) = modifiers
        return [self.write(args[0], kind, f"fmod({self.read(args[1], kind)}, {self.read(args[2], kind)})", mask)]

    def _min(self, modifiers: list[str], args: list[str], mask: str, number: int, name: str = "min") -> list[str]:
        (kind,) = modifiers
        return [self.arithmetic(f"f{name}" if kind == "f32" else f"{name}imum", kind, args, mask)]

    def _max(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        return self._min(modifiers, args, mask, number, "max")

    def _shl(self, modifiers: list[str], args: list[str], mask: str, number: int, sign: str = "<<") -> list[str]:
        (kind,) = modifiers
        amount = f"asarray({self.read(args[2], 'u32')}).astype({DTYPES[kind].str!r})"
        return [self.write(args[0], kind, f"{self.read(args[1], kind)} {sign} {amount}", mask)]

    def _shr(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        return self._shl(modifiers, args, mask, number, ">>")

    def _shf(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """A funnel shift of two registers."""
        if modifiers[1:] != ["wrap", "b32"]:
            raise UnknownInstructionError("shf")
        low, high, amount = (self.read(arg, "u32") for arg in args[1:])
        both = f"(({high}.astype('u8') << np.uint64(32)) | {low})"
        by = f"(asarray({amount}).astype('u8') & np.uint64(31))"
        value = f"({both} << {by}) >> np.uint64(32)" if modifiers[0] == "l" else f"{both} >> {by}"
        return [self.write(args[0], "u32", value, mask)]

    def _bfi(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """Bits of the first operand into the second, where and how many as constants."""
        first, count = int(args[3]), int(args[4])
        bits = (2**count - 1 << first) & 0xFFFFFFFF
        inserted, into = self.read(args[1], "u32"), self.read(args[2], "u32")
        value = f"({into} & np.uint32({~bits & 0xFFFFFFFF})) | (({inserted} << np.uint32({first})) & np.uint32({bits}))"
        return [self.write(args[0], "u32", value, mask)]

    def _bfe(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """Bits of a register, where and how many as constants, extended by zeros or by the highest of them."""
        (kind,), first, count = modifiers, int(args[2]), int(args[3])
        if not (kind in ("u32", "s32") and count > 0 and first + count <= 32):
            raise UnknownInstructionError("bfe")
        raised = f"asarray({self.read(args[1], 'u32')} << np.uint32({32 - first - count})).view({DTYPES[kind].str!r})"
        return [self.write(args[0], kind, f"{raised} >> {32 - count}", mask)]

    def _prmt(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """Any four of eight bytes, which ones as a constant."""
        low, high = self.read(args[1], "u32"), self.read(args[2], "u32")
        selector = int(args[3], 0)
        parts = []
        for i in range(4):
            byte = selector >> 4 * i & 7
            if selector >> 4 * i & 8:
                raise UnknownInstructionError("prmt of signs")
            source = low if byte < 4 else high
            parts.append(f"(({source} >> np.uint32({8 * (byte % 4)}) & np.uint32(255)) << np.uint32({8 * i}))")
        return [self.write(args[0], "u32", " | ".join(parts), mask)]

    def _selp(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        (kind,) = modifiers
        a, b, condition = self.read(args[1], kind), self.read(args[2], kind), self.read(args[3], "pred")
        return [self.write(args[0], kind, f"where({condition}, {a}, {b})", mask)]

    def _setp(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        comparison, *combination, kind = modifiers
        if kind[0] != "f" and comparison == "ne":
            comparison = "neu"
        value = COMPARISONS[comparison].format(a=self.read(args[1], kind), b=self.read(args[2], kind))
        if combination:
            sign = {"and": "&", "or": "|", "xor": "^"}[combination[0]]
            value = f"({value}) {sign} {self.read(args[3], 'pred')}"
        return [self.write(args[0], "pred", value, mask)]

    def _cvt(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        *rounding, to, source = modifiers
        value = self.read(args[1], source)
        if to == "bf16x2":  # of two operands, the first into the upper half
            upper, lower = (f"to_bf16({self.read(arg, source)}).astype('u4')" for arg in args[1:])
            return [self.write(args[0], "u32", f"{upper} << np.uint32(16) | {lower}", mask)]
        if to == source == "f32" and rounding in (["rmi"], ["rmi", "ftz"]):
            if "ftz" in rounding:
                value = f"where(abs({value}) < finfo('f4').tiny, 0 * {value}, {value})"
            value = f"floor({value})"
        elif source == "f32" and to[0] in "su":
            value = f"to_integer({value}, {DTYPES[to].str!r}, {rounding[0]!r})"
        elif rounding not in ([], ["rn"]):
            raise UnknownInstructionError("cvt")
        return [self.write(args[0], to, value, mask)]

    def _ex2(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        return [self.write(args[0], "f32", f"exp2({self.read(args[1], 'f32')})", mask)]

    def _copysign(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """The sign of the first."""
        return [self.write(args[0], "f32", f"copysign({self.read(args[2], 'f32')}, {self.read(args[1], 'f32')})", mask)]

    def _rcp(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        return [self.write(args[0], "f32", f"np.float32(1) / {self.read(args[1], 'f32')}", mask)]

    def _cvta(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """A generic address; those of shared memory are only subtracted from each other: loads of them are refused."""
        shift = " + SHARED_AS_GENERIC" if modifiers[0] == "shared" else ""
        return [self.write(args[0], "u64", self.read(args[1], "u64") + shift, mask)]

    def _ld(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        space, *rest, kind = modifiers
        registers = re.findall(r"%\w+", args[0])
        self._check_access(space, rest, len(registers), ("global", "shared", "param", "const"))
        access = f"{mask}, {DTYPES[kind].str!r}, {len(registers)}, {number}, {'nc' in rest}"
        return [f"v = load({space!r}, {self.address(args[1])}, {access})"] + [
            self.write(register, kind, f"v[{i}]", mask) for i, register in enumerate(registers)
        ]

    def _st(self, modifiers: list[str], args: list[str], mask: str, number: int, what: str = "store") -> list[str]:
        space, *rest, kind = modifiers
        space = space.removesuffix("::cta")  # of this block, as shared memory without a cluster is
        values = [self.read(part, kind) for part in re.findall(r"[%\w-]+", args[1])]
        self._check_access(space, rest, len(values), ("global", "shared"))
        return [
            f"{what}({space!r}, {self.address(args[0])}, {mask}, {DTYPES[kind].str!r}, [{', '.join(values)}], {number})"
        ]

    def _check_access(self, space: str, modifiers: list[str], count: int, spaces: tuple[str, ...]) -> None:
        vector = f"v{count}" if count > 1 else None
        if (
            space not in spaces
            or set(modifiers) - {vector, "nc", "relaxed", "gpu"}
            or (vector and vector not in modifiers)
        ):
            raise UnknownInstructionError(".".join([space, *modifiers]))

    def _red(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        if modifiers.pop(modifiers.index("add")) and modifiers[0] != "global":
            raise UnknownInstructionError("red")
        if modifiers[-1] == "bf16":
            modifiers.remove("noftz")
            return self._st(modifiers, args, mask, number, "add_to_bf16")
        return self._st(modifiers, args, mask, number, "add_to")

    def _atom(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """As a reduction: nothing here looks at what was there before, whose register keeps its poison."""
        return self._red(modifiers, args[1:], mask, number)

    def _shfl(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        to, source = args[0].split("|")[0], self.read(args[1], "u32")
        step, clamp, members = (self.read(arg, "u32") for arg in args[2:])
        return [self.write(to, "u32", f"exchange({source}, {step}, {clamp}, {members}, {mask}, {number})", mask)]

    def _match(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        if modifiers != ["any", "sync", "b32"]:
            raise UnknownInstructionError("match")
        value, members = (self.read(arg, "u32") for arg in args[1:])
        return [self.write(args[0], "u32", f"lanes_alike({value}, {members}, {mask}, {number})", mask)]

    def _vote(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        if modifiers != ["sync", "any", "pred"]:
            raise UnknownInstructionError("vote")
        value = f"any_lane({self.read(args[1], 'pred')}, {self.read(args[2], 'u32')}, {mask}, {number})"
        return [self.write(args[0], "pred", value, mask)]

    def _popc(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        """How many bits are set."""
        return [self.write(args[0], "u32", f"bitwise_count({self.read(args[1], modifiers[0])})", mask)]

    def _bar(self, modifiers: list[str], args: list[str], mask: str, number: int) -> list[str]:
        if modifiers == ["warp", "sync"]:
            return [f"warp_is_in_order({mask}, {number}, {self.read(args[0], 'u32')})"]
        if modifiers != ["sync"] or args != ["0"]:
            raise UnknownInstructionError("bar")
        return [f"block_is_in_order({mask})"]
