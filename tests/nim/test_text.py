"""Text on its way out."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from denim.nim.text import open_console, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Käse 猫 [bold] :cat:", "Käse 猫 [bold] :cat:"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("a\x1b[2Jb\r\n\t\x7f\x9b", r"a\x1b[2Jb\r\n\t\x7f\x9b"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("line\u2028end \ud800", r"line\u2028end \ud800"),
        (ValueError("no such file"), "no such file"),
    ],
)
def test_what_cannot_be_printed_is_shown(text, expected):
    assert printable(text) == expected


def test_characters_can_be_kept():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@given(st.binary(max_size=30))
def test_any_file_name_can_be_printed_and_encoded(name):
    shown = printable(os.fsdecode(name))
    assert shown.isprintable()
    shown.encode("utf-8")


def test_the_console_takes_text_for_what_it_says():
    shown = io.StringIO()
    console = open_console(file=shown, width=60)
    table = Table("[bold]", title="[red]t", box=None)
    table.add_row("[/x] :cat:")
    console.print(table, "[blue]:dog:")
    for text in ("[bold]", "[red]t", "[/x] :cat:", "[blue]:dog:"):
        assert text in shown.getvalue()
