"""Tables of an evaluation: for the terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from denim.defense.cells import WORST, Cell
from denim.defense.evaluation import Evaluation
from denim.defense.report.names import (
    attacks_of,
    by_place,
    checks_passed,
    defenses_of,
    draws_text,
    images_text,
    is_derived,
    leak_text,
    short_names,
    sigma_text,
)
from denim.defense.scores import Interval
from denim.nim.files import atomic_write
from denim.nim.text import printable

__all__ = ["csv_row", "csv_tries", "latex", "markdown", "print_table", "write_csv"]


def write_csv(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows, of which the first one names the columns; a name that is not UTF-8 is escaped."""
    with (
        atomic_write(file) as staged,
        staged.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print mean accuracies with 95 % intervals, defenses by attacks, then what the numbers are, then the warnings.

    Nothing is cut off: where the console is too narrow for all attacks, there are several tables.
    """
    attacks = attacks_of(evaluation)
    form: Callable[[Interval], str] = str
    groups = [attacks]
    if not _fits(evaluation, attacks, form, console):
        form, groups = _plus_minus, []
        for attack in attacks:
            if groups and _fits(evaluation, [*groups[-1], attack], form, console):
                groups[-1].append(attack)
            else:
                groups.append([attack])
    for group in groups:
        console.print(_console_table(evaluation, group, form))
    interval = "95% interval over images" + (" (± its longer side)" if form is _plus_minus else "")
    lines = [
        f"Mean accuracy in % over {draws_text(evaluation)} of noise, {images_text(evaluation)}, {interval}; "
        "vote and worst of R are in the CSV.",
        *(f"{short_names(attacks)[attack]}: {attack}" for attack in attacks if not is_derived(attack)),
    ]
    if any(attack.startswith(f"{WORST} ") for attack in attacks):
        lines.append("worst: by image, the attack of that radius that misleads most confirmation draws")
    for case in dict.fromkeys(cell.case for cell in evaluation.cells):
        members = [name for name, cell in defenses_of(evaluation).items() if cell.case == case]
        lines.append(f"{case}{leak_text(case)}: {', '.join(members)}")
    console.print(Text(printable("\n".join(lines), keep="\n"), style="dim"))
    if evaluation.health:
        console.print(Text(f"{checks_passed(evaluation)} (docs/method.md, health checks)", style="dim"))
    for warning in evaluation.warnings:
        console.print(Text(f"warning: {printable(warning)}", style="bold yellow"))


def _plus_minus(interval: Interval) -> str:
    half = max(interval.high - interval.value, interval.value - interval.low)
    return f"{100 * interval.value:.1f} ±{100 * half:.1f}"


def _console_table(evaluation: Evaluation, attacks: Sequence[str], form: Callable[[Interval], str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("defense", overflow="fold", max_width=None if form is str else 20)
    table.add_column("sigma", no_wrap=True, overflow="fold")
    names, cells = short_names(attacks_of(evaluation)), by_place(evaluation)
    for attack in attacks:
        table.add_column(Text(names[attack].replace(" ", "\n")), justify="right", no_wrap=True, overflow="fold")
    for name, cell in defenses_of(evaluation).items():
        means = (Text(form(cells[name, attack].scores.mean)) for attack in attacks)
        table.add_row(Text(printable(name)), Text(sigma_text(cell)), *means)
    return table


def _fits(evaluation: Evaluation, attacks: Sequence[str], form: Callable[[Interval], str], console: Console) -> bool:
    # A measurement never exceeds the width it is given, so it is given more than any table needs.
    options = console.options.update_width(100_000)
    return Measurement.get(console, options, _console_table(evaluation, attacks, form)).maximum <= console.width


def markdown(evaluation: Evaluation) -> str:
    """The table of mean accuracies in Markdown."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", printable(text))

    head, rows = _mean_rows(evaluation)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    # Rows of dashes and the intervals are ours; names are not.
    texts = [[escaped(cell) if line is not lines[1] else cell for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in texts)


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def latex(evaluation: Evaluation) -> str:
    """The table of mean accuracies in LaTeX, for the package booktabs."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in printable(text))

    head, rows = _mean_rows(evaluation)
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [
            f"% Mean accuracy in percent over {draws_text(evaluation)}, {images_text(evaluation)}, with 95 % "
            "intervals.",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _mean_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of mean accuracies."""
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    names = short_names(attacks)
    rows = [
        [name, sigma_text(cell), *(str(cells[name, attack].scores.mean) for attack in attacks)]
        for name, cell in defenses_of(evaluation).items()
    ]
    return ["defense", "sigma", *(names[attack] for attack in attacks)], rows


def _csv_text(text: str) -> str:
    """A name that a spreadsheet does not run as a formula (OWASP, "CSV injection")."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def csv_row(cell: Cell) -> dict[str, object]:
    """A line of results.csv: accuracies are shares in [0, 1]."""
    row: dict[str, object] = {
        **_csv_place(cell),
        "num_images": cell.scores.num_images,
        "score_draws": cell.scores.score_draws,
    }
    intervals = {
        "mean": cell.scores.mean,
        "vote": cell.scores.vote,
        "worst": cell.scores.worst,
        "difference": cell.difference,
    }
    for name, interval in intervals.items():
        row[name] = None if interval is None else interval.value
        row[f"{name}_low"] = None if interval is None else interval.low
        row[f"{name}_high"] = None if interval is None else interval.high
    return row | {"gradients": cell.gradients, "gradients_saved": cell.gradients_saved, "seconds": cell.seconds}


def _csv_place(cell: Cell) -> dict[str, object]:
    return {
        "defense": _csv_text(cell.defense),
        "sigma": cell.sigma,
        "frozen": str(cell.frozen).lower(),
        "case": _csv_text(cell.case),
        "attack": _csv_text(cell.attack),
        "epsilon": cell.epsilon,
    }


def csv_tries(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """A line for each random cell and number of tries."""
    return [
        _csv_place(cell) | {"tries": n, "accuracy": entry.value, "low": entry.low, "high": entry.high}
        for cell in cells
        for n, entry in enumerate(cell.resubmission, start=1)
    ]
