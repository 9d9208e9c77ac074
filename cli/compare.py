"""`denim compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def main(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
) -> None:
    """Compare two evaluations image by image: for every defense and attack that both have, a paired test.

    Args:
        first: Folder of an evaluation.
        second: Folder of another one, of the same images.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from denim.defense.comparison import compare
    from denim.nim.text import open_console, printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("defense", overflow="fold")
    table.add_column("attack", overflow="fold")
    for head in ("images", "first", "second", "difference", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    found = compare(first, second)
    for row in found:
        value, low, high = (100 * x for x in (row.difference.value, row.difference.low, row.difference.high))
        numbers = (
            str(row.num_images),
            f"{100 * row.first:.1f}",
            f"{100 * row.second:.1f}",
            f"{value:+.1f} [{low:+.1f}, {high:+.1f}]",
            f"{row.p_value:.4f}",
        )
        table.add_row(Text(printable(row.defense)), Text(printable(row.attack)), *map(Text, numbers))
    console = open_console()
    console.print(table)
    console.print(
        f"first: {printable(first)}; second: {printable(second)}. Mean accuracy in % on the images that both have, and "
        "the difference with its paired 95% interval. p: paired sign-flip test, two-sided, of each row by itself; of "
        f"{len(found)} rows about {0.05 * len(found):.1f} are below 0.05 by chance alone.",
        markup=False,
    )
