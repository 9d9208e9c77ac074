"""What the pages say of the tree must be true of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from denim import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def test_environment_page_lists_every_variable_that_the_tree_reads():
    sources = [ROOT / "Makefile", ROOT / ".ci" / "run"]
    for folder in ("kernels", "nim", "defense", "benchmarks", "cli", "tests", "examples"):
        sources += (ROOT / folder).rglob("*.py")
    used = {name for path in sources for name in re.findall(r"\bDENIM_[A-Z_]*[A-Z]\b", path.read_text())}
    listed = re.findall(r"^\| `(DENIM_\w+)` \|", (DOCS / "environment.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    assert used == set(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_examples_page_includes_every_example():
    """A formatter that takes an include for Python breaks it, and mkdocs shows the broken line without a warning."""
    included = re.findall(r'^--8<-- "(.*)"$', (DOCS / "examples.md").read_text(), re.M)
    assert sorted(included) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("package", ["nim", "defense"])
def test_design_names_every_file(package):
    """Each once, in the table of the layout; a package's `__init__.py` is named where it holds more than names."""
    layout = (DOCS / "design.md").read_text().split("## Layout\n")[1].split("\n## ")[0]
    named = re.findall(rf"`({package}/[\w/]+\.py)`", layout)
    assert len(named) == len(set(named))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    names_alone = {
        f"{folder}/__init__.py" for folder in ("nim", "nim/data", "defense", "defense/attacks", "defense/report")
    }
    assert set(named) == files - names_alone


def test_every_page_is_in_the_navigation():
    """mkdocs says so too, where it is installed; a page that nobody can reach is not read."""
    navigation = set(re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    made = {"index.md", "checks.md", "changelog.md"}  # by docs/hooks.py, of pages at the top level
    assert navigation == made | {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_tables_of_the_page_on_scale_are_what_its_commands_print(monkeypatch, capsys):
    """But for the lines that explain the columns."""
    shown = re.findall(r"^```\n\$ denim ([^\n]*)\n(.*?)^```", (DOCS / "scaling.md").read_text(), re.M | re.S)
    assert len(shown) == 5
    for command, lines in shown:
        monkeypatch.setattr(sys, "argv", ["denim", *command.split()])
        cli.run()
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        heading = next(line for line in printed if "GPU-hours" in line).split()
        explained = [line for line in printed if line.partition(": ")[0] in heading]
        assert lines.splitlines() == [line for line in printed if line not in explained], command
