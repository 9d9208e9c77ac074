"""Kernels written by hand: control flow, warps, memories, and every trap, sprung and not sprung."""

from __future__ import annotations

import numpy as np
import pytest

from denim.benchmarks.machine_code.ptx import arithmetic
from denim.benchmarks.machine_code.ptx.traps import (
    BarrierNotReached,
    DivisionByZero,
    Misaligned,
    OutOfBounds,
    PartialWarp,
    Race,
    StoredTwice,
    Trap,
    Undefined,
    UnknownInstruction,
)

THREAD = np.arange(64)
STORE = "\tst.global.b32 [%rd5], %r5;\n"
# %p1 in even threads; %p2 in the first warp.
EVEN = "\tand.b32 %r6, %r1, 1;\n\tsetp.eq.b32 %p1, %r6, 0;\n"
FIRST_WARP = "\tsetp.lt.u32 %p2, %r1, 32;\n"


def test_copy(execute):
    y = execute("\tld.global.b32 %r5, [%rd4];\n" + STORE)
    assert y[:64].tolist() == THREAD.tolist()
    assert not y[64:].any()


def test_vectors_have_their_elements_in_order(execute):
    wide = "\tmul.wide.u32 %rd6, %r1, 16;\n\tadd.s64 %rd7, %rd1, %rd6;\n\tadd.s64 %rd8, %rd2, %rd6;\n"
    y = execute(
        wide + "\tld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd7];\n\tst.global.v4.b32 [%rd8], {%r5, %r4, %r3, %r2};\n"
    )
    assert y.reshape(64, 4).tolist() == np.arange(256).reshape(64, 4)[:, ::-1].tolist()


# Lane l of a warp names the row that thread l ^ 1 has written, 16 bytes.
ROWS = "\tshl.b32 %r20, %r1, 4;\n\txor.b32 %r21, %r20, 16;\n"
AS_WIDE = "\tmul.wide.u32 %rd6, %r1, 16;\n\tadd.s64 %rd7, %rd1, %rd6;\n\tadd.s64 %rd8, %rd2, %rd6;\n"
MATRICES = pytest.mark.parametrize(("count", "transposed"), [(1, False), (2, True), (4, False), (4, True)])


def _element(matrix: int, row: int, column: int, warp: int, transposed: bool) -> tuple[int, int]:
    """Thread and half of the register that holds an element of a matrix, by the tables of the PTX ISA."""
    if transposed:
        row, column = column, row
    return 32 * warp + 4 * row + column // 2, column % 2


def _matrix(kind: str, count: int, transposed: bool) -> str:
    registers = "{" + ", ".join(f"%r{30 + k}" for k in range(count)) + "}"
    opcode = f"{kind}matrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16"
    return f"\t{opcode} " + (f"{registers}, [%r21];\n" if kind == "ld" else f"[%r21], {registers};\n")


@MATRICES
def test_matrices_from_shared_memory(execute, count, transposed):
    body = AS_WIDE + ROWS + "\tld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd7];\n"
    body += "\tst.shared.v4.b32 [%r20], {%r2, %r3, %r4, %r5};\n\tbar.sync 0;\n" + _matrix("ld", count, transposed)
    body += "".join(f"\tst.global.b32 [%rd5+{256 * k}], %r{30 + k};\n" for k in range(count))
    got = execute(body, shared=1024).reshape(4, 64, 1).view(np.uint16)
    rows = np.arange(256, dtype=np.uint32).view(np.uint16).reshape(64, 8)
    for warp in (0, 1):
        for matrix, row, column in np.ndindex(count, 8, 8):
            thread, half = _element(matrix, row, column, warp, transposed)
            assert got[matrix, thread, half] == rows[(32 * warp + 8 * matrix + row) ^ 1, column]
    assert not got[count:].any()


@MATRICES
def test_matrices_to_shared_memory(execute, count, transposed):
    body = AS_WIDE + ROWS + "\tld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd7];\n" + _matrix("st", count, transposed)
    body += "\tbar.sync 0;\n\tld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r20];\n"
    body += "\tst.global.v4.b32 [%rd8], {%r2, %r3, %r4, %r5};\n"
    got = execute(body, shared=1024).view(np.uint16).reshape(64, 8)
    registers = np.arange(256, dtype=np.uint32).reshape(64, 4, 1).view(np.uint16)
    for warp in (0, 1):
        for matrix, row, column in np.ndindex(count, 8, 8):
            thread, half = _element(matrix, row, column, warp, transposed)
            assert got[(32 * warp + 8 * matrix + row) ^ 1, column] == registers[thread, matrix, half]
        assert (got[32 * warp + 8 * count : 32 * warp + 32] == 0xFFFF).all()


def test_matrices_are_moved_by_whole_warps_to_aligned_rows_that_nobody_else_accesses(execute):
    execute(FIRST_WARP + ROWS + "\tmov.b32 %r30, 1;\n\t@%p2" + _matrix("st", 1, False), shared=1024)
    with pytest.raises(PartialWarp):
        execute(EVEN + ROWS + "\tmov.b32 %r30, 1;\n\t@%p1" + _matrix("st", 1, False), shared=1024)
    with pytest.raises(Misaligned):
        execute(ROWS + "\tadd.s32 %r21, %r20, 8;\n\tmov.b32 %r30, 1;\n" + _matrix("st", 1, False), shared=2048)
    with pytest.raises(Race, match="one thread writes and another reads"):
        execute(ROWS + "\tst.shared.b32 [%r20], %r1;\n" + _matrix("ld", 1, False), shared=1024)


@pytest.mark.parametrize(
    ("kind", "expected"), [("u8", 200), ("s8", 200 - 256), ("b8", 200), ("s16", 200), ("u16", 200)]
)
def test_narrow_loads_are_extended(execute, kind, expected):
    y = execute(f"\tld.global.{kind} %r5, [%rd1+800];\n" + STORE)  # word 200
    assert (y[:64].view(np.int32) == expected).all()


def test_narrow_stores_take_the_low_bits(execute):
    y = execute("\tmov.b32 %r5, 0x12345678;\n\tst.global.b16 [%rd5], %r5;\n\tst.global.b8 [%rd5+3], %r5;\n")
    assert (y[:64] == 0x78005678).all()


def test_parameters_and_special_registers(execute):
    body = "\tld.param.b32 %r2, [handwritten_param_2];\n\tmov.u32 %r3, %ctaid.x;\n\tmov.u32 %r4, %ctaid.y;\n"
    body += "\tmad.lo.s32 %r5, %r3, 100, %r2;\n\tmad.lo.s32 %r5, %r4, 1000, %r5;\n\tmov.u32 %r6, %nctaid.x;\n"
    body += "\tmad.lo.s32 %r5, %r6, 10000, %r5;\n\tmad.lo.s32 %r7, %r4, 3, %r3;\n\tmul.wide.u32 %rd6, %r7, 4;\n"
    body += "\tadd.s64 %rd7, %rd2, %rd6;\n\tsetp.eq.b32 %p1, %r1, 0;\n\t@%p1 st.global.b32 [%rd7], %r5;\n"
    y = execute(body, grid=(3, 2), parameter=7)
    assert y[:6].tolist() == [30007, 30107, 30207, 31007, 31107, 31207]
    assert execute(body, grid=(3, 2), parameter=7, programs=[4])[:6].tolist() == [0, 0, 0, 0, 31107, 0]


def test_parameters_have_addresses(execute):
    choose = "\tmov.b64 %rd6, handwritten_param_2;\n\tmov.b64 %rd7, handwritten_param_1;\n"
    choose += "\tselp.b64 %rd8, %rd6, %rd7, %p1;\n\tld.param.b32 %r5, [%rd8];\n"
    y = execute(EVEN + choose + STORE, parameter=7)
    assert y[:64:2].tolist() == [7] * 32
    assert (y[1:64:2] == y[1]).all()
    assert y[1] == y.ctypes.data & 0xFFFFFFFF
    with pytest.raises(OutOfBounds, match="parameters"):
        execute(EVEN + choose.replace("[%rd8]", "[%rd8+4]") + STORE)


def test_moves_pack_and_unpack(execute):
    body = "\tmov.b64 %rd6, {%r1, 7};\n\tmov.b64 {_, %r2}, %rd6;\n"
    body += "\tmov.b32 %r4, 0x00030004;\n\tmov.b32 {%rs1, %rs2}, %r4;\n"
    body += "\tmov.b32 %r3, {%rs2, %rs1};\n\tadd.s32 %r5, %r2, %r3;\n"
    assert (execute(body + STORE)[:64] == 0x00040003 + 7).all()


def test_modules_have_constants(execute):
    body = "\tmov.b64 %rd6, table;\n\tmul.wide.u32 %rd7, %r6, 4;\n\tadd.s64 %rd8, %rd6, %rd7;\n"
    body += "\tld.const.b32 %r5, [%rd8];\n"
    variables = ".const .align 4 .b32 table[2] = {11, -22};"
    assert execute(EVEN + body + STORE, variables=variables)[:2].view(np.int32).tolist() == [11, -22]


def test_local_memory(execute):
    body = "\t.local .align 4 .b8 depot[8];\n\tmov.b64 %rd6, depot;\n\tst.local.b32 [%rd6+4], %r1;\n"
    body += "\tld.local.b32 %r5, [%rd6+4];\n"
    assert execute(body + STORE)[:64].tolist() == THREAD.tolist()
    with pytest.raises(OutOfBounds, match="local"):
        execute(body.replace("ld.local.b32 %r5, [%rd6+4]", "ld.local.b32 %r5, [%rd6+8]"))


# --- control flow -----------------------------------------------------------------------------------------------------


def test_predicated_instructions_leave_other_threads_alone(execute):
    y = execute(EVEN + "\tmov.b32 %r5, 7;\n\t@%p1 mov.b32 %r5, 9;\n\t@!%p1 st.global.b32 [%rd5], %r5;\n")
    assert y[:6].tolist() == [0, 7, 0, 7, 0, 7]


def test_branches_diverge_and_meet_again(execute):
    body = "\tmov.b32 %r5, 7;\n\t@%p1 bra $L_even;\n\tadd.s32 %r5, %r5, 2;\n\tbra.uni $L_end;\n"
    body += "$L_even:\n\tadd.s32 %r5, %r5, 10;\n$L_end:\n"
    y = execute(EVEN + body + STORE)
    assert y[:6].tolist() == [17, 9] * 3


def test_loops_run_as_often_as_each_thread_needs(execute):
    body = "\tmov.b32 %r5, 0;\n\tmov.b32 %r7, 0;\n$L_loop:\n\tadd.s32 %r5, %r5, %r7;\n\tadd.s32 %r7, %r7, 1;\n"
    y = execute(body + "\tsetp.le.u32 %p3, %r7, %r1;\n\t@%p3 bra $L_loop;\n" + STORE)
    assert y[:64].tolist() == (THREAD * (THREAD + 1) // 2).tolist()
    # The whole warp until its last thread is through: 3 before the loop with 4 in it, 1 behind it, 6 and 1 around it.
    assert execute.machine.warp_instructions == sum(6 + 2 + 4 * trips + 1 + 1 for trips in (32, 64))


def test_a_warp_executes_both_sides_of_a_divergent_branch_and_one_of_a_uniform_one(execute):
    body = "\t@%p1 bra $L_other;\n\tmov.b32 %r5, 1;\n\tmov.b32 %r5, 2;\n\tmov.b32 %r5, 3;\n$L_other:\n"
    execute(EVEN + body)
    divergent = execute.machine.warp_instructions
    execute(EVEN + FIRST_WARP + body.replace("%p1", "%p2"))
    assert execute.machine.warp_instructions == divergent - 3 + 2  # FIRST_WARP is one more for each of two warps


def test_threads_that_return_early_are_gone(execute):
    y = execute(EVEN + "\tmov.b32 %r5, 3;\n\t@%p1 ret;\n" + STORE)
    assert y[:4].tolist() == [0, 3, 0, 3]


def test_many_programs_run_in_parts(execute):
    body = "\tmov.u32 %r2, %ctaid.x;\n\tmul.wide.u32 %rd6, %r2, 4;\n\tadd.s64 %rd7, %rd2, %rd6;\n"
    body += "\tsetp.eq.b32 %p1, %r1, 0;\n\t@%p1 st.global.b32 [%rd7], %r2;\n"
    y = execute(body, grid=(700,), words=700)
    assert y.tolist() == list(range(700))


# --- warps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "partner"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("idx", 9, 31, lambda lane: 9),
        # Segments of eight lanes: their mask in bits 8 to 12.
        ("bfly", 4, 0x181F, lambda lane: lane ^ 4),
        ("down", 3, 0x181F, lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
        ("up", 3, 0x1800, lambda lane: lane - 3 if lane % 8 >= 3 else lane),
        ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),
    ],
)
def test_shuffles(execute, mode, by, clamp, partner):
    y = execute(f"\tmul.lo.s32 %r2, %r1, 3;\n\tshfl.sync.{mode}.b32 %r5, %r2, {by}, {clamp}, -1;\n" + STORE)
    assert y[:64].tolist() == [3 * (32 * (t // 32) + partner(t % 32)) for t in range(64)]


def test_a_shuffle_says_who_had_a_partner(execute):
    body = "\tshfl.sync.down.b32 %r2|%p1, %r1, 1, 31, -1;\n\tselp.b32 %r5, 1, 0, %p1;\n"
    assert execute(body + STORE)[:64].tolist() == ([1] * 31 + [0]) * 2


def test_a_shuffle_of_half_a_warp_is_trapped(execute):
    shuffle = "\tshfl.sync.bfly.b32 %r5, %r1, 2, 31, {mask};\n"
    with pytest.raises(PartialWarp, match="thread 1 of program 0"):
        execute(EVEN + "\t@%p1 bra $L_end;\n" + shuffle.format(mask=-1) + "$L_end:\n")
    with pytest.raises(PartialWarp):  # guarded rather than branched around
        execute(EVEN + "\t@%p1" + shuffle.format(mask=-1))
    # The lanes that are there, named; and lanes of the other warp do not matter.
    y = execute(EVEN + "\t@%p1 bra $L_end;\n" + shuffle.format(mask="0xAAAAAAAA") + STORE + "$L_end:\n")
    assert y[:8].tolist() == [0, 3, 0, 1, 0, 7, 0, 5]
    y = execute(FIRST_WARP + "\t@%p2 bra $L_end;\n" + shuffle.format(mask=-1) + STORE + "$L_end:\n")
    assert y[30:36].tolist() == [0, 0, 34, 35, 32, 33]


def test_a_shuffle_from_a_lane_that_its_mask_leaves_out_is_trapped(execute):
    body = EVEN + "\t@%p1 bra $L_end;\n\tshfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xAAAAAAAA;\n$L_end:\n"
    with pytest.raises(PartialWarp, match="does not name"):
        execute(body)


def test_a_barrier_of_half_a_warp_is_trapped(execute):
    with pytest.raises(PartialWarp):
        execute(EVEN + "\t@%p1 bra $L_end;\n\tbar.warp.sync -1;\n$L_end:\n")
    execute(FIRST_WARP + "\t@%p2 bra $L_end;\n\tbar.warp.sync -1;\n$L_end:\n")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("add", "u32", [2**32 - 7 * 31 * 16, 2**32 - 7 * (31 * 16 + 1024)]),
        ("min", "u32", [0, 2**32 - 7 * 63]),
        ("max", "u32", [2**32 - 7, 2**32 - 7 * 32]),
        ("min", "s32", [2**32 - 7 * 31, 2**32 - 7 * 63]),
        ("max", "s32", [0, 2**32 - 7 * 32]),
        ("xor", "b32", None),
        ("and", "b32", None),
        ("or", "b32", None),
    ],
)
def test_reductions_of_warps(execute, name, kind, expected):
    """Of minus seven times the thread."""
    y = execute(f"\tmul.lo.s32 %r2, %r1, -7;\n\tredux.sync.{name}.{kind} %r5, %r2, -1;\n" + STORE)
    values = (THREAD * -7).astype(np.int32).view(np.uint32).reshape(2, 32)
    if expected is None:
        expected = getattr(np, f"bitwise_{name}").reduce(values, axis=1).tolist()
    assert y[:64].reshape(2, 32).tolist() == [[value] * 32 for value in expected]


def test_reductions_need_the_lanes_that_they_name(execute):
    with pytest.raises(PartialWarp):
        execute(EVEN + "\t@%p1 redux.sync.min.u32 %r5, %r1, -1;\n" + STORE)
    with pytest.raises(UnknownInstruction, match="part of a warp"):
        execute(EVEN + "\t@%p1 redux.sync.min.u32 %r5, %r1, 0x55555555;\n" + STORE)


def test_carries_go_from_one_instruction_to_the_next(execute):
    """The 96 bits of (t 2^32 + 3) * 0xFFFFFFFF + 0xFFFFFFFF, a word at a time as compilers write it."""
    body = (
        "\tmov.b32 %r2, 3;\n\tmov.b32 %r3, 0xFFFFFFFF;\n"
        "\tmad.lo.cc.u32 %r10, %r2, %r3, %r3;\n\tmadc.hi.cc.u32 %r11, %r2, %r3, 0;\n\taddc.u32 %r12, 0, 0;\n"
        "\tmad.lo.cc.u32 %r11, %r1, %r3, %r11;\n\tmadc.hi.u32 %r12, %r1, %r3, %r12;\n"
        "\tmul.wide.u32 %rd6, %r1, 12;\n\tadd.s64 %rd7, %rd2, %rd6;\n"
    )
    body += "".join(f"\tst.global.b32 [%rd7+{4 * k}], %r{10 + k};\n" for k in range(3))
    words = execute(body)[: 3 * 64].reshape(64, 3).tolist()
    for thread, (low, middle, high) in enumerate(words):
        exact = (thread * 2**32 + 3) * 0xFFFFFFFF + 0xFFFFFFFF
        assert low + (middle << 32) + (high << 64) == exact


def test_a_carry_that_nothing_has_written_is_undefined(execute):
    with pytest.raises(Undefined, match=r"the carry, .* is read before it is written"):
        execute("\taddc.u32 %r5, %r1, 0;\n" + STORE)


def test_a_cache_policy_changes_nothing(execute):
    policy = "\tcreatepolicy.fractional.L2::evict_last.b64 %rd6, 1.0;\n"
    y = execute(policy + "\tld.global.L1::evict_last.L2::cache_hint.b32 %r5, [%rd4], %rd6;\n" + STORE)
    assert y[:64].tolist() == THREAD.tolist()


def test_decimal_numbers_are_float32(execute):
    y = execute("\tmov.b32 %r2, 0;\n\tsub.f32 %r5, -1.5, %r2;\n" + STORE)
    assert (y[:64].view(np.float32) == -1.5).all()


# --- shared memory and barriers ---------------------------------------------------------------------------------------

PLACES = "\tmov.b32 %r9, global_smem;\n\tshl.b32 %r10, %r1, 2;\n\tadd.s32 %r11, %r9, %r10;\n"
EXCHANGE = (
    PLACES
    + "\txor.b32 %r12, %r11, {partner};\n"
    + "\tst.shared.b32 [%r11], %r1;\n{barrier}\tld.shared.b32 %r5, [%r12];\n"
    + STORE
)


@pytest.mark.parametrize(
    ("partner", "barrier", "races"),
    [
        (4, "", True),  # the next thread
        (4, "\tbar.warp.sync -1;\n", False),
        (4, "\tbar.sync 0;\n", False),
        (128, "\tbar.warp.sync -1;\n", True),  # the other warp
        (128, "\tbar.sync 0;\n", False),
        (0, "", False),  # itself
    ],
)
def test_exchange_through_shared_memory_needs_a_barrier(execute, partner, barrier, races):
    body = EXCHANGE.format(partner=partner, barrier=barrier)
    if races:
        with pytest.raises(Race, match=r"thread 0 of program 0.*source\.py:7"):
            execute(body, shared=256)
    else:
        assert execute(body, shared=256)[:64].tolist() == (THREAD ^ partner // 4).tolist()


def test_reuse_of_shared_memory_needs_a_barrier_too(execute):
    reuse = EXCHANGE.format(partner=128, barrier="\tbar.sync 0;\n") + "{barrier}\tst.shared.b32 [%r11], %r5;\n"
    with pytest.raises(Race):
        execute(reuse.format(barrier=""), shared=256)
    execute(reuse.format(barrier="\tbar.sync 0;\n"), shared=256)


def test_shared_memory_has_a_size(execute):
    body = EXCHANGE.format(partner=0, barrier="")
    with pytest.raises(OutOfBounds, match="252 bytes of shared memory"):
        execute(body, shared=252)


def test_a_barrier_that_not_all_threads_reach_is_trapped(execute):
    with pytest.raises(BarrierNotReached, match="thread 0 of program 0 has returned"):
        execute(EVEN + "\t@%p1 bra $L_end;\n\tbar.sync 0;\n$L_end:\n")
    execute(EVEN + "\t@%p1 bra $L_other;\n\tmov.b32 %r5, 1;\n$L_other:\n\tbar.sync 0;\n")


def test_other_barriers_are_not_known(execute):
    for barrier in ("bar.sync 1;", "bar.sync 0, 32;", "@%p1 bar.sync 0;", "mbarrier.init.shared.b64 [%r1], 1;"):
        with pytest.raises(UnknownInstruction, match="bar"):
            execute(EVEN + f"\t{barrier}\n", shared=256)


def test_a_barrier_orders_global_memory_within_a_program(execute):
    body = "\tst.global.b32 [%rd5], %r1;\n{barrier}\txor.b32 %r6, %r1, 1;\n\tmul.wide.u32 %rd6, %r6, 4;\n"
    body += "\tadd.s64 %rd7, %rd2, %rd6;\n\tld.global.b32 %r5, [%rd7];\n"
    execute(body.format(barrier="\tbar.sync 0;\n"))
    with pytest.raises(Race, match="y"):
        execute(body.format(barrier=""))


# --- what else is trapped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "trap", "fine"),
    [
        ("\tld.global.b32 %r5, [%rd4+1000];\n", OutOfBounds, "\tld.global.b32 %r5, [%rd4+768];\n"),
        ("\tst.global.b32 [%rd5+-4], %r1;\n", OutOfBounds, "\tst.global.b32 [%rd5+4], %r1;\n"),
        ("\tld.global.b32 %r5, [%rd1+2];\n", Misaligned, "\tld.global.b16 %r5, [%rd1+2];\n"),
        ("\tst.global.b32 [%rd2], %r1;\n", StoredTwice, "\t@%p1 st.global.b32 [%rd5], %r1;\n"),
        ("\tdiv.u32 %r5, %r1, %r1;\n", DivisionByZero, "\tadd.s32 %r2, %r1, 1;\n\tdiv.u32 %r5, %r1, %r2;\n"),
    ],
)
def test_traps(execute, body, trap, fine):
    with pytest.raises(trap, match=r"kernel handwritten, source\.py:7"):
        execute(EVEN + body)
    execute(EVEN + fine)


def test_misaligned_vectors_are_trapped(execute):
    vector = (
        "\tshl.b64 %rd6, %rd3, 1;\n\tadd.s64 %rd7, %rd1, %rd6;\n\tld.global.v2.b32 {{%r2, %r3}}, [%rd7+{offset}];\n"
    )
    execute(vector.format(offset=8))
    with pytest.raises(Misaligned, match=r"8 bytes.*the first of 64"):
        execute(vector.format(offset=4))


def test_threads_that_do_not_execute_do_not_trap(execute):
    body = "\t@%p3 ld.global.b32 %r5, [%rd4+10000];\n\t@%p3 div.u32 %r5, 1, 0;\n"
    execute("\tsetp.lt.u32 %p3, %r1, 0;\n" + body)
    with pytest.raises(OutOfBounds, match="thread 63 of program 0, the first of 1"):
        execute("\tsetp.eq.b32 %p3, %r1, 63;\n" + body)


def test_registers_are_written_before_they_are_read(execute):
    written = "\t@%p1 mov.b32 %r5, 3;\n"
    with pytest.raises(Undefined, match=r"%r5.*thread 1 of program 0, the first of 32"):
        execute(EVEN + written + STORE)
    with pytest.raises(Undefined, match="%r5"):
        execute(EVEN + "\tbra.uni $L_end;\n\tmov.b32 %r5, 1;\n$L_end:\n" + STORE)
    execute(EVEN + written + "\t@%p1 st.global.b32 [%rd5], %r5;\n")
    execute(EVEN + written + "\t@!%p1 mov.b32 %r5, 4;\n" + STORE)


# %p3 in the first two threads of a warp; %r5 is loaded in these alone.
FIRST_TWO = "\tand.b32 %r7, %r1, 31;\n\tsetp.lt.u32 %p3, %r7, 2;\n\t@%p3 ld.global.b32 %r5, [%rd4];\n"


def test_a_value_computed_where_it_is_undefined_does_no_harm_until_it_is_used(execute):
    """The sum of two of a warp's threads, computed by all, as compilers write it; the others have nothing to add."""
    add = FIRST_TWO + "\tshfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;\n\tadd.s32 %r5, %r5, %r6;\n"
    assert execute(add + "\t@%p3 st.global.b32 [%rd5], %r5;\n")[:64].tolist() == [
        2 * (t // 32 * 32) + 1 if t % 32 < 2 else 0 for t in range(64)
    ]
    with pytest.raises(Undefined, match=r"%r5.*thread 2 of program 0, the first of 60"):
        execute(add + STORE)
    # What a thread gets of another is as undefined as the other's value.
    swapped = FIRST_TWO + "\tshfl.sync.bfly.b32 %r5, %r5, 2, 31, -1;\n\t{guard}st.global.b32 [%rd5], %r5;\n"
    with pytest.raises(Undefined, match=r"%r5.*thread 0 of program 0, the first of 4"):
        execute(swapped.format(guard="@%p3 "))
    execute(
        swapped.format(guard="@%p4 ").replace("\tshfl", "\tshr.u32 %r8, %r7, 1;\n\tsetp.eq.b32 %p4, %r8, 1;\n\tshfl")
    )


@pytest.mark.parametrize(
    "compute",
    [
        "mov.b32 %r6, %r5;",
        "add.s32 %r6, %r1, %r5;",
        "cvt.rn.f32.u32 %r6, %r5;",
        "selp.b32 %r6, %r5, %r1, %p1;",
        "mov.b64 %rd6, {%r1, %r5};\n\tmov.b64 {_, %r6}, %rd6;",
        "shfl.sync.idx.b32 %r6, %r5, 31, 31, -1;",
        "mov.b32 %r6, 1;\n\t@%p1 mov.b32 %r6, %r5;",
        "sub.f32 %r8, %r5, %r1;\n\trcp.approx.f32 %r6, %r8;",
    ],
)
@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("st.global.b32 [%rd5], %r6;", "%r6"),
        ("st.shared.b8 [%r1], %r6;", "%r6"),
        ("mul.wide.u32 %rd7, %r6, 0;\n\tadd.s64 %rd8, %rd4, %rd7;\n\tld.global.b32 %r9, [%rd8];", "%rd8"),
        ("setp.eq.b32 %p5, %r6, 0;\n\t@%p5 mov.b32 %r9, 1;", "%p5"),
        ("setp.eq.b32 %p5, %r6, 0;\n\t@%p5 bra $L_end;\n$L_end:", "%p5"),
        ("div.u32 %r9, %r1, %r6;", "%r6"),
        ("redux.sync.add.u32 %r9, %r6, -1;", "%r6"),
        ("shfl.sync.idx.b32 %r9, %r1, %r6, 31, -1;", "%r6"),
    ],
)
def test_what_is_computed_from_an_undefined_value_must_not_be_used(execute, compute, use, name):
    body = f"\t{compute}\n\t{use}\n"
    with pytest.raises(Undefined, match=name + r", or what it was computed from.*thread \d+ of program 0"):
        execute(EVEN + FIRST_TWO + body, shared=256)
    execute(EVEN + "\tadd.s32 %r5, %r1, 1;\n" + body, shared=256)


def test_a_register_is_defined_again_where_it_is_written(execute):
    y = execute(EVEN + FIRST_TWO + "\tmov.b32 %r6, %r5;\n\tmov.b32 %r6, %r1;\n" + STORE.replace("%r5", "%r6"))
    assert y[:64].tolist() == THREAD.tolist()
    half = "\tadd.s32 %r6, %r5, 1;\n\t@%p1 mov.b32 %r6, 7;\n\t{guard}st.global.b32 [%rd5], %r6;\n"
    assert execute(EVEN + FIRST_TWO + half.format(guard="@%p1 "))[2] == 7
    with pytest.raises(Undefined, match=r"%r6.*thread 3 of program 0, the first of 30"):
        execute(EVEN + FIRST_TWO + half.format(guard="@!%p1 "))


def test_whether_a_shuffle_had_a_partner_does_not_depend_on_the_value(execute):
    body = FIRST_TWO + "\tshfl.sync.down.b32 %r6|%p4, %r5, 1, 31, -1;\n\tselp.b32 %r5, 1, 0, %p4;\n"
    assert execute(body + STORE)[:64].tolist() == ([1] * 31 + [0]) * 2


def test_a_register_that_nothing_writes_is_nan(execute):
    """It stands for a value that the compiler leaves open, and must not reach a result."""
    y = execute("\tmov.b64 %rd6, {%r1, %r40};\n\tmov.b64 {%r5, %r6}, %rd6;\n" + STORE)
    assert y[:64].tolist() == THREAD.tolist()
    y = execute("\tadd.f32 %r5, %r40, %r1;\n" + STORE)
    assert np.isnan(y[:64].view(np.float32)).all()


@pytest.mark.parametrize(
    "line",
    [
        "atom.global.add.u32 %r5, [%rd4], 1;",
        "ld.global.v4.b7 {%r2, %r3, %r4, %r5}, [%rd4];",
        "shfl.sync.bfly.b64 %rd6, %rd4, 1, 31, -1;",
        "mov.u32 %r5, %clock;",
        "add.f32 %r5, %rs1, %r1;",
        "add.s32 %p1, %r1, %r1;",
        "fma.rn.f32 %r5, %r1, %r1;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r2}, {%r3}, {%r4}, {%r5};",
    ],
)
def test_unknown_instructions_are_named_before_anything_runs(execute, line):
    with pytest.raises(UnknownInstruction, match=r"kernel handwritten, source\.py:7") as trap:
        execute("\tst.global.b32 [%rd5+10000], %r1;\n\t" + line + "\n")
    assert line.split(" ")[0] in str(trap.value)
    assert isinstance(trap.value, Trap)


# --- approximate functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"])
def test_approximate_functions_err_as_far_as_they_are_told(execute, name):
    body = (
        f"\tcvt.rn.f32.u32 %r2, %r1;\n\tfma.rn.f32 %r3, %r2, 0f3D000000, 0f3D000000;\n\t{name}.approx.f32 %r5, %r3;\n"
    )
    got = {share: execute(body + STORE, approximation=share)[:64].view(np.float32) for share in (0.0, 0.5, 1.0)}
    x = (THREAD + 1) / 32
    exact = arithmetic.APPROXIMATE[name](x)
    size = 1 if name in ("sin", "cos") else np.maximum(np.abs(exact), 1) if name == "lg2" else np.abs(exact)
    for share, values in got.items():
        error = np.abs(values - exact) / (arithmetic.GRANTED[name] * size)
        assert (error <= share + 1.01 * 2.0**-24 * np.abs(exact) / (arithmetic.GRANTED[name] * size)).all()
    signs = np.sign(got[1.0].astype(np.float64) - exact)
    assert {-1.0, 1.0} <= set(signs[np.abs(exact) > 0.1].tolist())  # not all to the same side
    assert (got[1.0] != got[0.0]).mean() > 0.5
