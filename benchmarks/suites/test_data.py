"""The loaders on made JPEGs: Denim's two, torchvision's, and DALI's own reader, on as many threads or processes.

Checked first, then timed. `extra_info` of each record holds images per second. For your own images, in turns and with
memory: `denim bench data FOLDER`.
"""

import itertools

import numpy as np
import pytest
from PIL import Image

from denim.benchmarks import loaders as bench

IMAGES, WIDTH, HEIGHT, SIZE, BATCH = 64, 500, 375, 224, 16
ROUNDS = 10


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Photos have about as many bytes as these, whose colours change over 10 pixels or so."""
    root = tmp_path_factory.mktemp("images")
    for k in range(IMAGES):
        colours = np.random.default_rng(k).integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(root / f"{k:03d}.jpg", quality=90)
    return bench.open_task(root, size=SIZE, batch_size=BATCH, workers=2)


@pytest.mark.benchmark(group="loaders")
@pytest.mark.parametrize("name", bench.LOADERS)
def test_loader(benchmark, task, name):
    if (why := bench.reason(name, task)) is not None:
        pytest.skip(why)
    if name == "dali":
        assert bench.compare(task, 2 * BATCH).mean < 0.5
    batches = bench.LOADERS[name](task)
    for images in itertools.islice(batches, bench.WARM_UP):
        assert images.shape == (BATCH, SIZE, SIZE, 3)
    benchmark.pedantic(lambda: next(batches), rounds=ROUNDS)
    if benchmark.stats:
        # The mean: a batch that was made ahead takes no time at all.
        benchmark.extra_info["images_per_second"] = BATCH / benchmark.stats.stats.mean
