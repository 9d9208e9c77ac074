"""How machine code is counted, on code made up for the purpose."""

from collections import Counter

import pytest

disassembly = pytest.importorskip(
    "denim.benchmarks.machine_code.disassembly", reason="Triton is a dependency on Linux x86-64 alone"
)


def test_code_is_counted_by_the_loops_around_it():
    lines = [
        ("", "S2R", None),
        (".L_x_0", "", None),
        ("", "IADD3", None),
        (".L_x_1", "", None),
        ("", "FFMA", None),
        ("", "BRA", ".L_x_2"),  # out of the loop
        ("", "STG.E", None),
        (".L_x_2", "", None),
        ("", "BRA", ".L_x_1"),
        ("", "MOV", None),
        ("", "BRA", ".L_x_0"),
        ("", "EXIT", None),
        (".L_x_3", "", None),
        ("", "BRA", ".L_x_3"),  # the jump to itself behind the end
        ("", "NOP", None),
    ]
    depths, slow = disassembly._by_depth(lines)
    assert depths == [
        Counter({"S2R": 1, "EXIT": 1, "BRA": 1}),
        Counter({"IADD3": 1, "MOV": 1, "BRA": 1}),
        Counter({"FFMA": 1, "BRA": 2, "STG.E": 1}),
    ]
    assert not slow


def test_a_loop_with_two_ways_back_is_one_loop():
    lines = [(".L_x_0", "", None), ("", "FADD", None), ("", "BRA", ".L_x_0"), ("", "FMUL", None), ("", "BRA", ".L_x_0")]
    depths, _ = disassembly._by_depth(lines)
    assert depths == [Counter(), Counter({"FADD": 1, "FMUL": 1, "BRA": 2})]


def test_skipped_code_with_local_memory_is_a_slow_path_and_other_local_memory_is_not():
    lines = [
        ("", "STL", None),  # a spill
        ("", "BRA", ".L_x_2"),
        ("", "FADD", None),
        ("", "BRA", ".L_x_1"),
        ("", "STL", None),
        ("", "IMAD", None),
        ("", "LDL", None),
        (".L_x_1", "", None),
        ("", "FMUL", None),
        (".L_x_2", "", None),
        ("", "EXIT", None),
    ]
    depths, slow = disassembly._by_depth(lines)
    assert slow == Counter({"STL": 1, "IMAD": 1, "LDL": 1})
    assert depths == [Counter({"STL": 1, "BRA": 2, "FADD": 1, "FMUL": 1, "EXIT": 1})]


@pytest.mark.parametrize(
    ("kind", "opcodes"),
    {
        "special": ["MUFU.LG2", "v_log_f32", "v_sqrt_f32_e32"],
        "conversion": ["I2FP.F32.S32", "F2FP.BF16.F32.PACK_AB", "I2F.U8", "F2I.U32", "v_cvt_f32_ubyte1_e32"],
        "memory": [
            "LDG.E.128",
            "STG.E",
            "LDS.64",
            "STL",
            "ATOMG.E.ADD",
            "RED.E.ADD",
            "buffer_load_dwordx4",
            "ds_read_b32",
        ],
        "multiply": ["IMAD.WIDE.U32", "IMAD", "v_mad_u64_u32", "v_mul_hi_u32", "v_mul_lo_u32"],
        "float": ["FFMA", "FFMA2", "FSETP.GT.AND", "FSEL", "HFMA2.BF16_V2", "v_pk_fma_f32", "v_cmp_lt_f32_e64"],
        "integer": ["IADD3.X", "LOP3.LUT", "PRMT", "SHF.R.U32.HI", "SEL", "VIADD", "v_xor_b32_e32", "v_perm_b32"],
        "other": ["UIMAD", "ULDC.64", "BRA", "SHFL.BFLY", "S2R", "MOV", "LDC", "R2UR", "s_mul_i32", "v_mov_b32_e32"],
    }.items(),
)
def test_classes(kind, opcodes):
    assert kind in disassembly.CLASSES
    assert {opcode: disassembly.opcode_class(opcode) for opcode in opcodes} == dict.fromkeys(opcodes, kind)


@pytest.mark.parametrize(
    ("opcode", "access"),
    {
        "LDG.E.128": ("load", 16),
        "LDG.E.64.CONSTANT": ("load", 8),
        "LDG.E": ("load", 4),
        "LDG.E.U8": ("load", 1),
        "LDG.E.S16": ("load", 2),
        "STG.E.EF.128": ("store", 16),
        "STG.E.U16": ("store", 2),
        "LDS.128": None,
        "LDGSTS.E.128": None,
        "FFMA": None,
        "global_load_dwordx4": ("load", 16),
        "global_load_dword": ("load", 4),
        "buffer_load_ubyte": ("load", 1),
        "buffer_store_dwordx2": ("store", 8),
        "global_store_short": ("store", 2),
        "global_load_short_d16_hi": ("load", 2),
        "ds_read_b128": None,
    }.items(),
)
def test_widths_of_global_accesses(opcode, access):
    assert disassembly.access_bytes(opcode) == access
