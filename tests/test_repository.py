"""What the files at the top level say of each other must agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_links_for_type_checkers_are_the_packages():
    """mypy, pyright and the API reference find `denim.*` through .typing/denim alone."""
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    top_level = {name.removeprefix("denim."): folder for name, folder in mapped.items() if name.count(".") == 1}
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "denim").iterdir()}
    assert links == {name: ROOT / folder for name, folder in top_level.items()}
    assert all(path.is_dir() for path in links.values())
