"""`denim runs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs"),),
    compare: bool = False,
    plot: bool = False,
) -> None:
    """List the runs in folders: what they are, how far they are, and their last numbers.

    Args:
        folders: Runs, or folders with runs at any depth.
        compare: Show the settings in which the runs differ, with their last numbers.
        plot: Draw the loss and the learning rate of each run into loss.png in its folder, which a run does at its end.
    """
    from denim.nim.runs import differences, draw_curve, find_runs, tabulated
    from denim.nim.text import printable

    runs = list({run.folder.resolve(): run for folder in folders for run in find_runs(folder)}.values())
    if not runs:
        raise ValueError(f"no runs in {', '.join(map(str, folders))}: a run is a folder with run.json")
    if compare and len(runs) < 2:
        raise ValueError(f"{runs[0].folder} is the only run, and a comparison needs two: name more folders")
    names = [printable(run.folder) for run in runs]
    results = tabulated(runs)
    if compare:
        rows = [["", *names], *([name, *values] for name, values in differences(runs).items())]
        rows += [row for name in results[0] if any((row := [name, *(result[name] for result in results)])[1:])]
    else:
        rows = [["run", "command", "of", *results[0]]]
        rows += [
            [name, run.command, run.what, *result.values()]
            for name, run, result in zip(names, runs, results, strict=True)
        ]
    print(_table([[printable(cell) for cell in row] for row in rows]))
    if plot:
        for run in runs:
            if run.settings and (picture := draw_curve(run.folder)) is not None:
                print(printable(picture))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns that are aligned; the first row has their names, and a column that is empty below it is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
