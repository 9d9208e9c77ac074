import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from denim.benchmarks import loaders as bench
from denim.cli import main

pytestmark = pytest.mark.slow

SIZE, BATCH = 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    return make_folder(tmp_path_factory.mktemp("images"), each=5)


@pytest.fixture(scope="module")
def task(folder, tmp_path_factory):
    return bench.open_task(folder, size=SIZE, batch_size=BATCH, workers=1, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", bench.LOADERS)
def test_every_loader_goes_on_after_the_last_image(task, name):
    if (why := bench.reason(name, task)) is not None:
        pytest.skip(why)
    for images in itertools.islice(bench.LOADERS[name](task), 4):  # of 10 images
        assert (images.shape, images.dtype) == ((BATCH, SIZE, SIZE, 3), torch.uint8)


def test_comparison(task):
    if (why := bench.reason("dali", task)) is not None:
        pytest.skip(why)
    found = bench.compare(task, 8)
    assert found.images == 8
    # Noise is nothing but edges, which Pillow clips between its passes.
    assert 0 < found.mean < 5 < found.most < 60


def test_run(task):
    said = []
    (record,), absent = bench.run(task, ("pillow",), seconds=0.01, rounds=2, report=said.append)
    assert (record.name, absent) == ("pillow", {})
    assert record.images_per_second > 0
    assert said == ["pillow: turn 1 of 2", "pillow: turn 2 of 2", "pillow: memory"]
    if Path("/proc/self/smaps_rollup").exists():
        assert 0 < record.peak_bytes < 100e6


# In a process of its own: in this one, memory that earlier tests have freed may be taken again.
MEMORY = """
import os
from denim.benchmarks import loaders as bench

before = bench._memory()
block = bytearray(os.urandom(1)) * 50_000_000
assert 50e6 <= bench._memory() - before < 60e6
del block
wake, sleep = os.pipe()
ready, say = os.pipe()
child = os.fork()
if child == 0:
    mine = bytearray(b"x") * 50_000_000
    os.write(say, mine[:1])
    os.read(wake, 1)
    os._exit(0)
os.read(ready, 1)
assert bench._memory() - before > 50e6
os.write(sleep, b"x")
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured on Linux")
def test_memory_counts_what_was_written_and_children():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shards_are_for_ours_alone(task):
    from dataclasses import replace

    _, absent = bench.run(replace(task, files=None), ("torchvision", "dali-reader"), seconds=0.01, rounds=1)
    assert absent.keys() == {"torchvision", "dali-reader"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("dali", "ffcv")}, "loaders are dali, torch, .*; got ffcv"),
        ({"seconds": 0}, "must be positive"),
        ({"rounds": 0}, "must be positive"),
    ],
)
def test_errors(task, options, message):
    with pytest.raises(ValueError, match=message):
        bench.run(task, **options)


def test_a_task_checks_its_numbers(folder, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        bench.open_task(folder, batch_size=0, cache=tmp_path)


def test_command(folder, tmp_path, capsys):
    options = ["--size", "16", "--batch-size", "4", "--workers", "1", "--seconds", "0.01", "--rounds", "1"]
    main(
        [
            "bench",
            "data",
            str(folder),
            *options,
            "--no-memory",
            "--loaders",
            "torch",
            "pillow",
            "--cache",
            str(tmp_path),
        ]
    )
    said = capsys.readouterr().out
    assert "train: 10 images, 16x16" in said
    assert "no loader: one process decodes" in said
