"""Which images `denim evaluate` and `denim certify` measure on."""

import io

import pytest
from rich.console import Console

from denim.cli.images import open_images
from denim.nim.data import hold_out, open_source


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=400)


def test_the_images_that_a_training_has_held_out(make_folder, tmp_path, console):
    make_folder(tmp_path, each=20)
    found, words = open_images(str(tmp_path), "test", 0.25, 3, 3, None, 0.01, console)
    kept, held = hold_out(open_source(tmp_path, "train", 3), 0.25, 3)
    assert found.ids.tolist() == held.ids.tolist()
    assert 0 < len(found) < 40
    assert not set(found.ids.tolist()) & set(kept.ids.tolist())
    assert words == f"{tmp_path}, held out of the training: 0.25"
    other, _ = open_images(str(tmp_path), "test", 0.25, 4, 3, None, 0.01, console)
    assert other.ids.tolist() != found.ids.tolist()
    assert not console.file.getvalue()


def test_a_folder_without_splits_is_not_taken_for_a_test_set_in_silence(make_folder, tmp_path, console):
    make_folder(tmp_path / "split", each=2, splits=("train", "test"))
    found, words = open_images(str(tmp_path / "split"), "test", None, 0, 3, None, 0.01, console)
    assert (len(found), words) == (4, f"{tmp_path / 'split'}, split test")
    assert not console.file.getvalue()
    whole = tmp_path / "split" / "train"
    found, words = open_images(str(whole), "test", None, 0, 3, None, 0.01, console)
    assert (len(found), words) == (4, str(whole))
    assert "has no splits" in console.file.getvalue()
    assert "--val-split" in console.file.getvalue()


def test_a_share_that_holds_out_nothing_is_refused(console):
    with pytest.raises(ValueError, match="between 0 and 1"):
        open_images("digits", "test", 1.5, 0, 1, None, 0.01, console)
