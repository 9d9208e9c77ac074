"""What the command answers before it works: help, version, completion, and the nearest name for a misspelt one."""

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from denim import cli

# Slow to import (torch alone takes 2.5 s of CPU time), and no help text needs them.
SLOW = {"torch", "numpy", "scipy", "PIL", "timm", "triton", "matplotlib", "sklearn", "rich", "tensorboard"}
COMMANDS = [" ".join((name, part)).strip() for name in cli.COMMANDS for part in cli.commands_of(name)]


@pytest.fixture
def denim(capsys):
    """Run `denim` with the given words in this process; answer its status, output and errors."""

    def run(*words):
        status = 0
        try:
            cli.main(words)
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


EVERY = ["", "data", "bench", *COMMANDS]


def test_help_imports_nothing_slow():
    script = f"""
import contextlib, io, sys
from denim import cli
for command in {EVERY}:
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            cli.main([*command.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
    assert "usage: denim" in shown.getvalue(), command
    print(command, *({SLOW} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.strip() for line in done.stdout.splitlines()] == EVERY


@pytest.fixture(scope="module")
def bash_script():
    return subprocess.run(
        [sys.executable, "-m", "denim.cli", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def taken(bash_script):
    """{command: {flags of an option: its help}} as tyro parses them."""
    spec = ast.literal_eval(re.search(r"^COMPLETION_SPEC = (.*)$", bash_script, re.MULTILINE)[1])
    found = {}
    for command in COMMANDS:
        node = functools.reduce(lambda node, name: node["subcommands"][name], command.split(), spec)
        found[command] = {tuple(option["flags"]): option["description"] for option in node["options"]}
        found[command].pop(("-h", "--help"))
    return found


def test_options_of_every_command_are_those_that_tyro_takes(taken):
    for command, options in taken.items():
        name, _, part = command.partition(" ")
        flags = {flag for flags in options for flag in flags if flag.startswith("-")}
        assert flags == set(cli.options_of(cli.commands_of(name)[part])), command


def test_every_option_has_a_sentence(taken):
    for command, options in taken.items():
        for flags, text in options.items():
            sentence = text.rpartition(" • ")[2]  # behind the kind of value
            assert re.match(r"[A-Z].*\.( \(default.*\)| \(required\))?$", sentence), (command, flags, text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("denim ", {*cli.COMMANDS, "-h", "--help"}),
        ("denim pre", {"pretrain"}),
        ("denim data ", {*cli.commands_of("data"), "-h", "--help"}),
        ("denim data pack set --sh", {"--shard-size"}),
        ("denim pretrain --out run --warm", {"--warmup-epochs"}),
        ("denim completion ", {"-h", "--help"}),
        ("denim denoise pho", set()),  # bash itself completes file names
    ],
)
def test_bash_completes_commands_and_options(bash_script, tmp_path, line, expected):
    script = f"""{bash_script}
COMP_WORDS=({" ".join(map(repr, line.split(" ")))}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_denim; printf '%s\\n' "${{COMPREPLY[@]}}"; complete -p denim
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    *found, registered = done.stdout.splitlines()
    assert {word for word in found if word} == expected
    assert registered == "complete -o default -F _denim denim"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_command(denim, shell):
    status, script, errors = denim("completion", shell)
    assert (status, errors) == (0, "")
    assert all(name in script for name in (*cli.COMMANDS, *cli.commands_of("data"), "--warmup-epochs"))


def test_version(denim):
    assert denim("--version") == (0, f"denim {version('denim-vision')}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrian",), "denim: unknown command 'pretrian'; did you mean pretrain?"),
        (("data", "idnex"), "denim data: unknown command 'idnex'; did you mean index?"),
        (("xyz",), "denim: unknown command 'xyz'"),
        (("pretrain", "--epoch", "3"), "denim pretrain: unknown option --epoch; did you mean --epochs?"),
        (("pretrain", "--epoch-count=3"), "denim pretrain: unknown option --epoch-count; did you mean --epochs?"),
        (("evaluate", "--clasifier", "x"), "denim evaluate: unknown option --clasifier; did you mean --classifier?"),
        (
            ("data", "pack", "-shard_size", "1"),
            "denim data pack: unknown option -shard-size; did you mean --shard-size?",
        ),
        (
            ("bench", "kernels", "--no-complie"),
            "denim bench kernels: unknown option --no-complie; did you mean --no-compile?",
        ),
        (("denoise", "x.png", "--xyzxyz"), "denim denoise: unknown option --xyzxyz"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(denim, words, message):
    status, shown, errors = denim(*words)
    assert (status, shown) == (2, "")
    assert errors.splitlines()[0] == message


def test_negative_numbers_and_underscores_are_no_unknown_options():
    for number in ("-1", "-.5", "-1e-3", "-inf"):
        cli._refuse_unknown_options("denim denoise", cli.commands_of("denoise")[""], ["--sigma", number])
    cli._refuse_unknown_options("denim pretrain", cli.commands_of("pretrain")[""], ["--warmup_epochs=3", "--no_flip"])
