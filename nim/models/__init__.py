"""The models that ship with Denim. Each is a folder here, and `from_pretrained` takes the name of the folder.

A folder holds a model (model.safetensors, config.json, README.md), or a whole defense (see `De3.save_pretrained`).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_models"]

FOLDER = Path(__file__).parent
MARKS = ("config.json", "de3.json")  # one of them is in the folder of every model or defense


def shipped_models() -> dict[str, Path]:
    """The folders of the models that ship with this version, by name; empty where none does."""
    folders = sorted(path for path in FOLDER.iterdir() if any((path / mark).is_file() for mark in MARKS))
    return {folder.name: folder for folder in folders}
