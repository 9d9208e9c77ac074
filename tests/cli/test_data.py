"""`denim data` as a user meets it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denim import cli
from denim.nim.data import open_manifest
from denim.nim.data.indexing import cache_folder


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


@pytest.fixture
def folder(tmp_path):
    """train/ with three images of a class "half" and two of "dark"; test/ with one of each."""
    for split, halves, darks in (("train", 3, 2), ("test", 1, 1)):
        for name, count, level in (("half", halves, 128), ("dark", darks, 0)):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for k in range(count):
                image = Image.new("RGB", (10 + k, 20), (level, level, 2 * level - (level > 0)))
                image.save(tmp_path / "set" / split / name / f"{k}.png")
    return tmp_path / "set"


def test_index_takes_every_split_and_decodes_once(folder, capsys):
    denim("data", "index", folder)
    first = capsys.readouterr().out.splitlines()
    assert [
        re.sub(r"in \d+\.\d s", "", line.split("; manifest")[0].split("; 2 for DALI")[0].split("; 5 for DALI")[0])
        for line in first
    ] == [
        "set/test: 2 images in 2 classes, 0 bad; 2 decoded ",
        "set/train: 5 images in 2 classes, 0 bad; 5 decoded ",
    ]
    for line in first:
        assert Path(line.rpartition(" manifest ")[2]).parent == cache_folder() / "manifests"
    denim("data", "index", folder, "--split", "train")
    assert "5 images in 2 classes, 0 bad; 0 decoded" in capsys.readouterr().out


def test_index_takes_flat_folders(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    denim("data", "index", tmp_path / "flat", "--cache", tmp_path / "cache")
    shown = capsys.readouterr().out
    assert "flat: 1 images in 1 classes, 0 bad; 1 decoded" in shown
    assert f"manifest {tmp_path / 'cache'}" in shown


def test_check_lists_what_is_bad(folder, tmp_path, capsys):
    denim("data", "check", folder)
    assert capsys.readouterr().out == f"0 of 7 images in {folder} cannot be read (0.00%)\n"
    pages = [folder / split / "dark" / "page.jpg" for split in ("test", "train")]
    for page in pages:
        page.write_text("<html>404</html>")
    denim("data", "check", folder, "--out", tmp_path / "bad.txt", status=1)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines == [f"{page}: not an image in a known format" for page in pages]
    assert summary == f"2 of 9 images in {folder} cannot be read (22.22%)"
    assert (tmp_path / "bad.txt").read_text() == "".join(f"{page}\tnot an image in a known format\n" for page in pages)


def test_what_is_passed_over_is_said(folder, capsys):
    for name in ("a.txt", "b.txt", "noending", "c.jfif", "d.AVIF", "e.pgm"):
        (folder / "train" / "dark" / name).write_text("words")
    (folder / "train" / "dark" / "@eaDir" / "0.png").mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "train" / "dark" / "@eaDir" / "thumb.jpg")
    (folder / "train" / "@eaDir").mkdir()
    (folder / "README.md").touch()
    said = (
        "set/train: passed over: 2 named @eaDir (first: dark/@eaDir), 2 ending in .txt (first: dark/a.txt), "
        "1 without an ending (first: dark/noending), 1 ending in .md (first: ../README.md)"
    )
    for words, status in ((["check"], 1), (["index"], 0), (["stats", "--split", "train"], 0)):
        denim("data", words[0], folder, *words[1:], status=status)
        assert said in capsys.readouterr().out.splitlines()
    denim("data", "check", folder, "--split", "train", status=1)
    assert "3 of 8 images" in capsys.readouterr().out  # .jfif, .AVIF and .pgm are images, though not these
    Image.new("L", (4, 4)).save(folder / "train" / "stray.png")
    manifest, _ = open_manifest(folder, "train")
    assert manifest.passed_over["images outside of the class folders"] == (1, "stray.png")


def test_a_folder_that_may_be_a_split_or_a_class(tmp_path, capsys):
    for name in ("bus", "car", "train"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / name / "0.png")
    for words in (["check"], ["index"], ["index", "--split", "train"], ["stats"], ["preview"]):
        denim("data", words[0], tmp_path / "set", *words[1:], status=2)
        said = capsys.readouterr().err
        assert "has 'train' beside 2 folders with images that have no name of a split ('bus', 'car')" in said
        assert "if it is a class, move all class folders into a new folder 'train'" in said
    # What the message says, either way.
    denim("data", "check", tmp_path / "set" / "train")
    assert "0 of 1 images" in capsys.readouterr().out
    (tmp_path / "set").rename(tmp_path / "train")
    (tmp_path / "set").mkdir()
    (tmp_path / "train").rename(tmp_path / "set" / "train")
    denim("data", "check", tmp_path / "set")
    assert "0 of 3 images" in capsys.readouterr().out
    # Folders without images leave no doubt.
    (tmp_path / "set" / "Annotations").mkdir()
    (tmp_path / "set" / "Annotations" / "0.xml").touch()
    denim("data", "check", tmp_path / "set")
    assert "1 without an ending (first: ../Annotations)" in capsys.readouterr().out


def test_check_where_all_are_bad(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").touch()
    denim("data", "check", tmp_path, status=1)
    assert "1 of 1 images" in capsys.readouterr().out


def test_stats(folder, capsys):
    (folder / "train" / "dark" / "page.jpg").write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="left out"):
        denim("data", "stats", folder, "--split", "train")
    words = " ".join(capsys.readouterr().out.split())
    assert "set/train: 5 images in 2 classes, 1 bad" in words
    assert "dark 2 half 3" in words
    # Widths 10, 11, 10, 11, 12; quantiles are interpolated linearly.
    width = " ".join(f"{value:.0f}" for value in np.quantile([10, 11, 10, 11, 12], (0, 0.05, 0.5, 0.95, 1)))
    assert f"width {width} height 20 20 20 20 20" in words
    assert "formats: PNG 5" in words
    # Three images of five at 128 (255 in blue), the others at 0: every image has the same weight.
    level = 128 / 255
    mean, std = (f"({a:.4f}, {a:.4f}, {b:.4f})" for a, b in ((0.6 * level, 0.6), (0.24**0.5 * level, 0.24**0.5)))
    assert f"over 5 images, in [0, 1]: mean={mean.replace('0.6000', '0.6')} std={std}" in words


def test_stats_over_a_part(capsys):
    denim("data", "stats", "digits", "--split", "test", "--num-images", "50")
    words = " ".join(capsys.readouterr().out.split())
    assert "digits/test: 600 images in 10 classes, 0 bad" in words
    assert re.search(r"over 50 images, in \[0, 1\]: mean=\(0\.\d+,\) std=\(0\.\d+,\)", words)
    denim("data", "stats", "digits", "--num-images", "-1", status=2)
    assert "got -1" in capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    denim("data", status=2)
    assert "usage: denim data COMMAND" in capsys.readouterr().out
    denim("data", "--help")
    assert "check" in capsys.readouterr().out
    denim("data", "pick", status=2)
    assert "denim data: unknown command 'pick'" in capsys.readouterr().err
    denim("data", "check", tmp_path / "absent", status=2)
    assert "no data set" in capsys.readouterr().err
    denim("data", "check", tmp_path, "--splt", "x", status=2)
    assert "options of denim data check: --split --out --cache" in capsys.readouterr().err
    denim("data", "index", tmp_path, status=2)
    assert "is empty" in capsys.readouterr().err
