"""One writer for a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys

import pytest

from denim.nim.owner import LOCK_FILE, OwnedError, is_owned, owned

HOLD = """
import sys
from pathlib import Path
from denim.nim.owner import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def without_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path, holder, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    said = rf"process {holder.pid} on {re.escape(socket.gethostname())} has been writing to it since 2\d\d\d-"
    with pytest.raises(OwnedError, match=said), owned(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_of_another_machine_stays_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": 2**22 + 1, "since": "yesterday"}))
    said = f"on elsewhere .* since yesterday.* remove .*{re.escape(LOCK_FILE)}"
    with pytest.raises(OwnedError, match=said), owned(tmp_path):
        pass
    (tmp_path / LOCK_FILE).unlink()
    with owned(tmp_path):
        pass


def test_a_second_owner_in_the_same_process_is_refused(tmp_path):
    with owned(tmp_path):
        with pytest.raises(OwnedError, match=f"process {os.getpid()} "), owned(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_forked_child_holds_nothing(tmp_path):
    """A loader's workers outlive a killed process by seconds."""
    end = multiprocessing.get_context("fork").Event()
    with owned(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=end.wait)
        child.start()
    try:
        with owned(tmp_path):
            pass
    finally:
        end.set()
        child.join()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    with owned(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    for leftover in (
        ".denim-0123abcd.part",
        ".denim-0123abcd-89efffff-17.part",
        "checkpoints/.denim-89efffff.part",
        "model/.tmpAb12xZ",
    ):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).touch()
    (folder / "checkpoints" / ".denim-ffffffff.part").mkdir()
    (folder / "checkpoints" / ".denim-ffffffff.part" / "file").touch()
    kept = ("checkpoints/00000001/x", ".hidden", ".denim-manifest.safetensors", "model/.tmp", "my.denim-0123abcd.part")
    for file in kept:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    with owned(folder):
        pass
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(kept)


def test_whether_a_folder_is_owned(tmp_path, monkeypatch):
    """It is while somebody has it, and not where a process was killed. The lock of nobody is left alone."""
    assert not is_owned(tmp_path)
    with owned(tmp_path):
        assert is_owned(tmp_path)
    assert not is_owned(tmp_path)
    code = HOLD.replace("sys.stdin.read()", "import os; os._exit(9)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    assert (tmp_path / LOCK_FILE).exists()
    monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("locked"))
    assert not is_owned(tmp_path)
    monkeypatch.undo()
    (tmp_path / LOCK_FILE).write_text('{"host": "elsewhere", "pid": 1, "since": "2020"}')
    assert not is_owned(tmp_path)  # no process has locked it
