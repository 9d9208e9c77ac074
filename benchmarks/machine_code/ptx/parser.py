"""PTX text to instructions: the part of the language that Triton's compiler emits.

Source: "PTX ISA", chapters "Syntax" and "Directives".
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction

__all__ = ["Address", "Instruction", "Kernel", "Operand", "Register", "as_tuple", "parse"]

# Bytes of the types that directives use.
_BYTES = {"pred": 0} | {kind + bits: int(bits) // 8 for kind in "bsuf" for bits in ("8", "16", "32", "64")}


class Register(NamedTuple):
    """A virtual register."""

    number: int
    width: int
    """Bytes; 0 for a predicate."""
    name: str


class Address(NamedTuple):
    """`[base + offset]`; the base is a register, or the name of a parameter or a variable."""

    base: Register | str
    offset: int


# A register, an immediate as an integer (of a float: its bits), a vector of operands, an address, or a name: of a
# label, a special register (%tid.x), a variable, or `_`, which discards.
Operand = Register | Address | int | str | tuple["Operand", ...]


def as_tuple(operand: Operand) -> tuple[Operand, ...]:
    """The operands of a vector, or the one operand."""
    return operand if isinstance(operand, tuple) and not isinstance(operand, Register | Address) else (operand,)


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    text: str
    opcode: str
    """With its modifiers, such as `fma.rn.f32`."""
    guard: tuple[Register, bool] | None
    """The predicate, and the value with which the instruction executes."""
    operands: tuple[Operand, ...]
    place: str
    """File and line of the Triton source."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A parsed kernel. Kernels are equal if they are the same object, so what is made of one can be cached."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    """Names and types (u64, f32, ...)."""
    threads: int
    """Of a program."""
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    """Index of the instruction that follows each label."""
    registers: tuple[Register, ...]
    """By number."""
    constants: dict[str, bytes] = field(default_factory=dict)
    """Initialised variables in global or constant memory."""
    local: dict[str, int] = field(default_factory=dict)
    """Offsets of the variables in a thread's local memory."""
    local_size: int = 0


class _Body:
    """State while the statements of a kernel are read."""

    def __init__(self) -> None:
        self.registers: dict[str, Register] = {}
        self.families: dict[str, int] = {}
        self.all: list[Register] = []
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.local: dict[str, int] = {}
        self.local_size = 0
        self.place = ""

    def declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()  # type: ignore[union-attr]
        if kind not in _BYTES:
            raise UnknownInstruction(f"registers of type .{kind}: `{statement}`")
        for name in (part.strip() for part in names.split(",")):
            if family := re.fullmatch(r"([\w%$]+)<\d+>", name):
                self.families[family[1]] = _BYTES[kind]
            else:
                # Inline assembly declares registers in a scope of its own: a later scope may take the name again.
                self.registers[name] = self.new(name, _BYTES[kind])

    def new(self, name: str, width: int) -> Register:
        self.all.append(Register(len(self.all), width, name))
        return self.all[-1]

    def operand(self, text: str, opcode: str = "") -> Operand:
        text = text.strip()
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            name = self.operand(base)
            if not isinstance(name, Register | str):
                raise UnknownInstruction(f"address {text}")
            return Address(name, int(offset.strip() or "0", 0))
        if text.startswith("{"):
            return tuple(self.operand(part) for part in text[1:-1].split(","))
        if "|" in text:
            return tuple(self.operand(part) for part in text.split("|"))
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]{8,16}", text):
            return int(text[2:], 16)
        if re.fullmatch(r"-?\d\w*", text):
            return int(text.rstrip("U"), 0)
        if re.fullmatch(r"-?\d+\.\d*", text) and (opcode.endswith(".f32") or "createpolicy" in opcode):
            return int.from_bytes(struct.pack("<f", float(text)), "little")
        if text in self.registers:
            return self.registers[text]
        if (family := re.fullmatch(r"(%[a-z]+)\d+", text)) and family[1] in self.families:
            self.registers[text] = self.new(text, self.families[family[1]])
            return self.registers[text]
        if re.fullmatch(r"[%_$a-zA-Z][\w$.]*", text):
            return text
        raise UnknownInstruction(f"operand {text}")

    def instruction(self, statement: str) -> None:
        found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", statement, re.S)
        if found is None:
            raise UnknownInstruction(f"`{statement}`")
        negated, predicate, opcode, rest = found.groups()
        guard = None
        if predicate:
            register = self.operand(predicate)
            if not isinstance(register, Register):
                raise UnknownInstruction(f"predicate {predicate}")
            guard = (register, not negated)
        # Commas outside of braces and brackets.
        parts = [part for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
        operands = tuple(self.operand(part, opcode) for part in parts)
        text = re.sub(r"\s+", " ", statement)
        self.code.append(Instruction(text, opcode, guard, operands, self.place))


def _statements(text: str) -> list[str]:
    """Statements, labels (with their colon) and braces of scopes, one after another."""
    found: list[str] = []
    position = 0
    pattern = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)|(\.loc\b[^\n]*)|([^;]*);)", re.S)
    while match := pattern.match(text, position):
        position = match.end()
        found.append(next(group for group in match.groups() if group is not None).strip())
    if text[position:].strip():
        raise UnknownInstruction(f"`{text[position:].strip()[:80]}`")
    return found


def _end_of_scope(text: str, start: int) -> int:
    """Index of the brace that closes the scope in which `start` lies."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise UnknownInstruction("a kernel without end")


def _variables(text: str) -> dict[str, bytes]:
    """Variables of the module that have a value."""
    found = {}
    pattern = r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[\d*\])?\s*=\s*\{?([^;}]*)\}?;"
    for kind, name, values in re.findall(pattern, text):
        size = _BYTES[kind]
        numbers = (int(value.strip().rstrip("U"), 0) for value in values.split(","))
        found[name] = b"".join((number % (1 << 8 * size)).to_bytes(size, "little") for number in numbers)
    return found


@functools.lru_cache(maxsize=512)
def parse(ptx: str) -> Kernel:
    """The kernel of a module that has one.

    Args:
        ptx: a module, as in `asm["ptx"]` of a compiled Triton kernel.

    Raises:
        UnknownInstruction: something that Triton's compiler was not seen to emit. Opcodes are looked up later, by
            `instructions.decode`.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    entries = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(entries) != 1 or ".func" in text:
        raise UnknownInstruction(f"a module with {len(entries)} kernels or with functions; expected one kernel alone")
    name, parameters, directives = entries[0].groups()
    source = text[entries[0].end() : _end_of_scope(text, entries[0].end())]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives, re.M)
    if threads is None:
        raise UnknownInstruction(f"kernel {name} without a line `.reqntid THREADS` of one dimension")
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", text)}
    body = _Body()
    for statement in _statements(source):
        if re.match(r"\.loc\b", statement):
            # Behind the line of a function that was inlined stands that of its call.
            lines = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", statement)
            body.place = ", called at ".join(f"{files.get(number, 'source')}:{line}" for number, line in lines)
        elif statement.endswith(":"):
            body.labels[statement[:-1]] = len(body.code)
        elif statement.startswith(".reg"):
            body.declare(statement)
        elif local := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement):
            body.local_size += -body.local_size % int(local[1])
            body.local[local[2]] = body.local_size
            body.local_size += int(local[3])
        elif statement.startswith("."):
            if not statement.startswith(".pragma"):
                raise UnknownInstruction(f"directive `{statement}`")
        elif statement and statement not in "{}":
            body.instruction(statement)
    return Kernel(
        name,
        tuple((name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", parameters.strip())),
        int(threads[1]),
        tuple(body.code),
        body.labels,
        tuple(body.all),
        _variables(text),
        body.local,
        body.local_size,
    )
