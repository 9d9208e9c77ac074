"""The `denim` command: one thin file per subcommand.

The signature and the docstring of a subcommand make its parser and its help text (tyro). The files of the subcommands
import torch and everything else that is slow to import inside their functions, so that help, completion and mistakes
answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from denim.cli.waiting import Others, choose_waiting

__all__ = ["main", "run"]

COMMANDS = {
    "demo": "pretrain, fine-tune and evaluate on digits in a few minutes on a CPU",
    "pretrain": "pretrain a denoiser (NIM, MAE or DMAE)",
    "finetune": "fine-tune a classifier on denoised, noisy or clean images",
    "plan": "say what a pretraining takes in memory and time, from its sizes alone",
    "evaluate": "attack and score a defense, and write a report",
    "compare": "compare two evaluations by a paired test, image by image",
    "certify": "certify a defense by randomized smoothing, and draw the certified accuracy",
    "runs": "list and compare trainings, and draw their loss",
    "denoise": "show what a denoiser makes of a photo",
    "data": "index, check, describe, show and pack a data set",
    "kernels": "build the GPU kernels without a GPU, count their machine code, hold it against budgets",
    "bench": "check and time the kernels, training steps and the loaders on this machine",
    "doctor": "say what is usable on this machine, and why the rest is not",
    "completion": "print a completion script for bash, zsh or fish",
}
# A name is suggested in place of a word if they have this share of their characters in common (difflib's ratio).
SIMILAR = 0.5

Command = Callable[..., None]


def version() -> str:
    """The installed version of Denim, such as "0.1.0"."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("denim-vision")
    except PackageNotFoundError:
        return "(not installed)"


def commands_of(name: str) -> dict[str, Command]:
    """The functions of a subcommand: {"": main}, or one for each command of a group such as `denim data`."""
    module = importlib.import_module(f"denim.cli.{name}")
    parts = {part: part for part in getattr(module, "COMMANDS", ())} or {"": "main"}
    commands = {part: getattr(module, function) for part, function in parts.items()}
    for command in commands.values():
        # In the docstring of a function, tyro takes the end of a line for a line break of the help text. From Python
        # 3.13 on docstrings have no common indentation; `getdoc` takes it away on any version.
        command.__doc__ = re.sub(r"\n {8}(?=\S)", " ", inspect.getdoc(command) or "")
    return commands


def options_of(command: Command) -> list[str]:
    """The options of a subcommand, such as "--batch-size", in the order of its help; for a flag also "--no-flag"."""
    import tyro

    found: dict[str, object] = {}
    for name, annotation in typing.get_type_hints(command, include_extras=True).items():
        kind, *markers = typing.get_args(annotation) if hasattr(annotation, "__metadata__") else (annotation,)
        if dataclasses.is_dataclass(kind):
            fields = typing.get_type_hints(kind)
            found |= {field.name: fields[field.name] for field in dataclasses.fields(kind)}
        elif name != "return" and tyro.conf.Positional not in markers:
            found[name] = kind
    options = []
    for name, kind in found.items():
        option = name.replace("_", "-")
        options += [f"--{option}", f"--no-{option}"] if kind is bool else [f"--{option}"]
    return options


def _suggestion(word: str, names: Sequence[str]) -> str:
    """The end of a message, "; did you mean NAME?" with the name most like a word, or nothing."""
    bare = {name.lstrip("-"): name for name in names}
    near = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=SIMILAR)
    return f"; did you mean {bare[near[0]]}?" if near else ""


def _choose(program: str, commands: Mapping[str, str], words: Sequence[str]) -> str:
    """The first word, which must be a command; any other prints the usage and ends the process."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {what}" for name, what in commands.items()]
    help = f"`{program} COMMAND --help` lists the options of a command."
    usage = "\n".join((f"usage: {program} COMMAND [OPTIONS]", "", *lines, "", help))
    if program == "denim":
        usage += " `denim --version` prints the version."
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        suggestion = _suggestion(words[0], list(commands))
        print(f"{program}: unknown command {words[0]!r}{suggestion}\n\n{usage}", file=sys.stderr)
        raise SystemExit(2)
    return words[0]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _refuse_unknown_options(program: str, command: Command, words: Sequence[str]) -> None:
    options = options_of(command)
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        # A negative number is a value.
        if option.startswith("-") and option not in (*options, "-h", "--help", "-") and not _is_number(word):
            print(f"{program}: unknown option {option}{_suggestion(option, options)}", file=sys.stderr)
            print(f"options of {program}: {' '.join(options)}", file=sys.stderr)
            raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        arguments: the words after `denim`; by default those of the process.

    Raises:
        SystemExit: with status 2 for a mistake in the arguments, after a message on stderr; with status 0 after help.
    """
    others = Others()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"denim {version()}")
        return
    name, words = _choose("denim", COMMANDS, words), words[1:]
    commands, program = commands_of(name), f"denim {name}"
    part = ""
    if "" not in commands:
        part, words = _choose(program, importlib.import_module(f"denim.cli.{name}").COMMANDS, words), words[1:]
        program = f"{program} {part}"
    command = commands[part]
    _refuse_unknown_options(program, command, words)
    import tyro

    choose_waiting(others)
    module = importlib.import_module(f"denim.cli.{name}")
    if settings := getattr(module, "SETTINGS", None):
        from denim.cli.resume import with_recipe, with_settings_of_run

        for option, recipe in getattr(module, "RECIPES", {}).items():
            if option in words:
                command = with_recipe(command, recipe)
        command, words = with_settings_of_run(command, settings, words)
    tyro.cli(command, args=words, prog=program)


class Terminated(KeyboardInterrupt):
    """SIGTERM, outside of the work that ends at a place of its own choice (`denim.nim.stopping`)."""

    number = signal.SIGTERM


def run() -> None:
    """Entry point: `main`, with one line in place of a traceback for what is not a fault of the program.

    Raises:
        SystemExit: with status 2 for a mistake in settings or files, or a failure of the machine; 130 after Ctrl-C and
            143 after SIGTERM; 141 where the reader of the output has gone; else see `main`.
    """
    _open_closed_streams()
    before = warnings.formatwarning, signal.getsignal(signal.SIGTERM)
    warnings.formatwarning = _warning_line
    if before[1] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, a name that it cannot spell is no failure
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        from denim.nim.text import printable

        kept = printable(stop) or "the same command goes on where it stopped (pretrain, finetune: with --resume)"
        _complain(f"stopped by {signal.Signals(number).name}; {kept}")
        raise SystemExit(128 + number) from None
    except Exception as error:
        if os.environ.get("DENIM_TRACEBACK") or not isinstance(error, _expected()):
            raise
        _complain(f"{message_of(error)}\n(DENIM_TRACEBACK=1 shows where)")
        try:
            sys.stdout.flush()
        except OSError:  # this was the error, and would be raised again at the end of the process
            _drop_output()
        raise SystemExit(2) from None
    finally:
        warnings.formatwarning = before[0]
        if before[1] is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def message_of(error: Exception) -> str:
    """What an error says, in a form for users: never empty, and without characters that act on the terminal."""
    from denim.nim.text import printable

    if isinstance(error, OSError) and type(error).__str__ is OSError.__str__ and error.strerror:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return printable(f"{name}{error.strerror}")
    text = printable(error, keep="\n").strip()
    if isinstance(error, MemoryError):
        # Denim's own are raised from that of a library, and say what to do.
        advice = "" if error.__cause__ is not None else "; take a smaller batch, or fewer workers"
        return f"out of memory{': ' + text if text else ''}{advice}"
    # Libraries raise RuntimeError, and their messages rarely say what it is about.
    is_clear = isinstance(error, (ValueError, OSError, FloatingPointError)) and text
    return text if is_clear else f"{type(error).__name__}: {text or 'no message'}"


def _expected() -> tuple[type[Exception], ...]:
    """Errors about files, settings or the machine. Any other is a fault of the program, and keeps its traceback."""
    found = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
    safetensors = sys.modules.get("safetensors")  # what is not imported has raised nothing
    return (*found, safetensors.SafetensorError) if safetensors else found


def _complain(text: str) -> None:
    # One call: what other processes write to the same terminal stays out of the line.
    sys.stderr.write(f"denim: {text}\n")


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    from denim.nim.text import printable

    return f"denim: warning: {printable(message)}\n"


def _open_closed_streams() -> None:
    """Let what is printed go nowhere where this process was started without stdout or stderr, as some schedulers do.

    The next file that is opened would get the number of a closed stream, and what libraries print would get into it.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (for the whole process)


def _drop_output() -> None:
    """Let what is still buffered go nowhere: writing it at the end of the process would fail once more."""
    with contextlib.suppress(OSError, ValueError):  # no descriptor: nothing is written at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
