"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from denim.defense.evaluation import Evaluation
from denim.defense.report.page import html_page
from denim.defense.report.pictures import resubmissions, strength, strengths, tradeoff, written_picture
from denim.defense.report.tables import csv_row, csv_tries, latex, markdown, write_csv
from denim.nim.files import atomic_write

__all__ = ["write_report"]


def write_report(evaluation: Evaluation, out: Path, *, title: str, command: str = "", data: str = "") -> Path:
    """Write `out`/report.html, results.csv, table.md, table.tex and tradeoff.png, .svg and .pdf, each in one step.

    Where a defense is random, also resubmission.csv and resubmission.png: accuracy against the number of tries. Where
    attacks differ in radius, steps or EOT alone, also strength.png: accuracy against these.

    The page needs no other file and no network; without scripts its tables cannot be sorted, and all else is there.
    The tables of Markdown and LaTeX (with the package booktabs) have mean accuracies in percent. results.csv has one
    line per cell; its accuracies and their 95 % intervals are shares in [0, 1], sigma is in 0-255 pixel levels, epsilon
    in [0, 1] units, and what does not apply is empty.

    Args:
        evaluation: what `evaluate` returned.
        out: folder, made where absent.
        title: heading of the page.
        command: that made the evaluation, for the page.
        data: where the images come from, likewise.

    Returns:
        The path of report.html.
    """
    write_csv(out / "results.csv", [csv_row(cell) for cell in evaluation.cells])
    for ending, text in (("md", markdown(evaluation)), ("tex", latex(evaluation))):
        with atomic_write(out / f"table.{ending}") as staged:
            staged.write_text(text, encoding="utf-8")
    curve = tradeoff(evaluation)
    pictures = {"tradeoff": written_picture(curve, out / "tradeoff.png")}
    for ending in ("svg", "pdf"):
        written_picture(curve, out / f"tradeoff.{ending}")
    if strengths(evaluation):
        pictures["strength"] = written_picture(strength(evaluation), out / "strength.png")
    if tries := csv_tries(evaluation.cells):
        write_csv(out / "resubmission.csv", tries)
        pictures["resubmission"] = written_picture(resubmissions(evaluation), out / "resubmission.png")
    with atomic_write(out / "report.html") as staged:
        page = html_page(evaluation, title, command, data, curve, pictures)
        staged.write_text(page, encoding="utf-8")
    return out / "report.html"
