"""The `denim` command: one thin file per subcommand."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence

__all__ = ["main"]

COMMANDS = {
    "demo": "pretrain, fine-tune and evaluate on digits in a few minutes on a CPU",
    "pretrain": "pretrain a denoiser (NIM, MAE or DMAE)",
    "finetune": "fine-tune a classifier on denoised, noisy or clean images",
    "evaluate": "attack and score a defense, and write a report",
    "denoise": "show what a denoiser makes of a picture",
    "data": "index, check, describe, show and pack a data set",
    "kernels": "build the GPU kernels without a GPU, count their machine code, hold it against budgets",
    "bench": "check and time the kernels on this machine",
    "doctor": "say what is usable on this machine, and why the rest is not",
}


def _choose(program: str, commands: Mapping[str, str], words: Sequence[str]) -> str:
    """The first word, which has to be a command; else usage, and the end."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {what}" for name, what in commands.items()]
    help = f"{program} COMMAND --help lists its options."
    usage = "\n".join((f"usage: {program} COMMAND [OPTIONS]", "", *lines, "", help))
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        print(f"{program}: unknown command {words[0]!r}\n\n{usage}", file=sys.stderr)
        raise SystemExit(2)
    return words[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand. A mistake of the user's ends in one line on stderr and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = f"denim {_choose('denim', COMMANDS, words)}"
    # Only the chosen command is imported, so that help and mistakes answer at once.
    module, words = importlib.import_module(f"denim.cli.{words[0]}"), words[1:]
    command = getattr(module, "main", None)
    if command is None:  # a command of commands: COMMANDS again, and a function for each
        name = _choose(program, module.COMMANDS, words)
        program, command, words = f"{program} {name}", getattr(module, name), words[1:]
    import tyro

    try:
        tyro.cli(command, args=words, prog=program)
    except SystemExit as stop:
        if stop.code == 2:  # tyro has said what is wrong, but not what would be right
            print(f"options of {program}: {' '.join(_options(command))}", file=sys.stderr)
        raise


def _options(command: Callable[..., None]) -> list[str]:
    """The names of a command's options; those of a dataclass are its fields."""
    names: list[str] = []
    for name, annotation in typing.get_type_hints(command).items():
        fields = dataclasses.fields(annotation) if dataclasses.is_dataclass(annotation) else []
        names += [field.name for field in fields] or [name] * (name != "return")
    return [f"--{name.replace('_', '-')}" for name in names]


def run() -> None:
    """Entry point: `main` without tracebacks for mistakes of the user's."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("DENIM_TRACEBACK"):
            raise
        print(f"denim: {error}\n(DENIM_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "denim: interrupted; the same command goes on where it stopped (pretrain, finetune: with --resume)",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
