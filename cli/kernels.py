"""`denim kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from denim.benchmarks.machine_code.ptx.counts import Counts

BEGIN, END = "<!-- denim kernels: begin -->", "<!-- denim kernels: end -->"
COLUMNS = (
    "registers",
    "occupancy",
    "instructions",
    "int / mul / float / special / conv / mem / other",
    "loads",
    "stores",
    "kB moved / least",
    "bound, µs",
)
WIDE = {"int / mul / float / special / conv / mem / other", "kB moved / least"}


def _accesses(accesses: Mapping[str, int]) -> str:
    """Memory accesses in the code of a thread as "COUNTxWIDTH", widths in bytes, the widest first."""
    return " ".join(f"{n}x{width}" for width, n in sorted(accesses.items(), key=lambda item: -int(item[0]))) or "-"


def _row(entry: Mapping[str, Any]) -> list[str]:
    instructions = f"{entry['instructions']:.1f}"
    if len(entry["by_loop"]) > 1:
        instructions += " (" + ", ".join(f"{part:.1f}" for part in entry["by_loop"]) + ")"
    bound = entry.get("roofline")
    return [
        str(entry["registers"]),
        f"{entry['occupancy']:.0%}",
        instructions,
        " / ".join(f"{n:.1f}" for n in entry["classes"].values()),
        _accesses(entry["loads"]),
        _accesses(entry["stores"]),
        f"{entry['moved'] / 1e3:.0f} / {entry['minimum'] / 1e3:.0f}",
        f"{bound[bound['binds']]:.3f} {bound['binds']}" if bound else "-",
    ]


def _memory(entry: Mapping[str, Any]) -> str:
    return f"{entry['shared']} B shared, {entry['barriers']} barriers"


def _baseline_rows(table: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, passes in table.items():
        for part, kinds in passes.items():
            for kind, numbers in sorted(kinds.items(), key=lambda item: KINDS.index(item[0])):
                slow = f" + {numbers['slow']:.0f} in slow paths" if numbers.get("slow") else ""
                rows.append(
                    [
                        name,
                        part,
                        AS.get(kind, kind),
                        str(numbers["kernels"]),
                        f"{numbers['moved'] / 1e3:.0f}",
                        f"{numbers['instructions']:.1f}{slow}" if "instructions" in numbers else "-",
                        f"{numbers['bound']:.3f}" if "bound" in numbers else "-",
                        numbers.get("counted", "-"),
                        f"{numbers['bound'] / kinds['fused']['bound']:.2f}" if "bound" in numbers else "-",
                    ]
                )
    return rows


AS = {"compiled": "torch.compile", "naive": "naive tl.randn kernel"}
KINDS = ("fused", "naive", "compiled", "eager")
BASELINE_COLUMNS = (
    "operation",
    "pass",
    "as",
    "kernels",
    "kB moved",
    "instructions",
    "bound, µs",
    "bound from",
    "bound / fused",
)


EXECUTED = (
    "warp instructions",
    "lanes",
    "sectors read / least",
    "sectors written / least",
    "bank conflicts / requests",
    "kB to memory",
)


EXECUTED_COLUMNS = (
    "operation",
    "pass",
    "as",
    "kernels",
    "PTX instructions",
    "lanes",
    "sectors read / least",
    "sectors written / least",
    "bank conflicts",
    "kB to memory",
)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _executed_rows(table: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, passes in table.items():
        for part, kinds in passes.items():
            for kind, numbers in sorted(kinds.items(), key=lambda item: KINDS.index(item[0])):
                start = [name, part, AS.get(kind, kind)]
                if isinstance(numbers, str):
                    trap, _, _ = numbers.partition(":")
                    rows.append([*start, trap, *["-"] * (len(EXECUTED_COLUMNS) - 4)])
                    continue
                rows.append(
                    [
                        *start,
                        str(numbers["kernels"]),
                        f"{numbers['instructions']:.1f}",
                        f"{numbers['lanes']:.1%}",
                        _ratio(numbers["loads"]),
                        _ratio(numbers["stores"]),
                        _ratio(numbers["conflicts"]),
                        f"{numbers['memory'] / 1e3:.0f}",
                    ]
                )
    return rows


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _page(
    built: Mapping[str, Any],
    table: Mapping[str, Any] | None,
    reason: str | None,
    versions: str,
    ran: Mapping[str, Any] | None = None,
) -> str:
    targets = list(dict.fromkeys(target for entries in built.values() for target in entries))
    parts = [f"Written by `denim kernels --page` with {versions}. No number is measured: kernels ran on a CPU alone."]
    if table is not None:
        parts += [
            "### Baselines, H100",
            _markdown(BASELINE_COLUMNS, _baseline_rows(table)),
        ]
        if reason:
            parts.append(f"torch.compile's kernels are not available here: {reason}.")
    if ran is not None:
        parts += ["### Executed, H100", _markdown(EXECUTED_COLUMNS, _executed_rows(ran))]
    for target in targets:
        rows = [
            [name, *_row(entries[target]), _memory(entries[target])]
            for name, entries in built.items()
            if target in entries
        ]
        parts += [f"### {target}", _markdown(("kernel", *COLUMNS, "shared memory"), rows)]
    return "\n\n".join(parts)


def _insert(path: Path, text: str) -> None:
    """Replace the text between the marks of a page, and nothing else."""
    from denim.nim.files import atomic_write

    page = path.read_text(encoding="utf-8") if path.exists() else f"# Numbers of the kernels\n\n{BEGIN}\n{END}\n"
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{path} must hold {BEGIN!r} and behind it {END!r}, once each: the tables go between them")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    with atomic_write(path) as part:
        part.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _executed(counts: Counts) -> list[str]:
    """What was counted of a launch, in the order of `EXECUTED`."""
    traffic = [f"{part.sectors:,} / {part.least:,}" for part in (counts.loads, counts.stores)]
    shared = f"{counts.bank_conflicts:,} / {counts.shared_requests:,}"
    return [
        f"{counts.warp_instructions:,}",
        f"{counts.lanes:.1%}",
        *traffic,
        shared,
        f"{counts.memory_bytes / 1e3:,.0f}",
    ]


def _run(names: tuple[str, ...], console: Console) -> None:
    """Execute kernels on the CPU, and print what came of it; exits with 1 where a result is wrong or a trap springs."""
    from rich.table import Table

    from denim.benchmarks.machine_code import report
    from denim.benchmarks.machine_code.ptx.check import resized, run_case

    builds, _ = report.select(names, ["sm_90"])
    failed = 0
    for one in builds:
        case = resized(one.case)
        outcome = run_case(case, (one.part,), 90, count=True)
        failed += not outcome.holds
        console.print(f"{one.name}, compiled for sm_90, {case.batch} images or samples, executed on the CPU")
        if outcome.failure:
            console.print(f"  trapped: {outcome.failure}", soft_wrap=True)
        for agreement in outcome.agreements:
            said = (
                f"{agreement.outside:,} of {agreement.values:,} values are wrong" if agreement.outside else "as defined"
            )
            console.print(
                f"  {agreement.result}: {said}; {agreement.exact:.0%} of the values are determined to the last bit"
            )
        shown = Table("kernel", *EXECUTED, box=None)
        for kernel, counts in outcome.counts:
            shown.add_row(kernel, *_executed(counts))
        console.print(shown)
    if failed:
        raise SystemExit(1)


def main(
    only: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    json: Path | None = None,
    page: Path | None = None,
    update_budgets: bool = False,
    baselines: bool = True,
    workers: int | None = None,
    run: tuple[str, ...] = (),
) -> None:
    """Build every kernel for GPUs that need not be in this machine, and compare its machine code with the budgets.

    Registers, instructions and bytes are counted in the machine code, and what only execution shows on the CPU. Nothing
    is measured.

    Args:
        only: Names of kernels, or beginnings of names; without it, all kernels are built.
        targets: GPU architectures, such as sm_90 or gfx942; without it, all that this Triton can build for.
        json: JSON file that gets the whole report.
        page: Markdown page that gets the tables, between its marks.
        update_budgets: Write the numbers of this build as the new budgets (benchmarks/machine_code/budgets.json).
        baselines: Also count what a user would run without these kernels, for sm_90: the kernels of torch.compile, a
            naive kernel, and eager PyTorch; and execute these kernels on the CPU. Not done with --only.
        workers: Processes that build; without it, one per processor.
        run: Execute these kernels on the CPU instead, in a small size, and compare them with their definition; names,
            or beginnings of names.
    """
    try:
        from denim.benchmarks.machine_code import budgets as budget_file
        from denim.benchmarks.machine_code import inductor, report
        from denim.benchmarks.machine_code.builds import TARGETS, unavailable
        from denim.benchmarks.machine_code.executed import bounds, executed
        from denim.benchmarks.machine_code.invariants import broken_invariants
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("kernels are built with Triton, which is not installed: pip install triton (Linux)") from None
    import torch
    import triton
    from rich.table import Table

    from denim.nim.files import atomic_write
    from denim.nim.text import open_console, printable

    if run:
        if only or targets or json or page or update_budgets:
            raise ValueError("--run takes no other option: it executes kernels for sm_90 and builds no report")
        console = open_console()
        _run(run, console if console.is_terminal else open_console(width=220))
        return
    complete = not only and set(targets or TARGETS) == set(TARGETS)
    if update_budgets and not complete:
        raise ValueError("--update-budgets takes every kernel and target: leave out --only and --targets")
    cases, chosen = report.select(only, targets)
    console = open_console()
    for target in TARGETS:
        if not targets and (reason := unavailable(target)):
            if update_budgets:
                raise ValueError(f"--update-budgets takes every target, but cannot build for {target}: {reason}")
            console.print(f"without {target}: {reason}")
            complete = False
    built = report.report(only, targets, workers)
    table = ran = None
    reason = inductor.unavailable()
    if baselines and not only and "sm_90" in chosen:
        ran = executed(workers)
        table = bounds(inductor.baselines(workers), ran)
    versions = f"Triton {triton.__version__} and torch {torch.__version__}"

    # Before anything is printed: what took minutes must not be lost with the terminal.
    if json is not None:
        with atomic_write(json) as part:
            everything = {
                "triton": triton.__version__,
                "torch": torch.__version__,
                "kernels": built,
                "baselines": table,
                "executed": ran,
            }
            part.write_text(dumps(everything, indent=1))
    if page is not None:
        _insert(page, _page(built, table, reason, versions, ran))

    # A file or a pipe has no width of its own; a narrow terminal gets the columns that fit it.
    console = console if console.is_terminal else open_console(width=220)
    kept = [place for place, column in enumerate(COLUMNS) if console.width >= 180 or column not in WIDE]
    for target in chosen:
        columns = [COLUMNS[place] for place in kept]
        shown = Table("kernel", *columns, title=f"{target}, static, per output element and per image", box=None)
        for name, entries in built.items():
            if target in entries:
                row = _row(entries[target])
                shown.add_row(name, *(row[place] for place in kept))
        console.print(shown)
    if table is not None:
        shown = Table(*BASELINE_COLUMNS, title="baselines, H100", box=None)
        for row in _baseline_rows(table):
            shown.add_row(*row)
        console.print(shown)
        if reason:
            console.print(f"torch.compile's kernels are not available: {reason}")
    if ran is not None:
        shown = Table(*EXECUTED_COLUMNS, title="one image of 224 x 224, H100's PTX executed on the CPU", box=None)
        for row in _executed_rows(ran):
            shown.add_row(*row)
        console.print(shown)
    failures = [
        text
        for case in cases
        for target in chosen
        if target in built[case.name]
        for text in broken_invariants(case, target, built[case.name][target])
    ]
    if update_budgets:
        if failures:
            raise ValueError("budgets not updated, since machine code is not what it must be:\n" + "\n".join(failures))
        with atomic_write(budget_file.BUDGETS) as part:
            part.write_text(budget_file.budgets_text(built))
        console.print(
            f"budgets written to {printable(budget_file.BUDGETS)}; look at the difference before you commit it"
        )
        return
    version, budgets = budget_file.read_budgets()
    if version == triton.__version__:
        worse, better = budget_file.compare(budgets, built, complete)
        failures += worse
        for text in better:
            console.print(f"better: {text}", soft_wrap=True)
        if better and not worse:
            console.print("keep what was gained: denim kernels --update-budgets")
    else:
        console.print(f"not compared: the budgets were made with Triton {version}, this is {triton.__version__}")
    for text in failures:
        console.print(f"failed: {text}", soft_wrap=True)
    if failures:
        raise SystemExit(1)
    console.print(f"{len(built)} kernels for {', '.join(chosen)}: machine code as it must be")
