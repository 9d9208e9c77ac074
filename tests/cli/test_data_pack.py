"""`denim data pack` and `denim data preview` as a user meets them."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from denim import cli
from denim.kernels import Domain, derive_seeds
from denim.nim import add_noise
from denim.nim.data import TorchLoader, TrainView, open_source


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
    """train/ with two classes of six images, test/ with two of two."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{k}.png")
    return tmp_path / "set"


@pytest.mark.slow
def test_pack_writes_every_split(folder, tmp_path, capsys):
    (folder / "train" / "cat" / "page.png").write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="left out"):
        denim("data", "pack", folder, tmp_path / "out", "--shard-size", "0.01MB", "--max-bad", "0.1")
    test, train = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"set/test: 4 images in \d shards, 0\.0 MB, in {tmp_path}/out/test; 0 bad ones left out; .*", test
    )
    assert re.fullmatch(
        rf"set/train: 12 images in \d shards, 0\.0 MB, in {tmp_path}/out/train; 1 bad ones left out; .*", train
    )
    assert len(list((tmp_path / "out" / "train").glob("train-00000[0-9].tar"))) > 1
    for split in ("train", "test"):
        one = open_source(folder, split, max_bad=1)
        assert torch.equal(one.ids, open_source(tmp_path / "out", split).ids)
    denim("data", "index", tmp_path / "out")
    denim("data", "check", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "out/train: 12 images in 2 classes, 0 bad; 0 decoded" in shown  # by open_source above
    assert "0 of 16 images" in shown


def test_pack_without_splits(folder, tmp_path, capsys):
    denim("data", "pack", folder / "test", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.tar")] == ["images-000000.tar"]
    assert len(open_source(tmp_path / "out", "train")) == len(open_source(tmp_path / "out", "test")) == 4
    denim("data", "pack", folder, tmp_path / "part", "--split", "test")
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["test"]


def test_mistakes_in_pack(folder, tmp_path, capsys):
    for size in ("256", "1.5GB", "3kB"):
        denim("data", "pack", tmp_path / "absent", tmp_path / "out", "--shard-size", size, status=2)
        assert "no data set" in capsys.readouterr().err
    for size in ("", "MB", "1TB", "-1", "256mb", "1e6"):
        denim("data", "pack", folder, tmp_path / "out", f"--shard-size={size}", status=2)
        assert f"or of kB, MB or GB like 256MB, got '{size}'" in capsys.readouterr().err
    for inside in (folder / "out", folder):
        denim("data", "pack", folder, inside, status=2)
        assert "name a folder elsewhere" in capsys.readouterr().err
    (folder / "test" / "cat" / "page.png").write_text("<html>404</html>")
    denim("data", "pack", folder, tmp_path / "out", "--split", "test", status=2)
    assert "more than max_bad = 1.00%" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_preview_shows_what_pretraining_sees(folder, tmp_path, capsys):
    out, count, size = tmp_path / "preview.png", 10, 16
    options = f"--sigma 30 --size {size} --count {count} --seed 4 --epoch 2 --out {out}"
    denim("data", "preview", folder, *options.split())
    assert capsys.readouterr().out == f"{out}\n"
    sheet = np.asarray(Image.open(out))

    # As a run does it, whatever its batch size.
    source = open_source(folder, "train")
    loader = TorchLoader(source, TrainView(size), 6, seed=4)
    batches = list(loader.epoch(2))
    images, ids = (torch.cat([getattr(batch, name) for batch in batches])[:count] for name in ("images", "ids"))
    noisy = add_noise(images, torch.full((count,), 30.0), derive_seeds(4, Domain.TRAINING, ids, 2))
    noisy = (noisy.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
    # 16 pixels as squares of 14; positions by hand: 8 around the heading of 22, a title of 22 above each pair.
    for k in range(count):
        left, upper = 8 + k % 8 * 232, 38 + k // 8 * (2 * 224 + 22 + 16) + 22
        for number, expected in enumerate((images[k], noisy[k])):
            top = upper + number * 228
            shown = sheet[top : top + 224, left : left + 224]
            assert np.array_equal(shown[7::14, 7::14], expected.numpy())
            assert np.array_equal(shown[::14, 13::14], expected.numpy())
    assert sheet.shape[1] == 8 + 8 * 232


def test_preview_of_grey_images_and_long_names(tmp_path):
    out = tmp_path / "preview.png"
    denim("data", "preview", "digits", "--count", "1", "--size", "8", "--no-flip", "--crop-scale", "None", "--out", out)
    narrow = Image.open(out)
    source = open_source("digits", "train")
    batch = next(TorchLoader(source, TrainView(8, None, flip=False), 1).epoch(0))
    assert np.array_equal(np.asarray(narrow)[60 + 14 : 60 + 224 : 28, 8 + 14 : 232 : 28, 0], batch.images[0, :, :, 0])
    name = "a name that is much longer than an image is wide, and then some"
    (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "set" / name / "0.png")
    denim("data", "preview", tmp_path / "set", "--count", "1", "--size", "8", "--out", out)
    white = np.asarray(Image.open(out))[38:60, 232:]  # beside the title
    assert white.size
    assert (white == 255).all()


def test_mistakes_in_preview(folder, tmp_path, capsys):
    out = tmp_path / "preview.png"
    for words, message in (
        (("--count", "13"), "set/train has 12 images, and count is 13"),
        (("--count", "0"), "set/train has 12 images, and count is 0"),
        (("--sigma", "nan"), "sigma takes a finite noise level"),
        (("--sigma", "-1"), "sigma takes a finite noise level"),
        (("--size", "0"), "size must be at least 1 pixel"),
        (("--split", "val"), "has no split 'val'"),
        (("--seed", 10**19), "run_seed must be an int64"),
    ):
        denim("data", "preview", folder, "--out", out, *words, status=2)
        assert message in capsys.readouterr().err
    assert not out.exists()
