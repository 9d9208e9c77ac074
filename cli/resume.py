"""Options that choose the settings: `--resume RUN` takes those of the run, `--linear-probe` those of a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["with_recipe", "with_settings_of_run"]


def with_recipe(command: Callable[[Any], None], kind: type[Any]) -> Callable[..., None]:
    """The command with settings of another class, which has other defaults.

    Args:
        command: takes settings.
        kind: class of the settings.
    """

    def chosen(config: Any) -> None:
        command(config)

    chosen.__doc__ = command.__doc__
    chosen.__annotations__ = {"config": Annotated[kind, tyro.conf.arg(name="")], "return": None}
    return chosen


def with_settings_of_run(
    command: Callable[[Any], None], kind: type[Any], words: Sequence[str]
) -> tuple[Callable[..., None], list[str]]:
    """The command and its words; after `--resume RUN`, a command whose defaults are the settings of that run.

    `--resume` without a folder stays what it is: a flag beside `--out`.

    Args:
        command: takes the settings.
        kind: class of the settings.
        words: after the name of the command.

    Raises:
        ValueError: the folder holds no run, or a run of another command.
    """
    words = list(words)
    place = words.index("--resume") if "--resume" in words else len(words)
    if not words[place + 1 :] or words[place + 1].startswith("-"):
        return command, words
    from denim.nim.run import settings_of_run

    settings = settings_of_run(Path(words[place + 1]), kind)

    def resumed(config: Any = settings) -> None:
        command(config)

    resumed.__doc__ = command.__doc__
    resumed.__annotations__ = {"config": Annotated[type(settings), tyro.conf.arg(name="")], "return": None}
    return resumed, words[:place] + words[place + 2 :]
