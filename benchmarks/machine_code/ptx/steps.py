"""From instructions to steps: functions that do to programs what an instruction does.

Arithmetic is looked up in `instructions`. Moves, accesses to memory and shuffles are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from denim.benchmarks.machine_code.ptx.forms import TYPES, Form
from denim.benchmarks.machine_code.ptx.instructions import decode
from denim.benchmarks.machine_code.ptx.parser import Address, Instruction, Operand, Register, as_tuple
from denim.benchmarks.machine_code.ptx.programs import BITS, WARP, Array, Mask, Programs
from denim.benchmarks.machine_code.ptx.traps import DivisionByZero, OutOfBounds, PartialWarp, UnknownInstruction

__all__ = ["Step", "step"]

Step = Callable[[Programs, Mask], None]
"""Changes programs where lanes execute."""
_Read = Callable[[Programs, Mask], Array]

_ACCESS = re.compile(
    r"(ld|st)(?:\.(?:volatile|weak|relaxed\.\w+))?\.(param|global|shared|local|const)(?:::cta)?"
    r"(?:\.(?:nc|ca|cg|cs|lu|cv|wb|wt|L1::\w+|L2::\w+))*(?:\.v[248])?\.(\w+)"
)
_CARRY = re.compile(r"(?:mad(c?)\.(lo|hi)|add(c?))(\.cc)?\.[us]32")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_REDUCTION = re.compile(r"redux\.sync\.(add|min|max|and|or|xor)\.([usb]32)")
_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32")


# --- operands ---------------------------------------------------------------------------------------------------------


def _reader(
    operand: Operand, dtype: np.dtype[Any], of: Callable[[Programs, Register, Mask], Array] = Programs.read
) -> _Read:
    """Reads a source operand as `dtype`: its low bits, where the register is wider.

    Args:
        of: `Programs.compute` for operands of which the instruction makes nothing but a value.
    """
    if isinstance(operand, int):
        if dtype.kind == "b":
            constant = np.array([operand != 0])
        else:
            bits = operand & ((1 << 8 * dtype.itemsize) - 1)
            constant = np.array([bits], BITS[dtype.itemsize]).view(dtype)
        return lambda programs, active: constant
    if isinstance(operand, Register):
        register = operand
        if (register.width == 0) != (dtype.kind == "b") or (register.width and register.width < dtype.itemsize):
            raise UnknownInstruction(f"register {register.name} read as {dtype}")
        if register.width > dtype.itemsize:
            narrow = BITS[dtype.itemsize]
            return lambda programs, active: of(programs, register, active).astype(narrow).view(dtype)
        return lambda programs, active: of(programs, register, active).view(dtype)
    if isinstance(operand, str) and dtype.itemsize in (4, 8):
        name, unsigned = operand, BITS[dtype.itemsize]
        return lambda programs, active: programs.named(name).astype(unsigned).view(dtype)
    raise UnknownInstruction(f"operand {operand}")


def _destination(operand: Operand) -> Register | None:
    """None for `_`, which discards."""
    if isinstance(operand, Register):
        return operand
    if operand == "_":
        return None
    raise UnknownInstruction(f"destination {operand}")


def _width(operand: Operand) -> int:
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"operand {operand} instead of a register")
    return operand.width


# --- from instructions to steps ---------------------------------------------------------------------------------------


def step(instruction: Instruction) -> Step:
    """What an instruction, none that ends a block, does to programs."""
    opcode = instruction.opcode
    if opcode.startswith("mov."):
        return _move(instruction)
    if opcode.startswith(("ld.", "st.")):
        return _access(instruction)
    if match := _MATRIX.fullmatch(opcode):
        return _matrices(instruction, match[1], int(match[2]), bool(match[3]))
    if match := _SHUFFLE.fullmatch(opcode):
        return _shuffle(instruction, match[1])
    if match := _REDUCTION.fullmatch(opcode):
        return _reduce(instruction, *match.groups())
    if (match := _CARRY.fullmatch(opcode)) and (match[1] or match[3] or match[4]):
        return _carry(instruction, match[2] or "", bool(match[1] or match[3]), bool(match[4]))
    if opcode == "bar.warp.sync":
        members = _reader(instruction.operands[0], TYPES["u32"])
        return lambda programs, active: programs.warp_barrier(members(programs, active), active)
    if re.fullmatch(r"createpolicy\.fractional\.L2::evict_\w+\.b64", opcode):
        policy = _destination(instruction.operands[0])
        assert policy is not None
        # What a cache keeps changes no result.
        return lambda programs, active: programs.write(policy, np.zeros(1, np.uint64), active)
    if re.fullmatch(r"(membar|fence)(\.\w+)*", opcode):
        return lambda programs, active: None  # accesses are made in the order of the code
    return _arithmetic(instruction, decode(opcode))


def _arithmetic(instruction: Instruction, form: Form) -> Step:
    targets = [_destination(operand) for operand in as_tuple(instruction.operands[0])]
    sources = instruction.operands[1:]
    if len(sources) != len(form.sources) or len(targets) > len(form.results):
        raise UnknownInstruction(f"{len(sources)} sources, expected {len(form.sources)}")
    for target, dtype in zip(targets, form.results, strict=False):
        if target is not None and ((target.width == 0) != (dtype.kind == "b") or target.width < dtype.itemsize > 1):
            raise UnknownInstruction(f"register {target.name} for a result of {dtype}")
    # Divisions act on their divisor.
    acts = {1} if form.divides else set()
    reads = [
        _reader(operand, dtype, Programs.read if k in acts else Programs.compute)
        for k, (operand, dtype) in enumerate(zip(sources, form.sources, strict=True))
    ]

    def step(programs: Programs, active: Mask) -> None:
        values = [read(programs, active) for read in reads]
        if form.divides and not values[1].all():
            zero = np.broadcast_to(values[1] == 0, (programs.lanes,))
            zero = zero if active is None else zero & active
            if zero.any():
                raise DivisionByZero("division by zero", np.flatnonzero(zero))
        result = form.function(*values)
        if form.granted:
            result = programs.approximated(result, form, values[0])
        for target, value in zip(targets, result if len(form.results) > 1 else (result,), strict=False):
            if target is not None:
                programs.write(target, value, active)

    return step


def _carry(instruction: Instruction, half: str, takes: bool, gives: bool) -> Step:
    """Sums of 32 bits, or of a product's half and 32 bits, with a carry from one instruction to a later one."""
    target, *sources = instruction.operands
    register, word = _destination(target), TYPES["u32"]
    # Multiplications with a sign differ in the high half; only those without one occur.
    if register is None or len(sources) != (3 if half else 2) or (half == "hi" and instruction.opcode.endswith("s32")):
        raise UnknownInstruction(f"instruction {instruction.opcode} is not implemented")
    reads = [_reader(operand, word) for operand in sources]

    def step(programs: Programs, active: Mask) -> None:
        first, *others = (read(programs, active).astype(np.uint64) for read in reads)
        if half:
            product = first * others.pop(0)
            first = product >> np.uint64(32) if half == "hi" else product & np.uint64(0xFFFFFFFF)
        total = first + others[0]
        if takes:
            total = total + programs.read(programs.carry, active)
        if gives:
            programs.write(programs.carry, total >> np.uint64(32) != 0, active)
        programs.write(register, total.astype(word), active)

    return step


def _reduce(instruction: Instruction, name: str, kind: str) -> Step:
    """`redux.sync`: of all lanes that the mask names, for each of them."""
    target, *sources = instruction.operands
    register, dtype = _destination(target), TYPES[kind]
    value_of, members_of = _reader(sources[0], dtype), _reader(sources[1], TYPES["b32"])
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]

    def step(programs: Programs, active: Mask) -> None:
        value, members = (
            np.broadcast_to(read(programs, active), (programs.lanes,)).reshape(-1, WARP)
            for read in (value_of, members_of)
        )
        programs.check_warps(members, active)
        if active is not None and not (active.reshape(-1, WARP).all(1) | ~active.reshape(-1, WARP).any(1)).all():
            raise UnknownInstruction("redux.sync of a part of a warp is not implemented")
        if register is not None:
            programs.write(register, np.repeat(function.reduce(value, axis=1, dtype=dtype), WARP), active)

    return step


def _move(instruction: Instruction) -> Step:
    target, source = instruction.operands
    parts, pieces = as_tuple(target), as_tuple(source)
    if len(parts) > 1:  # unpack
        bits = BITS[_width(source)]
        piece = BITS[bits.itemsize // len(parts)]
        whole = _reader(source, bits, Programs.compute)
        destinations = [_destination(part) for part in parts]

        def unpack(programs: Programs, active: Mask) -> None:
            value = whole(programs, active)
            for k, register in enumerate(destinations):
                if register is not None:
                    programs.write(register, (value >> bits.type(8 * piece.itemsize * k)).astype(piece), active)

        return unpack
    register = _destination(target)
    assert register is not None
    bits = BITS[register.width]
    if len(pieces) == 1:
        read = _reader(source, bits, Programs.compute)
        return lambda programs, active: programs.write(register, read(programs, active), active)
    piece = BITS[bits.itemsize // len(pieces)]
    reads = [_reader(operand, piece, Programs.compute) for operand in pieces]

    def pack(programs: Programs, active: Mask) -> None:
        value = bits.type(0)
        for k, read in enumerate(reads):
            value = value | (read(programs, active).astype(bits) << bits.type(8 * piece.itemsize * k))
        programs.write(register, value, active)

    return pack


def _access(instruction: Instruction) -> Step:
    match = _ACCESS.fullmatch(instruction.opcode)
    if match is None or match[3] not in TYPES:
        raise UnknownInstruction(f"instruction {instruction.opcode} is not implemented")
    kind, memory, dtype = match[1], match[2], TYPES[match[3]]
    # A cache policy may follow.
    data, where = instruction.operands[:2] if kind == "ld" else instruction.operands[1::-1]
    if not isinstance(where, Address):
        raise UnknownInstruction(f"address {where}")
    if memory == "param":
        return _parameter(data, where, dtype)
    base = _reader(where.base, BITS[_width(where.base) if isinstance(where.base, Register) else 8])
    size = dtype.itemsize * len(as_tuple(data))

    def addresses(programs: Programs, active: Mask) -> tuple[Array, Array]:
        lanes = np.arange(programs.lanes) if active is None else np.flatnonzero(active)
        address = base(programs, active).astype(np.int64) + where.offset
        address = np.broadcast_to(address, (programs.lanes,)) if active is None else _of_lanes(address, lanes)
        return address, lanes

    if kind == "ld":
        registers = [_destination(operand) for operand in as_tuple(data)]

        def load(programs: Programs, active: Mask) -> None:
            address, lanes = addresses(programs, active)
            values = programs.load(memory, address, size, lanes).view(dtype)
            for k, register in enumerate(registers):
                if register is not None:
                    value = np.ascontiguousarray(values[:, k])
                    if active is not None:
                        spread = np.zeros(programs.lanes, dtype)
                        spread[lanes] = value
                        value = spread
                    programs.write(register, value, active)

        return load
    reads = [_reader(operand, dtype) for operand in as_tuple(data)]

    def store(programs: Programs, active: Mask) -> None:
        address, lanes = addresses(programs, active)
        values = np.empty((len(lanes), len(reads)), dtype)
        for k, read in enumerate(reads):
            value = read(programs, active)
            values[:, k] = value if active is None else _of_lanes(value, lanes)
        programs.store(memory, address, values.view(np.uint8), lanes)

    return store


def _of_lanes(value: Array, lanes: Array) -> Array:
    return value[lanes] if len(value) > 1 else np.broadcast_to(value, (len(lanes),))


def _matrices(instruction: Instruction, kind: str, count: int, transposed: bool) -> Step:
    """`ldmatrix`, `stmatrix`: a warp moves matrices of 8 x 8 elements of 16 bits between shared memory and registers.

    Eight lanes name the rows of a matrix, of 16 bytes each, and count as those that access them. Each lane holds two
    neighbours of a row in one register of its own: lane 0 the first two, lane 1 the next; transposed, of a column.
    """
    data, where = instruction.operands if kind == "ld" else instruction.operands[::-1]
    parts = as_tuple(data)
    if not isinstance(where, Address) or len(parts) != count:
        raise UnknownInstruction(f"{len(parts)} registers and address {where}, expected {count}")
    base, word, element = _reader(where.base, BITS[_width(where.base)]), BITS[4], BITS[2]

    def rows(programs: Programs, active: Mask) -> tuple[Array, Array, Array]:
        """The lanes that execute; those that name rows; their addresses."""
        programs.check_warps(np.full((programs.lanes // WARP, WARP), 0xFFFFFFFF, np.uint32), active)
        lanes = np.arange(programs.lanes) if active is None else np.flatnonzero(active)
        naming = lanes[lanes % WARP < 8 * count]
        address = base(programs, active).astype(np.int64) + where.offset
        return lanes, naming, _of_lanes(address, naming)

    if kind == "ld":
        registers = [_destination(part) for part in parts]

        def load(programs: Programs, active: Mask) -> None:
            lanes, naming, address = rows(programs, active)
            values = programs.load("shared", address, 16, naming).view(element).reshape(-1, count, 8, 8)
            values = np.ascontiguousarray(values.swapaxes(2, 3) if transposed else values)
            pairs = values.view(word).reshape(-1, count, WARP)
            for k, register in enumerate(registers):
                if register is not None:
                    spread = np.zeros(programs.lanes, word)
                    spread[lanes] = pairs[:, k].reshape(-1)
                    programs.write(register, spread, active)

        return load
    reads = [_reader(part, word) for part in parts]

    def store(programs: Programs, active: Mask) -> None:
        lanes, naming, address = rows(programs, active)
        pairs = np.stack([_of_lanes(read(programs, active), lanes).reshape(-1, WARP) for read in reads], axis=1)
        values = pairs.view(element).reshape(-1, count, 8, 8)
        values = np.ascontiguousarray(values.swapaxes(2, 3) if transposed else values)
        programs.store("shared", address, values.view(np.uint8).reshape(-1, 16), naming)

    return store


def _parameter(data: Operand, where: Address, dtype: np.dtype[Any]) -> Step:
    """The same for all lanes, but where the compiler chooses among addresses of parameters."""
    registers = [_destination(operand) for operand in as_tuple(data)]
    base = _reader(where.base, BITS[8])
    size = dtype.itemsize * len(registers)

    def load(programs: Programs, active: Mask) -> None:
        address = base(programs, active).astype(np.int64) + where.offset
        memory = programs.launch.parameters
        if active is not None:
            address = np.where(active, address, 0)
        outside = (address < 0) | (address + size > len(memory))
        if outside.any():
            raise OutOfBounds("outside of the parameters", np.flatnonzero(outside))
        values = memory[address[:, None] + np.arange(size)].view(dtype)
        for k, register in enumerate(registers):
            if register is not None:
                programs.write(register, np.ascontiguousarray(values[:, k]), active)

    return load


def _shuffle(instruction: Instruction, mode: str) -> Step:
    """`shfl.sync`, as the pseudocode of the PTX ISA has it."""
    target, *sources = instruction.operands
    targets = [_destination(operand) for operand in as_tuple(target)]
    word = TYPES["b32"]
    # The value first: no other operand may be undefined.
    reads = [_reader(sources[0], word, Programs.compute), *(_reader(operand, word) for operand in sources[1:])]

    def step(programs: Programs, active: Mask) -> None:
        value, by, control, members = (
            np.broadcast_to(read(programs, active), (programs.lanes,)).reshape(-1, WARP) for read in reads
        )
        programs.check_warps(members, active)
        lane = np.arange(WARP)
        by, clamp, segment = (x.astype(np.int64) for x in (by & 31, control & 31, (control >> 8) & 31))
        least = lane & segment
        most = least | (clamp & ~segment)
        if mode == "up":
            other = lane - by
            inside = other >= most
        else:
            other = {"down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment)}[mode]
            inside = other <= most
        other = np.where(inside, other, lane)
        named = (members >> (other & 31).astype(np.uint32)) & np.uint32(1) == 1
        wrong = ~named.reshape(-1) if active is None else active & ~named.reshape(-1)
        if wrong.any():
            raise PartialWarp("a shuffle from a lane that its mask does not name", np.flatnonzero(wrong))
        results = (np.take_along_axis(value, other, 1).reshape(-1), inside.reshape(-1))
        if programs.tainted is not None:
            programs.tainted = np.take_along_axis(programs.tainted.reshape(-1, WARP), other, 1).reshape(-1)
        for register, result in zip(targets, results, strict=False):
            if register is not None:
                programs.write(register, result, active)
            programs.tainted = None  # whether there was a partner does not depend on the value

    return step
