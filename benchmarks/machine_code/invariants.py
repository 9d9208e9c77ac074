"""What machine code must hold and must not, whatever the budgets say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from denim.benchmarks.machine_code.cases import Build
from denim.benchmarks.machine_code.roofline import GPUS

__all__ = ["broken_invariants"]

# Arithmetic and conversions of float64.
DOUBLE = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)|F64|_f64")

# Conversions between floating-point types.
CONVERSION = re.compile(r"F2FP?\.")


def broken_invariants(build: Build, target: str, entry: Mapping[str, Any]) -> list[str]:
    """What machine code must hold or must not, whatever the budgets say. Empty if all is well."""
    broken = []

    def count(*starts: str) -> int:
        return sum(n for opcode, n in entry["opcodes"].items() if opcode.startswith(starts))

    def require(kept: bool, text: str) -> None:
        if not kept:
            broken.append(f"{build.name}, {target}: {text}")

    nvidia = target in GPUS
    require(not entry["spills"] and not entry["local"], "registers are spilled to local memory")
    require(
        count("ATOM", "RED", "global_atomic", "buffer_atomic", "flat_atomic") == 0,
        "atomic operations: the order of a sum, and so its rounding, would change from run to run",
    )
    double = {opcode for opcode in entry["opcodes"] if DOUBLE.search(opcode)}
    require(not double, f"{', '.join(sorted(double))}: float64, which GPUs compute slowly, where float32 is meant")
    if build.draws_numbers == "normal":
        for opcode in ("MUFU.LG2", "MUFU.SIN", "MUFU.COS") if nvidia else ("v_log_f32", "v_sin_f32", "v_cos_f32"):
            require(count(opcode) > 0, f"no {opcode}: normals are not made with the approximate instructions")
        # CDNA 3 demands a wait state, which the compiler does not add to inline assembly.
        late = {opcode for opcode in entry["followers"] if not opcode.startswith("s_nop")}
        require(not late, f"{', '.join(sorted(late))} right behind a transcendental instruction, without a wait state")
    if build.draws_numbers:
        wide = "IMAD.WIDE.U32" if nvidia else "v_mad_u64_u32"
        # Two products in each of Philox's ten rounds, but those of a round may have a constant factor.
        require(count(wide) >= 18, f"{count(wide)} {wide}: Philox does not multiply 32 by 32 bits in one instruction")
    truncating = {opcode for opcode in entry["opcodes"] if CONVERSION.match(opcode) and "RZ" in opcode.split(".")}
    require(not truncating, f"{', '.join(sorted(truncating))}: conversions that truncate, where rounding is meant")
    if "bfloat16" in entry["dtypes"] and nvidia:
        require(count("F2FP.BF16") > 0, "no F2FP.BF16: bfloat16 is not rounded to by the conversion instruction")
    return broken
