"""The budgets that kernels are held against: `budgets.json`, its reader, its writer, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

__all__ = ["BUDGETS", "budget", "budgets_text", "compare", "read_budgets"]

BUDGETS = Path(__file__).parent / "budgets.json"
# Fewer than this share of instructions more is noise of the compiler's; more is a change of the kernel's.
TOLERANCE = 0.03


def _width(accesses: Mapping[str, int]) -> int:
    """The width, in bytes, that at least half of the bytes move in, or wider ones; 0 without accesses."""
    total = sum(int(width) * n for width, n in accesses.items())
    wide = 0
    for width in sorted(map(int, accesses), reverse=True):
        wide += width * accesses[str(width)]
        if 2 * wide >= total:
            return width
    return 0


def budget(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the budget file keeps of one entry of the report."""
    return {
        "registers": entry["registers"],
        "occupancy": round(entry["occupancy"], 4),
        "spills": entry["spills"],
        "local": entry["local"],
        "loads": entry["loads"],
        "stores": entry["stores"],
        "instructions": round(entry["instructions"], 2),
    }


def _accesses(accesses: Mapping[str, int]) -> str:
    return " + ".join(f"{n} x {width} bytes" for width, n in accesses.items()) or "none"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What became worse than a budget allows, and what became better."""
    worse: list[str] = []
    better: list[str] = []

    def note(change: float, text: str) -> None:
        if change:
            (worse if change > 0 else better).append(text)

    note(
        before["occupancy"] - after["occupancy"],
        f"occupancy {before['occupancy']:.1%} -> {after['occupancy']:.1%} "
        f"({before['registers']} -> {after['registers']} registers)",
    )
    for name, what in (("spills", "spills"), ("local", "local-memory instructions")):
        if after[name] or before[name]:
            note(
                # Any at all is too many, whatever the budget says.
                1 if after[name] else -1,
                f"{what} {before[name]} -> {after[name]}",
            )
    for name in ("loads", "stores"):
        note(
            _width(before[name]) - _width(after[name]),
            f"{name} {_accesses(before[name])} -> {_accesses(after[name])}",
        )
    old, new = before["instructions"], after["instructions"]
    if abs(new / old - 1) > TOLERANCE:
        note(new - old, f"instructions per output element {old:.2f} -> {new:.2f} ({new / old - 1:+.1%})")
    return worse, better


def compare(
    budgets: Mapping[str, Any], built: Mapping[str, Mapping[str, Any]], complete: bool
) -> tuple[list[str], list[str]]:
    """Hold a report against the budgets.

    A kernel fails that has lost occupancy, that spills or uses local memory, most of whose bytes move in narrower
    accesses, or that has over 3 % more instructions.

    Args:
        budgets: {case: {target: `budget`}}.
        built: from `report`.
        complete: the report holds every case and target, so a budget without an entry is out of date.

    Returns:
        Failures and improvements, a line each with what was before and what is now.
    """
    failures, improvements = [], []
    update = "run `denim kernels --update-budgets`, look at the difference and commit it"
    for name, targets in built.items():
        for target, entry in targets.items():
            before = budgets.get(name, {}).get(target)
            if before is None:
                failures.append(f"{name}, {target}: has no budget; {update}")
                continue
            worse, better = _changes(before, budget(entry))
            failures += [f"{name}, {target}: {text}" for text in worse]
            improvements += [f"{name}, {target}: {text}" for text in better]
    if complete:
        gone = [
            f"{name}, {target}"
            for name, kept in budgets.items()
            for target in kept
            if target not in built.get(name, {})
        ]
        failures += [f"{place}: has a budget but is not built; {update}" for place in gone]
    return failures, improvements


def read_budgets(path: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Triton's version when the budgets were made, and {case: {target: `budget`}}.

    Raises:
        ValueError: there is no such file.
    """
    path = path or BUDGETS
    if not path.exists():
        raise ValueError(f"no budgets at {path}; `denim kernels --update-budgets` makes them")
    kept = json.loads(path.read_text())
    return kept["triton"], kept["budgets"]


def budgets_text(built: Mapping[str, Mapping[str, Any]]) -> str:
    """The budget file that a report amounts to: one line per case and target, for readable differences."""
    cases = []
    for name, targets in built.items():
        lines = ",\n".join(f"   {json.dumps(target)}: {json.dumps(budget(entry))}" for target, entry in targets.items())
        cases.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return f'{{\n "triton": {json.dumps(triton.__version__)},\n "budgets": {{\n' + ",\n".join(cases) + "\n }\n}\n"
