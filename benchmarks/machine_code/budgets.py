"""The budgets of the kernels in `budgets.json`: reading, writing, and comparing a report with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

from denim.nim.files import read_json

__all__ = ["BUDGETS", "budget", "budgets_text", "compare", "read_budgets"]

BUDGETS = Path(__file__).parent / "budgets.json"
# A number of instructions that grows by less than this share passes: compilers reorder code for no visible reason.
TOLERANCE = 0.03


def _width(accesses: Mapping[str, int]) -> int:
    """The largest width such that at least half of the bytes move in accesses as wide, in bytes; 0 without accesses."""
    total = sum(int(width) * n for width, n in accesses.items())
    wide = 0
    for width in sorted(map(int, accesses), reverse=True):
        wide += width * accesses[str(width)]
        if 2 * wide >= total:
            return width
    return 0


def budget(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an entry of the report that the budget file keeps."""
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
    """Two lists of sentences: what is worse than the budget allows, and what is better than the budget."""
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
                # None is allowed, whatever the budget says.
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
    """Compare a report with the budgets.

    A kernel fails if it loses occupancy, spills or uses local memory, moves most of its bytes in narrower accesses, or
    has over 3 % more instructions.

    Args:
        budgets: {build: {target: `budget`}}.
        built: from `report`.
        complete: the report holds every build and target, so a budget without an entry is out of date.

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
    """The version of Triton that the budgets were made with, and {build: {target: `budget`}}.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    path = path or BUDGETS
    if not path.exists():
        raise ValueError(f"no budgets at {path}; `denim kernels --update-budgets` makes them")
    kept = read_json(path, {"triton": str, "budgets": dict})
    return kept["triton"], kept["budgets"]


def budgets_text(built: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a budget file for a report: one line per build and target, so that differences are readable."""
    cases = []
    for name, targets in built.items():
        lines = ",\n".join(f"   {json.dumps(target)}: {json.dumps(budget(entry))}" for target, entry in targets.items())
        cases.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return f'{{\n "triton": {json.dumps(triton.__version__)},\n "budgets": {{\n' + ",\n".join(cases) + "\n }\n}\n"
