from __future__ import annotations

import pytest

from denim.nim.files import atomic_folder, atomic_write


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
