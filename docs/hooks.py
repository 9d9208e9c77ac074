"""Hooks of mkdocs: pages that stand at the top level of the repository are part of the site too."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocstrings import Inventory

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[1]
# Name in the repository, and in the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "checks.md", "CHANGELOG.md": "changelog.md"}
# A folder that the site has a page for, and a file that it offers as it is.
FOLDERS = {"examples": "examples.md"}
FILES = ("CITATION.cff",)
# The API reference must hold every name that these export.
PACKAGES = ("kernels", "nim", "nim/data", "defense", "defense/attacks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, with links that lead to their places in the site. `--strict` fails where one leads nowhere."""

    def place(match: re.Match[str]) -> str:
        target = match[1].removeprefix("docs/")
        return f"]({(PAGES | FOLDERS).get(target, target)})"

    for source, page in PAGES.items():
        text = re.sub(r"\]\((?!https?:)([^)]+)\)", place, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    for source in FILES:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Compare the reference with `__all__` of the packages.

    A module hides a function of the same name from mkdocstrings, which says nothing; such a function has to be named by
    its module on the page.

    Raises:
        PluginError: names that no page documents.
    """
    with (Path(config.site_dir) / "objects.inv").open("rb") as file:
        documented = Inventory.parse_sphinx(file)
    missing = []
    for package in PACKAGES:
        root = f"denim.{package.replace('/', '.')}"
        known = {
            key.rpartition(".")[2] for key, item in documented.items() if key.startswith(root) and item.role != "module"
        }
        missing += [f"{root}.{name}" for name in exported(ROOT / package / "__init__.py") if name not in known]
    if missing:
        raise PluginError(f"the API reference lacks {', '.join(missing)}: name them in docs/api/")


def exported(path: Path) -> list[str]:
    """The names in `__all__` of a module, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise PluginError(f"{path} has no __all__")
