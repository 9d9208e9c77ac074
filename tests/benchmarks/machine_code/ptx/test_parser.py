"""PTX text to instructions."""

from __future__ import annotations

import pytest

from denim.benchmarks.machine_code.ptx.parser import Address, Register, as_tuple, parse
from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction

HEAD = """
.version 8.8
.global .align 4 .b32 table[3] = {1, -1, 4294967295};
.const .align 1 .b8 letters[2] = {65, 66};
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .f32 k_param_1
)
.reqntid 64
"""
DECLARATIONS = "\t.reg .pred \t%p<3>;\n\t.reg .b16 \t%rs<3>;\n\t.reg .b32 \t%r<9>;\n\t.reg .b64 \t%rd<3>;\n"


def parsed(body: str, head: str = HEAD):
    return parse(head + "{\n" + DECLARATIONS + body + "\n}\n")


def test_a_kernel():
    kernel = parsed("\tret;")
    assert (kernel.name, kernel.threads) == ("k", 64)
    assert kernel.parameters == (("k_param_0", "u64"), ("k_param_1", "f32"))
    assert kernel.constants["table"] == (1).to_bytes(4, "little") + b"\xff" * 8
    assert kernel.constants["letters"] == b"AB"
    assert [instruction.opcode for instruction in kernel.code] == ["ret"]


def test_operands():
    body = "\t@!%p1 ld.global.v2.b32 { %r1, _ }, [ %rd1 + -8 ];\n"
    body += "\tmov.b64 {%r2, %r3}, %rd2; setp.lt.f16x2 %p1|%p2, %r1, %r2;"
    load, unpack, pair = parsed(body).code
    register, wanted = load.guard
    assert (register.name, register.width, wanted) == ("%p1", 0, False)
    (first, sink), address = load.operands
    assert (first.name, first.width, sink) == ("%r1", 4, "_")
    assert isinstance(address, Address)
    assert (address.base.width, address.offset) == (8, -8)
    assert [part.name for part in as_tuple(unpack.operands[0])] == ["%r2", "%r3"]
    assert [part.name for part in as_tuple(pair.operands[0])] == ["%p1", "%p2"]
    assert pair.operands[1] == first  # the same register wherever it is named
    assert load.text == "@!%p1 ld.global.v2.b32 { %r1, _ }, [ %rd1 + -8 ]"


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("-1640531527", -1640531527), ("0x7770U", 0x7770), ("0f3F800000", 0x3F800000), ("0x0", 0)],
)
def test_immediates(text, value):
    (instruction,) = parsed(f"\tmov.b32 %r1, {text};").code
    assert instruction.operands[1] == value


def test_immediate_of_float64():
    (instruction,) = parsed("\tmov.b64 %rd1, 0dBFF0000000000000;").code
    assert instruction.operands[1] == 0xBFF0000000000000


def test_labels_stand_for_the_instruction_behind_them():
    kernel = parsed("$L_a:\n\tmov.u32 %r1, 0;\n$L_b: $L_c:\n\tbra $L_a;\n$L_d:")
    assert kernel.labels == {"$L_a": 0, "$L_b": 1, "$L_c": 1, "$L_d": 2}


def test_registers_of_inline_assembly_belong_to_their_scope():
    body = "\t{ .reg .b32 t; mov.b32 t, 1; mov.b32 %r1, t; }\n\t{ .reg .b64 t; mov.b64 t, 2; mov.b64 %rd1, t; }"
    code = parsed(body).code
    assert [code[0].operands[0].width, code[2].operands[0].width] == [4, 8]
    assert code[0].operands[0] == code[1].operands[1] != code[2].operands[0]


def test_places_in_the_source():
    body = """
	.loc	1 3 0
	mov.u32 %r1, 0;                  // a comment; with a semicolon
	.loc	2 43 13, function_name $L__info, inlined_at 1 110 13 // standard.py:43:13
	mov.u32 %r2, 0;
"""
    first, second = parse(
        HEAD + "{" + DECLARATIONS + body + '}\n.file 1 "/a/kernels.py"\n.file 2 "/b/standard.py"\n'
    ).code
    assert first.place == "kernels.py:3"
    assert second.place == "standard.py:43, called at kernels.py:110"


def test_local_variables_lie_one_after_another_each_aligned():
    kernel = parsed("\t.local .align 1 .b8 a[3];\n\t.local .align 8 .b8 b[16];\n\tret;")
    assert (kernel.local, kernel.local_size) == ({"a": 0, "b": 8}, 24)


@pytest.mark.parametrize(
    ("body", "head", "message"),
    [
        ("\tret;", HEAD.replace(".reqntid 64", ".maxnreg 32"), "reqntid"),
        ("\tret;", HEAD + ".func f() { ret; }\n.visible .entry l(.param .u32 p)", "one kernel alone"),
        ("\t.tex .u32 t;", HEAD, "directive"),
        ("\t.reg .b128 %q<2>;", HEAD, "b128"),
        ("\tadd.s32 %r1, %r2, 1 + 2;", HEAD, "operand"),
        ("\tadd.s32 %r1, %r2, 1", HEAD, "add.s32"),
    ],
)
def test_what_is_not_known_is_named(body, head, message):
    with pytest.raises(UnknownInstruction, match=message):
        parsed(body, head)


def test_registers_are_values():
    assert Register(1, 4, "%r1") == Register(1, 4, "%r1")
