"""Text on its way to a terminal, a picture or a page: nothing in a name or a message may act there, or fail to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["open_console", "printable"]


def printable(text: object, keep: str = "") -> str:
    """Foreign text (names of files and classes, messages of libraries) with everything shown that cannot be printed.

    Bytes of a file name that are not UTF-8 become `\\xe9`; control characters, line ends, and marks that change the
    direction of writing become escapes such as `\\x1b` and `\\n`. Everything else stays.

    Args:
        text: anything; `str` makes a text of it.
        keep: characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in str(text))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8, as Python decodes it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def open_console(*, stderr: bool = False, **options: Any) -> Console:
    """rich's console, which takes every text for what it says: `[bold]` and `:smile:` can be the names of classes.

    Args:
        stderr: print to stderr instead of stdout.
        options: further arguments of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
