from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from denim.nim import PretrainConfig, files
from denim.nim.files import (
    DamagedFileError,
    WriteError,
    append_text,
    atomic_folder,
    atomic_write,
    check_path,
    read_json,
    read_json_lines,
)
from denim.nim.owner import owned


class InterruptedSavingError(Exception):
    pass


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    file = tmp_path / "folder" / "file"
    with atomic_write(file) as staged:
        staged.write_text("old")
        assert not file.exists()
    with pytest.raises(InterruptedSavingError), atomic_write(file) as staged:  # noqa: PT012  # the write comes first
        staged.write_text("half")
        raise InterruptedSavingError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]
    with atomic_write(file) as staged:
        staged.write_text("new")
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_folder_leaves_nothing(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(InterruptedSavingError), atomic_folder(folder) as staged:  # noqa: PT012
        (staged / "file").write_text("half")
        raise InterruptedSavingError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(folder) as staged:
        (staged / "file").write_text("whole")
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "file").read_text() == "whole"
    with pytest.raises(OSError), atomic_folder(folder) as staged:  # noqa: PT011  # errno differs between systems
        (staged / "file").write_text("other")
    assert (folder / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_honour_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "weights") as staged:
            save_file({"x": torch.zeros(1)}, staged)  # replaces the file by one that its owner alone can read
        with atomic_folder(tmp_path / "folder") as staged:
            (staged / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_system_without_permissions_is_written_to(tmp_path, monkeypatch):
    def chmod(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", chmod)
    with atomic_write(tmp_path / "weights") as staged:
        save_file({"x": torch.ones(1)}, staged)
    with atomic_folder(tmp_path / "folder") as staged:
        (staged / "file").touch()
    assert load_file(tmp_path / "weights")["x"] == 1
    assert (tmp_path / "folder" / "file").exists()


def write_with_torch(path):
    with path.open("wb") as handle:
        torch.save({"x": torch.zeros(50_000)}, handle)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(200_000)),
        lambda path: save_file({"x": torch.zeros(50_000)}, path),
        write_with_torch,
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_every_writer_says_what_the_system_refused(tmp_path, write, as_folder):
    """A limit on the length of files plays the full disk: the same path of errors, and another number."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        atomic = atomic_folder if as_folder else atomic_write
        said = f"^cannot write {tmp_path}/new: File too large$"
        with pytest.raises(WriteError, match=said) as raised, atomic(tmp_path / "new") as staged:
            write(staged / "file" if as_folder else staged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder_is_not_named_by_what_is_only_for_a_moment(tmp_path):
    with pytest.raises(WriteError) as raised, atomic_folder(tmp_path / "new") as staged, atomic_write(staged / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(raised.value).startswith(f"cannot write {tmp_path}/new: No space left on device; make room")


def test_a_full_disk_comes_with_advice(tmp_path):
    for number, advice in ((errno.ENOSPC, "make room"), (errno.EROFS, "choose a folder"), (errno.EACCES, "choose a")):
        said = f"cannot write .*file: {os.strerror(number)}; {advice}"
        with pytest.raises(WriteError, match=said), atomic_write(tmp_path / "file"):
            raise OSError(number, os.strerror(number))
        with pytest.raises(WriteError, match=advice), atomic_write(tmp_path / "file") as staged:
            raise OSError(number, os.strerror(number), str(staged))


def test_errors_that_are_not_about_writing_stay_what_they_are(tmp_path):
    for error in (RuntimeError("a mistake"), FileNotFoundError(2, "none", "/elsewhere"), InterruptedSavingError()):
        with pytest.raises(type(error)) as raised, atomic_write(tmp_path / "file"):
            raise error
        assert raised.value is error


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    check_path(tmp_path / "café")
    with pytest.raises(ValueError, match="is not UTF-8, and safetensors and TensorBoard take no other paths"):
        check_path(folder / "run")
    with pytest.raises(ValueError, match="is not UTF-8"), owned(folder):
        pass
    with pytest.raises(ValueError, match="is not UTF-8"):
        PretrainConfig(out=folder)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/new: "),
        atomic_write(tmp_path / "file" / "new"),
    ):
        pass


def test_json_lines_leave_out_a_last_line_without_its_end(tmp_path):
    file = tmp_path / "lines"
    assert read_json_lines(file) == []
    append_text(file, '{"a": 1}\n')
    append_text(file, '{"a": {}}\n{"b": {}')
    assert read_json_lines(file) == [{"a": 1}, {"a": {}}]
    append_text(file, "}")  # complete, but nothing says that this is all of it
    assert read_json_lines(file) == [{"a": 1}, {"a": {}}]


def test_nothing_is_appended_through_a_link(tmp_path):
    (tmp_path / "lines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/lines: "):
        append_text(tmp_path / "lines", "{}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"b": []}', "has no entry 'a'"),
        ('{"a": "1", "b": []}', "has '1' as 'a', expected a value of type int"),
        ('{"a": true, "b": []}', "has 'True' as 'a', expected a value of type int"),
        ('{"a": 1, "b": {}}', "has '{}' as 'b', expected a value of type list"),
    ],
)
def test_json_without_the_entries_that_belong_there_is_named(tmp_path, content, words):
    file, entries = tmp_path / "file.json", {"a": int, "b": list}
    file.write_text('{"a": 1, "b": [], "more": 2}\n')
    assert read_json(file, entries) == read_json_lines(file, entries)[0] == {"a": 1, "b": [], "more": 2}
    file.write_text(content + "\n")
    with pytest.raises(DamagedFileError, match=rf"^{file} {words}$"):
        read_json(file, entries)
    with pytest.raises(DamagedFileError, match=rf"^line 1 of {file} {words}$"):
        read_json_lines(file, entries)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"nan", b"\x00" * 8])
def test_damaged_json_is_named(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"file\.json (is not valid JSON|holds b'\[1\]')"):
        read_json(file)
    file.write_bytes(b'{"a": 1}\n' + content + b'\n{"a": 2}\n')
    with pytest.raises(DamagedFileError, match=r"^line 2 of .*file\.json"):
        read_json_lines(file)


WRITER = """
import os, signal, sys, time
from pathlib import Path
from denim.nim.files import atomic_folder, atomic_write
atomic, target = {"file": atomic_write, "folder": atomic_folder}[sys.argv[1]], Path(sys.argv[2])
with atomic(target) as staged:
    (staged / "part" if staged.is_dir() else staged).write_text("half")
    print(staged, flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def writer(kind, target, end):
    """A process that is writing `target`, and its path before it is final."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, target, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_writes_stays(tmp_path, kind):
    killed, left = writer(kind, tmp_path / "killed", "killed")
    living, written = writer(kind, tmp_path / "living", "living")
    assert killed.wait() == -signal.SIGKILL
    assert left.exists()
    assert written.exists()
    foreign = [  # of another machine, of an earlier version, and of a user
        left.with_name(f".denim-01234567-{'0' * 8}-{killed.pid}.part"),
        left.with_name(".denim-01234567.part"),
        left.with_name(left.name + ".txt"),
    ]
    for file in foreign:
        file.touch()
    with atomic_write(tmp_path / "other") as staged:
        assert {left, written, staged} & set(tmp_path.iterdir()) == {written, staged}
    living.communicate("")
    assert living.returncode == 0
    assert set(tmp_path.iterdir()) == {tmp_path / "other", tmp_path / "living", *foreign}


def test_what_cannot_be_removed_is_no_reason_not_to_write(tmp_path, monkeypatch):
    def refuse(entry):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(entry))

    monkeypatch.setattr(files, "process_has_ended", lambda process: True)
    left = files._new_name(tmp_path)
    left.touch()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove", refuse)
        with atomic_write(tmp_path / "file"):
            pass
    assert set(tmp_path.iterdir()) == {left, tmp_path / "file"}
    with atomic_write(tmp_path / "file"):
        pass
    assert set(tmp_path.iterdir()) == {tmp_path / "file"}
