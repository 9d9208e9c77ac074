"""What reaches the user when something fails, and what happens to text that a terminal cannot take."""

from __future__ import annotations

import ast
import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from denim import cli
from denim.benchmarks.loaders import LOADERS
from denim.cli import bench
from denim.nim.owner import owned

ROOT = Path(cli.__file__).resolve().parents[1]


def denim(*words, status=0):
    """Run the command in this process: starting Python anew for each would take longer than the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["denim", *map(str, words)])
        try:
            cli.run()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    assert code == status


def alone(body, **environment):
    """Run `cli.run` in a process of its own, with a `main` of our own."""
    script = f"import os, signal, sys, time\nfrom denim import cli\ndef main():\n    {body}\ncli.main = main\ncli.run()"
    return [sys.executable, "-c", script], {**os.environ, **environment}


# Errors


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such preset"), "no such preset"),
        (ValueError("a name\x1b[2J with \udce9"), r"a name\x1b[2J with \xe9"),
        (ValueError(), "ValueError: no message"),
        (PermissionError(13, "Permission denied", "/a/\udce9"), r"/a/\xe9: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the shard is cut off"), "the shard is cut off"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (RuntimeError("CUDA error"), "RuntimeError: CUDA error"),
        (SafetensorError("header"), "SafetensorError: header"),
        (ImportError("libx.so"), "ImportError: libx.so"),
        (MemoryError(), "out of memory; take a smaller batch, or fewer workers"),
        (MemoryError("3 GiB"), "out of memory: 3 GiB; take a smaller batch, or fewer workers"),
        (caused(MemoryError("one image; take bf16"), RuntimeError("CUDA")), "out of memory: one image; take bf16"),
    ],
)
def test_failures_of_files_settings_and_machine_become_one_line(monkeypatch, capsys, error, message):
    def main():
        raise error

    monkeypatch.setattr(cli, "main", main)
    denim(status=2)
    assert capsys.readouterr().err == f"denim: {message}\n(DENIM_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("DENIM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run()


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    for kind in (TypeError, AssertionError, KeyError):
        monkeypatch.setattr(cli, "main", lambda kind=kind: {}[0] if kind is KeyError else (_ for _ in ()).throw(kind))
        with pytest.raises(kind):
            cli.run()


def test_warnings_are_lines_of_ours(monkeypatch, capsys):
    command, environment = alone(r"import warnings; warnings.warn('a \x1b[1m class')")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "denim: warning: a \\x1b[1m class\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_any_command_with_a_line(number):
    body = (
        f"signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), {int(number)}); time.sleep(9)"
    )
    command, environment = alone(body)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.startswith(f"denim: stopped by {number.name}; the same command goes on")
    assert done.stderr.count("\n") == 1


# Output


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
def test_no_locale_is_a_failure(encoding):
    command, environment = alone(r"print('caf\udce9 \u732b')", PYTHONIOENCODING=encoding)
    done = subprocess.run(command, env=environment, capture_output=True)
    shown = "猫".encode() if encoding.startswith("utf") else b"\\u732b"
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\udce9 " + shown + b"\n", b"")


@pytest.mark.parametrize("body", ["print('line')", "print('line\\n' * 100_000)", "print('line'); sys.exit(1)"])
def test_a_reader_that_goes_is_no_failure(body):
    command, environment = alone(body)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_cannot_be_written_is_a_message():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command, environment = alone("print('line')")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "denim: No space left on device\n(DENIM_TRACEBACK=1 shows where)\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(tmp_path, closed):
    """Nor does a file get the number of one: what a library prints would be written into it."""
    body = f"print('line'); print('line', file=sys.stderr); open({str(tmp_path / 'file')!r}, 'w').write('kept'); "
    body += "os.system('echo line; echo line >&2')"
    command, environment = alone(body)
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if closed != "2>&-" else b"line\n" * 2)
    assert done.stderr == (b"" if closed != ">&-" else b"line\n" * 2)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture
def odd(tmp_path):
    """A data set whose classes are named in Latin 1, like markup, and with control characters."""
    names = [os.fsdecode(b"caf\xe9"), "[bold]", "[red]:cat:", "\x1b[31mred\n", "plain"]
    for name in names:
        try:
            (tmp_path / "set" / name).mkdir(parents=True)
        except OSError:
            pytest.skip("this file system takes no such names")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "set" / name / "x.png")
        (tmp_path / "set" / name / "bad.png").write_bytes(b"no")
    return tmp_path / "set"


# pytest-xdist cannot send a warning whose text is not UTF-8 from its worker.
without_warnings = pytest.mark.filterwarnings("ignore:.*cannot be read and are left out")
SHOWN = (r"caf\xe9", "[bold]", "[red]:cat:", r"\x1b[31mred\n", "plain")


@without_warnings
def test_names_that_cannot_be_printed_are_shown(odd, tmp_path, capsys):
    out = tmp_path / "list.txt"
    denim("data", "check", odd, "--out", out, status=1)
    shown = capsys.readouterr().out
    for name in SHOWN:
        assert f"{odd}/{name}/bad.png: " in shown
    assert os.fsencode(odd) + b"/caf\xe9/bad.png\t" in out.read_bytes()
    denim("data", "stats", odd)
    shown = capsys.readouterr().out
    for name in SHOWN:
        assert re.search(rf"^ ?{re.escape(name)} +1 *$", shown, re.MULTILINE), name
    assert "\x1b" not in shown
    denim("data", "preview", odd, "--size", "8", "--count", "5", "--out", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


@without_warnings
def test_results_are_written_before_they_are_printed(odd, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    denim("data", "check", odd, "--out", tmp_path / "list.txt", status=141)
    assert len((tmp_path / "list.txt").read_bytes().split(b"bad.png")) == 6


# Machines


def test_a_folder_in_use_is_refused_by_name(tmp_path, capsys):
    with owned(tmp_path / "demo"):
        denim("demo", "--out", tmp_path / "demo", status=2)
    assert f"process {os.getpid()} on " in capsys.readouterr().err


# Advice


def test_advice_names_only_options_that_exist():
    """Every --option in a text of the package is one of some command, or of a tool that the package calls."""
    known = {
        option
        for name in cli.COMMANDS
        for command in cli.commands_of(name).values()
        for option in cli.options_of(command)
    }
    known |= {"--help", "--version", "--tyro-print-completion", "--no", "--no-flag"}
    unknown = {}
    for folder in ("cli", "defense", "nim"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                # The variables of a style sheet look like options.
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and ":root {" not in node.value:
                    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", node.value))
                    if named - known:
                        unknown[f"{file}:{node.lineno}"] = named - known
    assert unknown == {}


def test_bench_times_every_loader_that_there_is():
    assert inspect.signature(bench.data).parameters["loaders"].default == tuple(LOADERS)
