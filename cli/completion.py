"""`denim completion`."""

from __future__ import annotations

import contextlib
import io
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from denim import cli

# tyro's function answers one empty word where it finds no option and no subcommand: bash would put a space behind the
# first letters of a file name instead of completing it.
FILES_IN_BASH = """
_denim() {
  _tyro_denim "$@"
  [[ -n "${COMPREPLY[0]}" ]] || COMPREPLY=()
}
complete -o default -F _denim denim
"""


def main(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Print a script that completes the subcommands and the options of `denim` in a shell.

    For bash: `denim completion bash > ~/.local/share/bash-completion/completions/denim`. For zsh: put the output as
    `_denim` into a folder of $fpath. For fish: `denim completion fish > ~/.config/fish/completions/denim.fish`.

    Args:
        shell: The shell that reads the script.
    """
    app = SubcommandApp()
    for name, what in cli.COMMANDS.items():
        commands = cli.commands_of(name)
        group = app if "" in commands else SubcommandApp()
        for part, command in commands.items():
            group.command(name=part or name)(command)
        if group is not app:
            app.command(group, name=name, help=what)
    script = io.StringIO()
    try:
        with contextlib.redirect_stdout(script):
            app.cli(prog="denim", args=["--tyro-print-completion", shell])
    except SystemExit as stop:  # tyro ends the process when the script is complete
        if stop.code:
            raise
    print(script.getvalue() + FILES_IN_BASH * (shell == "bash"), end="")
