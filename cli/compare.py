"""`denim compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def main(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path | None, tyro.conf.Positional] = None,
    defenses: tuple[str, str] | None = None,
) -> None:
    """Compare two evaluations, or two defenses, image by image: a paired test under every attack that both have.

    Args:
        first: Folder of an evaluation.
        second: Folder of another one, of the same images; without it, two defenses of the first one are compared.
        defenses: Names of two defenses, one of the first evaluation and one of the second. Without it, each defense is
            compared with that of the same name.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from denim.defense.comparison import compare
    from denim.nim.text import open_console, printable

    found = compare(first, second, defenses)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("attack",) if defenses else ("defense", "attack"):
        table.add_column(head, overflow="fold")
    for head in ("images", "first", "second", "difference", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in found:
        value, low, high = (100 * x for x in (row.difference.value, row.difference.low, row.difference.high))
        numbers = (
            str(row.num_images),
            f"{100 * row.first:.1f}",
            f"{100 * row.second:.1f}",
            f"{value:+.1f} [{low:+.1f}, {high:+.1f}]",
            f"{row.p_value:.4f}",
        )
        names = (row.attack,) if defenses else (row.defense, row.attack)
        table.add_row(*map(Text, map(printable, names)), *map(Text, numbers))
    console = open_console()
    console.print(table)
    subjects = [printable(first), printable(second or first)]
    if defenses:
        subjects = [f"{printable(name)} in {folder}" for name, folder in zip(defenses, subjects, strict=True)]
    console.print(
        f"first: {subjects[0]}; second: {subjects[1]}. Mean accuracy in % on the images that both have, and the "
        "difference with its paired 95% interval. p: paired sign-flip test, two-sided, of each row by itself; of "
        f"{len(found)} rows about {0.05 * len(found):.1f} are below 0.05 by chance alone.",
        markup=False,
    )
