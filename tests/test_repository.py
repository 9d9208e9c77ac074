"""What the files at the top level say of each other must agree."""

from __future__ import annotations

import re
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


def test_packages_hold_no_tests():
    """Each Python file in the folder of a package is a module of the wheel, whether or not the sdist leaves it out."""
    folders = [ROOT / folder for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()]
    assert folders
    assert [path for folder in folders for name in ("test_*.py", "conftest.py") for path in folder.glob(name)] == []


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    newest = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert newest == version


def test_ci_tests_the_versions_of_python_that_are_claimed():
    classifiers = [name.split(" :: ") for name in PROJECT["project"]["classifiers"]]
    claimed = [name[-1] for name in classifiers if name[:2] == ["Programming Language", "Python"]]
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert sorted(set(re.findall(r'python(?:-version)?: "([\d.]+)"', workflow))) == claimed
    assert re.search(r"make test-lowest|target: test-lowest", workflow)


def test_help_names_every_target_of_make():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    (shown,) = re.findall(r'@echo "make (.*)"', makefile)
    assert set(phony.split()) - set(shown.split(" | ")) == {"help", "types", "layers"}  # the last two are parts of lint
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `make ([\w-]+)` \|", contributing, re.M)) <= set(phony.split())
