"""Machine code holds what it must and nothing that it must not."""

import pytest

WHERE = "Triton is a dependency on Linux x86-64 alone"
cases = pytest.importorskip("denim.benchmarks.machine_code.cases", reason=WHERE)
invariants = pytest.importorskip("denim.benchmarks.machine_code.invariants", reason=WHERE)
machine = pytest.importorskip("denim.benchmarks.machine_code.builds", reason=WHERE)

AVAILABLE = [target for target in machine.TARGETS if machine.unavailable(target) is None]


@pytest.mark.parametrize("target", AVAILABLE)
def test_machine_code_holds_what_it_must_and_nothing_that_it_must_not(built, target):
    assert [
        text
        for one in cases.BUILDS
        if one.built_for(target)
        for text in invariants.broken_invariants(one, target, built[one.name][target])
    ] == []


def test_every_broken_invariant_is_noticed(built):
    case = cases.BUILDS[0]
    entry = built[case.name]["sm_90"]
    for opcode in ("MUFU.LG2", "MUFU.SIN", "MUFU.COS", "F2FP.BF16", "IMAD.WIDE.U32"):
        without = {name: n for name, n in entry["opcodes"].items() if not name.startswith(opcode)}
        (text,) = invariants.broken_invariants(case, "sm_90", entry | {"opcodes": without})
        assert opcode in text
    opcodes = entry["opcodes"]
    wrong = ("REDG.E.ADD.F32", "DADD", "F2F.F64.F32", "I2F.F64.U32", "v_fma_f64", "global_atomic_add_f32")
    for change in ({"spills": 8}, {"local": 2}, *({"opcodes": opcodes | {opcode: 1}} for opcode in wrong)):
        assert len(invariants.broken_invariants(case, "sm_90", entry | change)) == 1
    assert len(invariants.broken_invariants(case, "sm_90", entry | {"followers": ["s_nop", "v_mul_f32"]})) == 1
    # bfloat16 that is cut off: every value, or some beside others that are rounded.
    cut = {(f"{name}.RZ" if name.startswith("F2FP.BF16") else name): n for name, n in opcodes.items()}
    mixed = opcodes | {"F2FP.BF16.F32.PACK_AB.RZ": 1}
    for changed in (cut, mixed, opcodes | {"F2FP.BF16.PACK_AB.RZ": 1}, opcodes | {"F2FP.F16.F32.PACK_AB.RZ": 1}):
        (text,) = invariants.broken_invariants(case, "sm_90", entry | {"opcodes": changed})
        assert "PACK_AB.RZ" in text
