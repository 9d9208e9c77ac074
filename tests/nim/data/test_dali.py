"""DALI on the CPU against the torch loader, whose decoder is Pillow."""

import gc
import io
import itertools
import json
import multiprocessing
import random
import signal
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from denim.nim import PretrainConfig, pretrain
from denim.nim.data import (
    BadSamplesError,
    EvalView,
    Subset,
    TorchLoader,
    TrainView,
    dali_loader,
    loader_backends,
    open_loader,
    open_source,
    sample_rng,
)
from denim.nim.data.dali_loader import (
    OPERATIONS,
    RESIZED_BY_TORCH,
    DaliLoader,
    _Pipeline,
    dali_version,
    problem,
    reasons,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(problem() is not None, reason=str(problem()))]

INT64 = st.integers(-(2**63), 2**63 - 1)
SIDE = 40
VIEW, LARGE = TrainView(SIDE), TrainView(RESIZED_BY_TORCH)  # DALI resizes the one, torch the other
AUGMENTED = TrainView(SIDE, auto_augment="dali-rand-m9-n2")


def smooth(width, height, seed, mode="RGB"):
    """Colours that change slowly: what a resampling makes of them hardly depends on its filter."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


def layered(mode, width, height, seed):
    """With an alpha channel that is not constant."""
    image = smooth(width, height, seed, mode)
    image.putalpha(smooth(width, height, seed + 1, "L"))
    return image


def made_images(width, height):
    """(name, format, image, options of `save`): every kind of image that Denim reads."""
    rgb, grey = smooth(width, height, 0), smooth(width, height, 1, "L")
    palette = rgb.quantize(37)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield from ((f"{subsampling}.jpg", "JPEG", rgb, {"subsampling": subsampling}) for subsampling in (0, 1, 2))
    yield from ((f"exif{number}.jpg", "JPEG", rgb, exif(number)) for number in range(1, 9))
    yield "progressive.jpg", "JPEG", rgb, {"progressive": True}
    yield "grey.jpg", "JPEG", grey, {}
    yield "cmyk.jpg", "JPEG", rgb.convert("CMYK"), {}
    yield "named.png", "JPEG", rgb, {}  # the extension is wrong
    yield "rgb.png", "PNG", rgb, {}
    yield "exif.png", "PNG", rgb, exif(6)
    yield "grey.png", "PNG", grey, {}
    yield "palette.png", "PNG", palette, {}
    yield "transparent.png", "PNG", palette, {"transparency": 3}
    yield "rgba.png", "PNG", layered("RGB", width, height, 2), {}
    yield "la.png", "PNG", layered("L", width, height, 4), {}
    yield "one.png", "PNG", grey.convert("1"), {}
    yield "sixteen.png", "PNG", sixteen, {}
    yield "rgb.bmp", "BMP", rgb, {}
    yield "grey.bmp", "BMP", grey, {}
    yield "palette.bmp", "BMP", palette, {}
    yield "rgb.webp", "WEBP", rgb, {}
    yield "rgba.webp", "WEBP", layered("RGB", width, height, 6), {}
    yield "animated.webp", "WEBP", rgb, {"save_all": True, "append_images": [grey.convert("RGB")]}
    yield "rgb.gif", "GIF", rgb, {}
    yield "animated.gif", "GIF", rgb, {"save_all": True, "append_images": [grey.convert("RGB")]}
    yield "rgb.tif", "TIFF", rgb, {}
    yield "la.tif", "TIFF", layered("L", width, height, 8), {}
    yield "one.tif", "TIFF", grey.convert("1"), {}
    yield "sixteen.tif", "TIFF", sixteen, {}
    yield "rgb.ppm", "PPM", rgb, {}


def write(folder, images):
    folder.mkdir(parents=True)
    for name, kind, image, options in images:
        image.save(folder / name, kind, **options)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """Every kind of image, square and of the view's size in one class, in the other not."""
    root = tmp_path_factory.mktemp("kinds")
    write(root / "square", made_images(SIDE, SIDE))
    write(root / "wide", made_images(73, 51))
    dark = Image.fromarray((np.asarray(smooth(73, 51, 3)) // 3).astype(np.uint8))
    (root / "wide" / "dark.ppm").write_bytes(b"P6 73 51 100\n" + dark.tobytes())  # 100 is white
    return open_source(root, "train", cache=root.parent / "cache"), root


def made(root, count, kind="JPEG"):
    """A source of images of as many sizes."""
    for label in ("a", "b"):
        images = (
            (f"{k:03d}.{kind.lower()}", kind, smooth(41 + k % 7, 37 + k % 11, 1000 + k), {})
            for k in range(count)
            if k % 2 == (label == "b")
        )
        write(root / label, images)
    return open_source(root, "train", cache=root.parent / "cache")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("jpegs") / "data", 37)


def rows(loader, epoch=0, start_step=0):
    """One list for each step, of (id, label, pixels, real) for each row."""
    return [
        list(
            zip(
                batch.ids.tolist(),
                batch.labels.tolist(),
                (image.numpy().tobytes() for image in batch.images),
                [True] * len(batch.ids) if batch.real is None else batch.real.tolist(),
                strict=True,
            )
        )
        for batch in loader.epoch(epoch, start_step)
    ]


def pixels(loader, epoch=0):
    """Place of the image -> its view, int16 (H, W, C)."""
    places = {sample_id: loader.source.where(k) for k, sample_id in enumerate(loader.source.ids.tolist())}
    return {
        places[sample_id]: image.numpy().astype(np.int16)
        for batch in loader.epoch(epoch)
        for sample_id, image in zip(batch.ids.tolist(), batch.images, strict=True)
    }


def differences(source, view, batch_size=8, **options):
    """Place of the image -> |DALI - Pillow|."""
    ours = pixels(DaliLoader(source, view, batch_size, last="keep", workers=2, **options))
    theirs = pixels(TorchLoader(source, view, batch_size, last="keep", **options))
    assert ours.keys() == theirs.keys()
    return {name: np.abs(ours[name] - theirs[name]) for name in ours}


# Pixels


@pytest.mark.parametrize("channels", [3, 1])
def test_every_kind_of_image_is_decoded_to_the_pixels_of_pillow(all_kinds, channels):
    """Where nothing is cut or resized, decoders are all there is."""
    _, root = all_kinds
    source = open_source(root, "train", channels, cache=root.parent / "cache")
    square = [k for k in range(len(source)) if "/square/" in source.where(k)]
    for view in (EvalView(SIDE, SIDE), TrainView(SIDE, crop_scale=None, flip=False)):
        loader = DaliLoader(source, view, len(source), shuffle=False)
        (ours,), (theirs,) = loader.epoch(0), TorchLoader(source, view, len(source), shuffle=False).epoch(0)
        assert ours.images.shape == (len(source), SIDE, SIDE, channels)
        assert ours.images.is_contiguous()
        apart = (ours.images[square].int() - theirs.images[square].int()).abs().flatten(1)
        for k, row in zip(square, apart, strict=True):
            name = Path(source.where(k)).name
            if name == "sixteen.png":  # DALI rounds 16 bits to 8, `decode` takes the high byte
                assert row.max() <= 1
            elif channels == 3:
                assert row.max() == 0, name
            elif name.endswith(("jpg", "named.png")):  # luma as stored, against luma of RGB that was clipped
                assert row.max() <= 4, name
                assert row.float().mean() < 1, name
            else:  # 0.299 R + 0.587 G + 0.114 B, rounded or cut
                assert row.max() <= 1, name


def test_windows_and_sizes_of_every_kind_of_image(all_kinds):
    """Of slowly changing colours 3 levels at most: Pillow rounds between its passes, DALI once. In dithered 1-bit
    images every pixel is an edge, where Pillow clips what DALI carries over; another window gives 70 on average."""
    source, _ = all_kinds
    for view in (VIEW, TrainView(SIDE, crop_scale=(0.1, 0.3)), EvalView(30, 35), LARGE, EvalView(64, 67)):
        for name, apart in differences(source, view, seed=4).items():
            most, mean = (40, 5) if Path(name).stem == "one" else (3, 0.3)
            assert apart.max() <= most, name
            assert apart.mean() < mean, name


@settings(max_examples=200, deadline=None)
@given(
    seed=INT64,
    epoch=st.integers(0, 2**63 - 1),
    ids=st.lists(INT64, min_size=1, max_size=5, unique=True),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    scale=st.sampled_from((None, (0.2, 1.0), (0.9, 1.0))),
    flip=st.booleans(),
)
def test_windows_are_those_of_the_view(jpegs, seed, epoch, ids, size, scale, flip):
    view = TrainView(8, crop_scale=scale, flip=flip)
    loader = DaliLoader(jpegs, view, 4, seed=seed)
    source = Subset(jpegs, len(ids))
    source.ids, source.sizes = torch.tensor(ids), torch.tensor([size] * len(ids))
    loader.source = source
    for sample_id, numbers in zip(ids, loader._geometry(epoch, list(range(len(ids)))), strict=True):
        left, upper, width, height, mirrored = view.window(*size, sample_rng(seed, epoch, sample_id))
        assert numbers == (upper, left, height, width, mirrored)


@pytest.fixture(scope="module")
def photos(data_folder, tmp_path_factory):
    if not (data_folder / "photos.tar").exists():
        pytest.skip(f"no {data_folder / 'photos.tar'}: set DENIM_DATA to the folder that holds it")
    root = tmp_path_factory.mktemp("photos")
    (root / "data" / "all").mkdir(parents=True)
    with tarfile.open(data_folder / "photos.tar") as tar:
        tar.extractall(root / "data" / "all", filter="data")
    return open_source(root / "data", "train", cache=root)


@pytest.mark.parametrize("view", [EvalView(224), TrainView(224), EvalView(32), TrainView(32)], ids=repr)
def test_photos(photos, view):
    """0.03 levels on average were seen, 0.2 where DALI resizes, and 15 at most: beside a sharp edge Pillow clips what
    a pass overshoots. A window that is off by one pixel, or a resize without anti-aliasing, gives more than 2."""
    apart = differences(photos, view, batch_size=30)
    assert len(apart) == len(photos)
    assert np.mean([row.mean() for row in apart.values()]) < (0.05 if view.size >= RESIZED_BY_TORCH else 0.25)
    assert max(row.mean() for row in apart.values()) < 1
    assert max(row.max() for row in apart.values()) <= 25


# The same whatever is around it


@settings(max_examples=20, deadline=None)
@given(
    view=st.sampled_from((VIEW, LARGE, EvalView(30, 35), EvalView(64, 67))),
    batch_size=st.integers(1, 37),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1),
    epoch=st.integers(0, 1),
    share=st.floats(0, 1),
    last=st.sampled_from(("keep", "pad", "drop")),
)
def test_a_sample_is_the_same_in_any_batch(jpegs, view, batch_size, threads, seed, epoch, share, last):
    loader = DaliLoader(jpegs, view, batch_size, seed=seed, workers=threads, last=last)
    start = round(share * loader.steps_per_epoch)
    got = rows(loader, epoch, start)
    reference = TorchLoader(jpegs, EvalView(1), batch_size, seed=seed, last=last)
    assert [[(i, label, real) for i, label, _, real in step] for step in got] == [
        [(i, label, real) for i, label, _, real in step] for step in rows(reference, epoch, start)
    ]
    alone = one_by_one(jpegs, view, seed, epoch)
    assert all((label, image) == alone[i] for step in got for i, label, image, _ in step)


ALONE = {}


def one_by_one(source, view, seed, epoch):
    """Id -> label and view; every sample in a batch of its own, on one thread."""
    if (key := (view, seed, epoch)) not in ALONE:
        steps = rows(DaliLoader(source, view, 1, seed=seed, workers=1), epoch)
        ALONE[key] = {i: (label, image) for ((i, label, image, _),) in steps}
    return ALONE[key]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_cut_the_same_batches(jpegs, world):
    whole = rows(DaliLoader(jpegs, VIEW, 8, last="pad", seed=7), 1)
    parts = [
        rows(DaliLoader(jpegs, VIEW, 8 // world, last="pad", seed=7, rank=r, world=world), 1) for r in range(world)
    ]
    assert [[*itertools.chain(*step)] for step in zip(*parts, strict=True)] == whole


def test_epochs_share_one_pipeline(jpegs):
    loader = DaliLoader(jpegs, VIEW, 8, seed=1)
    first = [rows(loader, epoch) for epoch in (0, 1)]
    (pipeline,) = loader._idle
    assert rows(loader, 0) == first[0]
    assert rows(loader, 1, 2) == first[1][2:]
    assert loader._idle == [pipeline]
    # Two epochs at once have one each, and one that is left early does not come back.
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert [batch.ids.tolist() for batch, _ in pairs] == [[row[0] for row in step] for step in first[0]]
    assert all(torch.equal(a.images, b.images) for (a, _), b in zip(pairs, loader.epoch(0), strict=True))
    batches = loader.epoch(0)
    next(batches)
    del batches
    assert rows(loader, 0) == first[0]


def test_a_batch_stays_when_later_ones_come(jpegs):
    """It is DALI's own memory."""
    loader = DaliLoader(jpegs, VIEW, 4, seed=1)
    kept, copies = [], []
    for batch in itertools.chain(loader.epoch(0), loader.epoch(1)):
        kept.append(batch.images)
        copies.append(batch.images.clone())
    del loader
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    kept[0].zero_()
    assert torch.equal(kept[1], copies[1])


def tasks():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("steps", [0, 1, 9])
@pytest.mark.parametrize("view", [VIEW, LARGE, AUGMENTED])
def test_no_thread_is_left(jpegs, view, steps):
    list(DaliLoader(jpegs, view, 4).epoch(0))  # what DALI starts once and keeps
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        before = tasks(), threading.active_count()
        loader = DaliLoader(jpegs, view, 4)
        batches = loader.epoch(0)
        for _ in itertools.islice(batches, steps):
            pass
        del batches, loader
        deadline = time.monotonic() + 5
        while tasks() > before[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tasks(), threading.active_count()) == before
    finally:
        gc.enable()


def test_global_generators_are_untouched(jpegs, global_rng_untouched):
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(DaliLoader(jpegs, VIEW, 4).epoch(0))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# Bad files


def spoil(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "other size":
        smooth(9, 11, 5).save(path, "JPEG")
    else:
        path.write_bytes({"truncated": content[:400], "empty": b"", "page": b"<html>no such image</html>" * 9}[how])


WAYS = ("removed", "truncated", "empty", "page", "other size")


@pytest.mark.parametrize(("kind", "view"), [("JPEG", LARGE), ("PNG", VIEW), ("GIF", VIEW)])
@pytest.mark.parametrize("how", WAYS)
def test_a_file_that_goes_bad_after_indexing_is_replaced(tmp_path, how, kind, view):
    source = made(tmp_path / "data", 20, kind)
    options = {"seed": 3, "last": "pad", "max_bad": 0.1}
    sound = rows(DaliLoader(source, view, 4, **options))
    alone = {row[0]: row[:3] for step in sound for row in step}
    lost = [sound[2][1][0], sound[4][3][0]]
    for sample_id in lost:
        spoil(Path(source.where(source.ids.tolist().index(sample_id))), how)
    loader = DaliLoader(source, view, 4, **options)
    with pytest.warns(UserWarning, match="can no longer be read; others stand in for them") as caught:
        got = rows(loader)
    named = {str(source.where(source.ids.tolist().index(i))) for i in lost}
    assert all(any(name in str(warning.message) for warning in caught) for name in named)
    assert set(loader.state()["bad"]) == {str(i) for i in lost}
    for step, before in zip(got, sound, strict=True):
        for row, usual in zip(step, before, strict=True):
            if usual[0] in lost:
                assert row[0] not in lost
                assert row[:3] == alone[row[0]]
                assert not row[3]
            else:
                assert row == usual
    # The same stand in for them as with the other loader, and after a resume at any step.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_loader = TorchLoader(source, view, 4, **options)
        if how != "other size":  # of which Pillow takes another window
            assert [[row[0] for row in step] for step in rows(torch_loader)] == [
                [row[0] for row in step] for step in got
            ]
        for start in range(6):
            stopped = DaliLoader(source, view, 4, **options)
            list(itertools.islice(stopped.epoch(0), start))
            state = json.loads(json.dumps(stopped.state()))
            assert len(state["bad"]) == (start > 2) + (start > 4)  # only what was handed out counts
            resumed = DaliLoader(source, view, 4, **options)
            resumed.load_state(state)
            assert rows(resumed, 0, start) == got[start:]


def test_neighbours_of_many_bad_files(tmp_path):
    """Half of the files bad, in one batch too, in every way at once: all the rest comes, and nothing twice."""
    source = made(tmp_path / "data", 24)
    sound = {row[0]: row for step in rows(DaliLoader(source, LARGE, 8, last="pad")) for row in step}
    for k in range(0, 24, 2):
        spoil(Path(source.where(k)), WAYS[k // 2 % len(WAYS)])
    loader = DaliLoader(source, LARGE, 8, last="pad", max_bad=0.5)
    with pytest.warns(UserWarning, match="no longer be read"):
        got = [row for step in rows(loader) for row in step]
    assert sorted(loader.bad) == list(range(0, 24, 2))
    assert sorted(row[0] for row in got if row[3]) == sorted(source.ids[1::2].tolist())
    assert all(row[:3] == sound[row[0]][:3] for row in got)
    # The next epoch knows.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(row[0] for step in rows(loader, 1) for row in step if row[3]) == sorted(source.ids[1::2].tolist())


@pytest.mark.parametrize("how", ["removed", "truncated"])
def test_too_many_bad_files_stop_the_run_with_the_list(tmp_path, how):
    source = made(tmp_path / "data", 20)
    for k in (3, 5, 11):
        spoil(Path(source.where(k)), how)
    loader = DaliLoader(source, VIEW, 4, max_bad=0.1)
    with pytest.warns(UserWarning, match="no longer be read"), pytest.raises(BadSamplesError) as caught:
        list(loader.epoch(0))
    assert "3 of 20 images" in str(caught.value)
    assert all(source.where(k) in str(caught.value) for k in (3, 5, 11))


def test_what_dali_alone_refuses_is_decoded_by_pillow(tmp_path):
    source = made(tmp_path / "data", 12, "PNG")
    refused = source.ids[[2, 7]].tolist()
    pairs = zip(rows(DaliLoader(source, VIEW, 4)), rows(TorchLoader(source, VIEW, 4)), strict=True)
    sound = [[theirs if ours[0] in refused else ours for ours, theirs in zip(*pair, strict=True)] for pair in pairs]
    encoded = source.encoded
    source.encoded = lambda index: b"\x89PNG nonsense" if index in (2, 7) else encoded(index)
    loader = DaliLoader(source, VIEW, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(loader) == sound
        assert loader.state()["bad"] == {}
        loader._decodes = None  # they are known by now, and so are the others
        assert rows(loader) == sound


def test_what_the_index_says_is_believed(tmp_path, monkeypatch):
    """No file is tried that was tried when it was indexed, and what DALI refused there Pillow decodes."""
    source = made(tmp_path / "data", 12)
    sound, pillow = rows(DaliLoader(source, VIEW, 4)), rows(TorchLoader(source, VIEW, 4))
    refused = int(source.ids[7])
    words = {k: f"-{dali_version()}" if k == 7 else dali_version() for k in range(12)}
    source.dali = words.get
    monkeypatch.setattr(dali_loader, "DaliTrial", lambda: pytest.fail("tried"))
    got = rows(DaliLoader(source, VIEW, 4))
    for step, ours, theirs in zip(got, sound, pillow, strict=True):
        assert step == [b if a[0] == refused else a for a, b in zip(ours, theirs, strict=True)]
    source.dali = lambda index: "0.1"  # another version
    monkeypatch.undo()
    assert rows(DaliLoader(source, VIEW, 4)) == sound


@pytest.mark.parametrize("view", [VIEW, LARGE, EvalView(30, 35)])
@pytest.mark.parametrize("budget", [1, 3000, 5000])
def test_batches_that_are_made_in_parts_are_the_same(jpegs, monkeypatch, view, budget):
    """Images have 1,500 to 2,300 pixels: parts of one, of one or two, and of two or three."""
    whole = rows(DaliLoader(jpegs, view, 8, last="keep"))
    monkeypatch.setattr(dali_loader, "BUDGET", budget)
    handed = []
    inputs = DaliLoader._inputs
    monkeypatch.setattr(DaliLoader, "_inputs", lambda self, part: handed.append(part) or inputs(self, part))
    assert rows(DaliLoader(jpegs, view, 8, last="keep")) == whole
    assert all(len(part) == 1 or sum(sample.pixels for sample in part) <= budget for part in handed)
    assert len(handed) == {1: 37}.get(budget, len(handed))
    assert len(handed) > len(whole)


@pytest.mark.parametrize(("ranks", "workers"), [(None, 6), ("1", 6), ("2", 3), ("4", 1), ("8", 1)])
def test_threads_are_those_of_this_process(jpegs, monkeypatch, ranks, workers):
    monkeypatch.setattr(dali_loader, "processors", lambda: 6)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert DaliLoader(jpegs, VIEW, 4).workers == workers
    assert DaliLoader(jpegs, VIEW, 4, workers=5).workers == 5


def test_a_file_that_goes_bad_between_epochs_is_replaced(tmp_path):
    source = made(tmp_path / "data", 12)
    loader = DaliLoader(source, VIEW, 4, last="pad", max_bad=0.5)
    sound = {row[0]: row for step in rows(loader) for row in step}
    lost = {int(source.ids[k]) for k in range(len(WAYS))}
    for k, how in enumerate(WAYS):
        spoil(Path(source.where(k)), how)
    with pytest.warns(UserWarning, match="no longer be read"):
        got = [row for step in rows(loader) for row in step]
    assert {row[0] for row in got if row[3]} == sound.keys() - lost
    assert all(row[:3] == sound[row[0]][:3] for row in got)


def test_a_file_that_is_lost_for_a_moment_stays_bad(tmp_path):
    source = made(tmp_path / "data", 12)
    first = rows(DaliLoader(source, VIEW, 4))[0]
    gone, broken = (source.ids.tolist().index(row[0]) for row in first[:2])
    spoil(Path(source.where(broken)), "truncated")
    encoded, asked = source.encoded, []

    def once(index):
        if index == gone and not asked:
            asked.append(index)
            raise OSError("a moment")
        return encoded(index)

    source.encoded = once
    loader = DaliLoader(source, VIEW, 4, max_bad=0.5)
    with pytest.warns(UserWarning, match="a moment"):
        seen = {row[0] for epoch in (0, 1) for step in rows(loader, epoch) for row in step}
    assert seen == set(source.ids.tolist()) - {first[0][0], first[1][0]}
    assert set(loader.bad) == {gone, broken}


def damaged(image, kind, rng):
    """Encoded, and then with some bytes cut, changed, added or lost: decoders agree on hardly any of these."""
    file = io.BytesIO()
    image.save(file, kind)
    content = bytearray(file.getvalue())
    at, few = rng.randrange(len(content)), rng.randint(1, 9)
    how = rng.randrange(4)
    if how == 0:
        del content[at:]
    elif how == 1:
        content[at : at + few] = rng.randbytes(few)
    elif how == 2:
        content[at:at] = rng.randbytes(few)
    else:
        del content[at : at + few]
    return bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_damage_of_any_kind_does_no_harm(tmp_path, kind):
    """Which images are bad, and which are not, is Pillow's word; and the process lives."""
    rng = random.Random(0)
    source = made(tmp_path / "data", 96, kind)
    bad = set()
    for k in range(0, 96, 2):
        file = Path(source.where(k))
        file.write_bytes(damaged(Image.open(file), kind, rng))
        try:
            if source.read(k).size != tuple(source.sizes[k].tolist()):
                bad.add(k)
        except OSError:
            bad.add(k)
    loader = DaliLoader(source, VIEW, 32, last="pad", max_bad=0.6)
    with pytest.warns(UserWarning, match="no longer be read"):
        epochs = [[row[0] for step in rows(loader, epoch) for row in step if row[3]] for epoch in range(3)]
    assert all(len(counted) == len(set(counted)) == 96 - len(loader.bad) for counted in epochs)
    few = bad - set(loader.bad)  # DALI takes some files of which Pillow says that they are cut short
    assert set(loader.bad) <= bad
    assert len(few) <= 5, few


def test_a_failure_without_a_bad_image_is_raised(jpegs, monkeypatch):
    loader = DaliLoader(jpegs, VIEW, 4)
    build = loader._pipeline

    def failing(batch_size, depth):
        pipeline = build(batch_size, depth)
        if batch_size > 1:
            outputs = pipeline._pipe.outputs

            def broken(**options):
                outputs(**options)
                raise RuntimeError("out of memory")

            pipeline._pipe.outputs = broken
        return pipeline

    monkeypatch.setattr(loader, "_pipeline", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(loader.epoch(0))


# DALI's RandAugment

UNSIGNED = ("posterize", "solarize", "equalize", "auto_contrast", "identity")


def applied(image, policy, operations):
    """The views of one image under these rows of (operations, signs): int16 (rows, H, W, C)."""
    count = len(operations)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    numbers = [[[0, 0]] * count, [[image.height, image.width]] * count, [0] * count, *zip(*operations, strict=True)]
    inputs = [np.frombuffer(encoded.getvalue(), np.uint8)] * count, *(np.array(n, np.int32) for n in numbers)
    pipeline = _Pipeline(TrainView(image.width, auto_augment=policy), 3, torch.device("cpu"), 2, count, 1)
    (images,) = pipeline.run(iter([inputs]))
    assert images.dtype == torch.uint8
    return images.numpy().astype(np.int16)


def warped(pixels, inverse, offset):
    """Bilinear resampling at inverse @ (x, y) + offset, x and y from the corner; where it has four neighbours, and
    where it has none."""
    side = len(pixels)
    y, x = np.mgrid[:side, :side] + 0.5
    u, v = (np.einsum("ij,jyx->iyx", np.array(inverse), np.stack((x, y))).T + offset).T - 0.5
    inside = (np.minimum(u, v) >= 0) & (np.maximum(u, v) < side - 1)
    outside = (np.minimum(u, v) < -1) | (np.maximum(u, v) > side)
    left, upper = (np.clip(np.floor(w).astype(int), 0, side - 2) for w in (u, v))
    right, lower = (u - left)[..., None], (v - upper)[..., None]
    above = pixels[upper, left] * (1 - right) + pixels[upper, left + 1] * right
    below = pixels[upper + 1, left] * (1 - right) + pixels[upper + 1, left + 1] * right
    return above * (1 - lower) + below * lower, inside, outside


def expected_of(name, sign, pixels, share):
    """By the formulas of DALI's documentation, in float64 at `share` of the full magnitude: pixels, where they must be
    found, and where the fill must be."""
    side, x, everywhere, nowhere = len(pixels), pixels.astype(np.float64), np.s_[:, :], np.s_[:0, :0]
    shift, shear, angle = (sign * share * most for most in (100 / 224 * side, 0.3, np.pi / 6))
    factor = 1 + sign * 0.9 * share
    same = [[1, 0], [0, 1]]
    match name:
        case "translate_x" | "translate_y":
            return warped(x, same, (-shift, 0) if name[-1] == "x" else (0, -shift))
        case "shear_x" | "shear_y":
            return warped(x, [[1, -shear], [0, 1]] if name[-1] == "x" else [[1, 0], [-shear, 1]], (0, 0))
        case "rotate":
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            centre = np.full(2, side / 2)
            return warped(x, turn, centre - turn @ centre)
        case "brightness":
            y = x * factor
        case "contrast":
            centre = x.mean((0, 1)) @ (0.299, 0.587, 0.114)
            y = centre + (x - centre) * factor
        case "color":
            grey = (x @ (0.299, 0.587, 0.114))[..., None]
            y = grey + (x - grey) * factor
        case "sharpness":
            edged = np.pad(x, ((1, 1), (1, 1), (0, 0)), "reflect")
            around = sum(edged[i : i + side, j : j + side] for i in range(3) for j in range(3))
            y = x + (factor - 1) * (x - (around + 4 * x) / 13)
        case "posterize":
            y = pixels >> round(4 * share) << round(4 * share)
        case "solarize":
            y = np.where(x < 256 * (1 - share), x, 255 - x)
        case "equalize":
            counts = [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]
            sums, first = [np.cumsum(n) for n in counts], [n[n > 0][0] for n in counts]
            tables = [(s - n) / (side * side - n) * 255 for s, n in zip(sums, first, strict=True)]
            y = np.stack([table[pixels[..., c]] for c, table in enumerate(tables)], -1)
        case "auto_contrast":
            low, high = x.min((0, 1)), x.max((0, 1))
            y = (x - low) * 255 / (high - low)
        case "identity":
            y = x
    return np.clip(y, 0, 255), everywhere, nowhere


@pytest.mark.parametrize("magnitude", [9, 27])
def test_every_operation_of_dalis_policy(magnitude):
    """Half a level of rounding at the end, and as much for the coefficients of DALI's colour matrix; 1e-3 for what is
    computed in float32. At magnitude 27 of colour 0.99 was seen."""
    image = smooth(SIDE, SIDE, 3)
    pixels = np.asarray(image)
    cases = list(itertools.product(range(len(OPERATIONS)), (0, 1)))
    got = applied(image, f"dali-rand-m{magnitude}-n1", [([k], [negative]) for k, negative in cases])
    for (k, negative), view in zip(cases, got, strict=True):
        name = OPERATIONS[k]
        expected, seen, filled = expected_of(name, -1 if negative else 1, pixels, magnitude / 30)
        apart = np.abs(view - expected)
        tolerance = {"identity": 0, "posterize": 0, "solarize": 0, "color": 1}.get(name, 0.501)
        assert apart[seen].size > SIDE, name
        assert apart[seen].max() <= tolerance, (name, negative)
        if (name, magnitude) in itertools.product(("translate_x", "translate_y", "rotate"), (27,)):
            assert view[filled].size > 0, name
        assert (view[filled] == 128).all(), name
        assert np.array_equal(view, pixels) == (name == "identity"), name
        assert np.array_equal(view, got[2 * k]) == (not negative or name in UNSIGNED), name


def test_operations_come_one_after_the_other():
    image = smooth(SIDE, SIDE, 3)
    first, second = OPERATIONS.index("posterize"), OPERATIONS.index("translate_x")
    both, turned = applied(image, "dali-rand-m30-n2", [([first, second], [0, 1]), ([second, first], [1, 0])])
    once = applied(image, "dali-rand-m30-n1", [([first], [0])])[0].astype(np.uint8)
    assert np.array_equal(both, applied(Image.fromarray(once), "dali-rand-m30-n1", [([second], [1])])[0])
    assert not np.array_equal(both, turned)


def test_operations_are_drawn_after_window_and_flip(jpegs):
    indices, seen = list(range(len(jpegs))), set()
    for epoch in range(3):
        for index, numbers in zip(
            indices, DaliLoader(jpegs, AUGMENTED, 4, seed=5)._geometry(epoch, indices), strict=True
        ):
            rng = sample_rng(5, epoch, int(jpegs.ids[index]))
            left, upper, width, height, flip = AUGMENTED.window(*jpegs.sizes[index].tolist(), rng)
            operations, signs = rng.integers(14, size=2).tolist(), rng.integers(2, size=2).tolist()
            assert numbers == (upper, left, height, width, flip, *operations, *signs)
            seen |= set(zip(operations, signs, strict=True))
    assert seen == set(itertools.product(range(14), range(2)))


def test_an_augmented_sample_is_the_same_in_any_batch(jpegs):
    alone = one_by_one(jpegs, AUGMENTED, 0, 1)
    assert {i for i, (_, image) in alone.items() if image == one_by_one(jpegs, VIEW, 0, 1)[i][1]} != set(alone)
    whole = DaliLoader(jpegs, AUGMENTED, 8, last="pad", workers=2)
    expected = rows(whole, 1)
    assert sum(real for step in expected for *_, real in step) == len(jpegs)
    assert all((label, image) == alone[i] for step in expected for i, label, image, _ in step)
    parts = [rows(DaliLoader(jpegs, AUGMENTED, 4, last="pad", workers=1, rank=r, world=2), 1) for r in range(2)]
    assert [[*itertools.chain(*step)] for step in zip(*parts, strict=True)] == expected
    assert all(rows(whole, 1, start) == expected[start:] for start in range(1, 6))
    assert rows(whole, 0) != expected
    resumed = DaliLoader(jpegs, AUGMENTED, 8, last="pad", workers=3)
    resumed.load_state(json.loads(json.dumps(whole.state())))
    assert rows(resumed, 1, 3) == expected[3:]


def test_a_bad_file_among_augmented_ones(tmp_path):
    source = made(tmp_path / "data", 12)
    sound = {row[0]: row for step in rows(DaliLoader(source, AUGMENTED, 4)) for row in step}
    spoil(Path(source.where(5)), "truncated")
    loader = DaliLoader(source, AUGMENTED, 4, max_bad=0.1, last="pad")
    with pytest.warns(UserWarning, match="no longer be read"):
        got = [row for step in rows(loader) for row in step]
    assert list(loader.bad) == [5]
    assert all(row[:3] == sound[row[0]][:3] for row in got)


def test_dalis_policy_is_built_without_a_warning(jpegs, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(DaliLoader(jpegs, TrainView(9, auto_augment="dali-rand-m0-n1"), 8).epoch(0))) == 4
    assert not caplog.records


@pytest.mark.parametrize(
    "policy",
    ["dali", "dali-rand", "dali-rand-m9", "dali-rand-n2-m9", "dali-rand-m31-n2", "dali-rand-m9-n0", "dali-rand-m9-n11",
     "dali-rand-m-1-n2", "dali-rand-m9-n2-mstd0.5", "dali-rand-m9.5-n2", "dali-rand-m9-n2\n", "dali-auto"],
)  # fmt: skip
def test_bad_policies(policy):
    with pytest.raises(ValueError, match=r"in 0\.\.30 and 1\.\.10 operations, such as 'dali-rand-m9-n2', got 'dali"):
        TrainView(8, auto_augment=policy)


def test_whose_policy_it_is(jpegs, in_memory, tmp_path):
    assert loader_backends(jpegs, AUGMENTED)["dali"] == []
    assert open_loader(jpegs, AUGMENTED, 4).backend == "dali"
    assert open_loader(jpegs, TrainView(8, auto_augment="rand-m9"), 4).backend == "torch"
    with pytest.raises(ValueError, match=r"the loader 'torch' cannot serve .*'dali-rand-m9-n2' is DALI's policy"):
        open_loader(jpegs, AUGMENTED, 4, backend="torch")
    with pytest.raises(ValueError, match=r"timm's RandAugment .* asked for by auto_augment='dali-rand-m9-n2'"):
        open_loader(jpegs, TrainView(8, auto_augment="rand-m9"), 4, backend="dali")
    with pytest.raises(ValueError, match=r"no loader can make this view .* dali: in memory has pixels .* torch: auto"):
        open_loader(in_memory(9), AUGMENTED, 4)
    with pytest.raises(ValueError, match="is DALI's policy: take the loader 'dali'"):
        AUGMENTED(smooth(9, 9, 0), sample_rng(0, 0, 0))
    write(tmp_path / "data" / "a", [("grey.png", "PNG", smooth(9, 9, 0, "L"), {})])
    (reason,) = reasons(open_source(tmp_path / "data", "train", 1, cache=tmp_path), AUGMENTED, torch.device("cpu"))
    assert reason == "DALI's RandAugment takes images of 3 channels, not 1"


# What it can serve


def test_reasons(in_memory, jpegs):
    cpu = torch.device("cpu")
    assert reasons(jpegs, VIEW, cpu) == []
    assert reasons(Subset(jpegs, 5), EvalView(8), cpu) == []
    assert reasons(in_memory(9), VIEW, cpu) == ["in memory has pixels and no encoded images"]
    for view, word in (
        (TrainView(8, degrees=1), "rotation"),
        (TrainView(8, translate=0.1), "shift"),
        (TrainView(8, zoom=0.1), "zoom"),
        (TrainView(8, auto_augment="rand-m9"), "RandAugment"),
        (lambda image, rng: image, "not <lambda>"),
    ):
        (reason,) = reasons(jpegs, view, cpu)
        assert word in reason
    assert "not on mps" in reasons(jpegs, VIEW, torch.device("mps"))[0]
    with pytest.raises(ValueError, match="DALI cannot serve in memory: in memory has pixels"):
        DaliLoader(in_memory(9), VIEW, 4)
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        DaliLoader(jpegs, VIEW, 4, workers=-1)


def test_without_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "DALI is not installed: pip install nvidia-dali" in problem.__wrapped__()


def test_auto_takes_it_for_files(jpegs):
    assert loader_backends(jpegs, VIEW) == {"dali": [], "torch": []}
    options = {"seed": 3, "last": "pad", "rank": 1, "world": 2, "max_bad": 0.5}
    expected = rows(DaliLoader(jpegs, VIEW, 4, **options), 1)
    for backend in ("auto", "dali"):
        loader = open_loader(jpegs, VIEW, 4, backend=backend, workers=2, **options)
        assert (loader.backend, loader.workers, loader.max_bad) == ("dali", 2, 0.5)
        assert rows(loader, 1) == expected
    with pytest.raises(ValueError, match="resume it with --loader dali"):
        TorchLoader(jpegs, VIEW, 4).load_state(loader.state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("view", [VIEW, EvalView(30, 35)])
def test_gpu(all_kinds, view):
    """nvJPEG and the CPU's decoder differ by some levels; windows and flips must not."""
    source, _ = all_kinds
    device = torch.device("cuda", torch.cuda.current_device())
    for ours, theirs in zip(
        DaliLoader(source, view, 8, device=device).epoch(0), DaliLoader(source, view, 8).epoch(0), strict=True
    ):
        assert {x.device for x in (ours.images, ours.labels, ours.ids)} == {device}
        assert torch.equal(ours.ids.cpu(), theirs.ids)
        assert (ours.images.cpu().int() - theirs.images.int()).abs().float().flatten(1).mean(1).max() < 2


# A run that is killed


def start_pretraining(out, data, epochs):
    config = PretrainConfig(
        out=out, data=str(data), loader="dali", workers=2, device="cpu", preset="micro", channels=3, batch_size=8,
        epochs=epochs, warmup_epochs=1, log_every=1, checkpoint_every=3, resume=(out / "run.json").exists(),
    )  # fmt: skip
    # From a process that has imported it all and has no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["denim.nim"])
    process = context.Process(target=pretrain, args=(config,))
    process.start()
    return process


def losses(out):
    """Update -> loss, as the metrics have them."""
    file = out / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["update"]: line["loss"] for line in lines if "loss" in line}


def killed_run(folder, kills, epochs, seed=0):
    """Losses of a run that is never killed and of one that is; where, and how, its processes ended."""
    made(folder / "data", 64)
    whole = start_pretraining(folder / "whole", folder / "data", epochs)
    whole.join()
    assert whole.exitcode == 0
    expected = losses(folder / "whole")
    rng, out, ends = random.Random(seed), folder / "killed", []
    for number in range(kills):
        process = start_pretraining(out, folder / "data", epochs)
        target = max(expected) * (number + rng.random()) / kills
        while process.is_alive() and max(losses(out), default=0) < target:
            time.sleep(0.01)
        time.sleep(0.05 * rng.random())  # an update takes some 0.01 s
        process.kill()
        process.join()
        ends.append((max(losses(out), default=0), process.exitcode))
    last = start_pretraining(out, folder / "data", epochs)
    last.join()
    assert last.exitcode == 0
    return expected, losses(out), ends


def test_killed_and_resumed_pretraining_has_the_same_losses(tmp_path):
    expected, got, ends = killed_run(tmp_path, 3, 5)
    assert got == expected
    assert sorted(expected) == list(range(1, 41))
    assert {code for _, code in ends} == {-signal.SIGKILL}
