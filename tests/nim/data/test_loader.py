import errno
import json
import os
import random
import signal
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from denim.nim.data import (
    BadSamplesError,
    Batch,
    EvalView,
    ImageFolder,
    TorchLoader,
    TrainView,
    backends,
    loader_backends,
    open_loader,
    open_source,
    sample_rng,
)
from denim.nim.data.backends import default_workers
from denim.nim.data.decode import MachineError

pytestmark = pytest.mark.slow

INT64 = st.integers(-(2**63), 2**63 - 1)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def by_id(loader, epoch, start_step=0):
    """{id: (label, pixels)} and the order of ids."""
    seen, order = {}, []
    for batch in loader.epoch(epoch, start_step):
        order += batch.ids.tolist()
        for i, label, image in zip(batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True):
            assert i not in seen
            seen[i] = (label, image.numpy().tobytes())
    return seen, order


VIEW = TrainView(16, degrees=10, translate=0.1, zoom=0.1, auto_augment=RAND_AUGMENT)


def test_batches(in_memory):
    source = in_memory(23)
    batches = list(TorchLoader(source, VIEW, 5).epoch(0))
    assert len(batches) == TorchLoader(source, VIEW, 5).steps_per_epoch == 4
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((5, 16, 16, 3), torch.uint8)
        assert (batch.labels.shape, batch.labels.dtype) == ((5,), torch.int64)
        assert (batch.ids.shape, batch.ids.dtype) == ((5,), torch.int64)
        assert batch.images.is_contiguous()
    assert all(batch.real is None for batch in batches)
    loader = TorchLoader(source, VIEW, 5, last="keep")
    assert loader.steps_per_epoch == 5
    seen, _ = by_id(loader, 0)
    assert {i: label for i, (label, _) in seen.items()} == dict(
        zip(source.ids.tolist(), source.labels.tolist(), strict=True)
    )
    moved = batches[0].to("meta")
    assert isinstance(moved, Batch)
    assert {moved.images.device.type, moved.labels.device.type} == {"meta"}
    assert moved.ids is batches[0].ids  # on the host: what is keyed by them there must not wait for a device


def test_digits_batches(digits):
    batch = next(TorchLoader(digits[0], TrainView(16), 7).epoch(0))
    assert batch.images.shape == (7, 16, 16, 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=INT64,
    epoch=st.integers(0, 10_000),
    batch_size=st.integers(1, 23),
    shuffle=st.booleans(),
    share=st.floats(0, 1),
)
def test_view_depends_on_seed_epoch_and_id_alone(in_memory, seed, epoch, batch_size, shuffle, share):
    source = in_memory(23)
    expected = {
        i: (label, VIEW(source.images[k], sample_rng(seed, epoch, i)).tobytes())
        for k, (i, label) in enumerate(zip(source.ids.tolist(), source.labels.tolist(), strict=True))
    }
    loader = TorchLoader(source, VIEW, batch_size, seed=seed, shuffle=shuffle, last="keep")
    start = round(share * loader.steps_per_epoch)
    seen, order = by_id(loader, epoch, start)
    # Nothing before the start is decoded, nothing is decoded twice.
    assert len(source.read_indices) == len(order) == max(0, 23 - start * batch_size)
    assert all(expected[i] == value for i, value in seen.items())
    # The order of a resumed epoch is the rest of the order of a whole one, whatever the batch size.
    _, whole = by_id(TorchLoader(source, EvalView(1), 23, seed=seed, shuffle=shuffle), epoch)
    assert order == whole[start * batch_size :]


@pytest.mark.parametrize("start_step", [0, 3])
def test_workers_change_nothing(start_step, in_memory):
    source = in_memory(23)
    here = list(TorchLoader(source, VIEW, 4, seed=9).epoch(2, start_step))
    there = list(TorchLoader(source, VIEW, 4, seed=9, workers=2).epoch(2, start_step))
    assert len(here) == len(there) == 5 - start_step
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.ids, b.ids)


def test_augmentation_changes_with_epoch_and_seed(in_memory):
    source = in_memory(8)
    views = [by_id(TorchLoader(source, VIEW, 8, seed=seed), epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i in source.ids.tolist():
        assert len({view[i] for view in views}) == 3


def test_order_is_pinned(in_memory):
    """A run resumed with a later release must go on in the order in which it began."""
    source = in_memory(10)
    _, order = by_id(TorchLoader(source, EvalView(1), 10, seed=-7), 3)
    assert [source.ids.tolist().index(i) for i in order] == [8, 7, 0, 1, 2, 3, 6, 4, 9, 5]


def test_unshuffled_order_is_that_of_the_source(in_memory):
    source = in_memory(10)
    for epoch in (0, 1):
        loader = TorchLoader(source, EvalView(8), 4, shuffle=False, last="keep")
        assert by_id(loader, epoch)[1] == source.ids.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_untouched(workers, in_memory):
    torch_state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    list(TorchLoader(in_memory(9), VIEW, 4, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 601}, "has 600 images, less than one batch of 601, and last='drop'"),
        ({"batch_size": 301, "world": 2}, "less than one batch of 602"),
        ({"batch_size": 7, "world": 2, "last": "keep"}, "no multiple of 2 ranks x 7, .* take last='pad'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"last": "repeat"}, "last must be drop, keep or pad, got 'repeat'"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"rank": 2, "world": 2}, "rank must lie in 0..world - 1, got rank 2 of 2"),
        ({"rank": -1}, "got rank -1 of 1"),
        ({"max_bad": 1.5}, r"max_bad is a share .* got 1.5"),
    ],
)
def test_loader_errors(digits, options, message):
    with pytest.raises(ValueError, match=message):
        TorchLoader(digits[1], EvalView(16), **{"batch_size": 4, **options})


def test_starts_and_empty_sources(digits, in_memory):
    with pytest.raises(ValueError, match="in memory has no images"):
        TorchLoader(in_memory(0), EvalView(16), 4, last="keep")
    assert TorchLoader(digits[1], EvalView(16), 601, last="keep").steps_per_epoch == 1
    loader = TorchLoader(digits[1], EvalView(16), 100)
    assert list(loader.epoch(0, 6)) == []
    for start in (-1, 7):
        with pytest.raises(ValueError, match=rf"start_step must be in 0..6, got {start}"):
            loader.epoch(0, start)


# Ranks


def rows(loader, epoch, start_step=0):
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


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(8, 23),
    batch_size=st.integers(1, 2),
    seed=INT64,
    epoch=st.integers(0, 100),
    last=st.sampled_from(("drop", "pad")),
    shuffle=st.booleans(),
    bad=st.sets(st.integers(0, 22), max_size=4),
)
def test_ranks_cut_the_same_batches(in_memory, count, batch_size, seed, epoch, last, shuffle, bad):
    def steps(rank, world):
        source = failing(in_memory(count), bad & set(range(count)))
        options = {"seed": seed, "shuffle": shuffle, "last": last, "max_bad": 1}
        loader = TorchLoader(source, VIEW, 4 * batch_size // world, rank=rank, world=world, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rows(loader, epoch)

    whole = steps(0, 1)
    for world in (2, 4):
        parts = [steps(rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {len(whole)}
        assert [[*chain(*step)] for step in zip(*parts, strict=True)] == whole
    counted = [row[0] for step in whole for row in step if row[3]]
    assert all(len(step) == 4 * batch_size for step in whole)
    if last == "pad":  # every image that can be read, once
        source = in_memory(count)
        assert sorted(counted) == sorted(i for k, i in enumerate(source.ids.tolist()) if k not in bad)


def test_a_batch_larger_than_the_source_is_padded_from_its_start(in_memory):
    source = in_memory(3)
    loader = TorchLoader(source, VIEW, 4, shuffle=False, last="pad", rank=1, world=2)
    (batch,) = loader.epoch(0)
    assert batch.ids.tolist() == source.ids[[1, 2, 0, 1]].tolist()
    assert batch.real.tolist() == [False] * 4
    assert len(batch.counted().ids) == 0
    (batch,) = TorchLoader(source, VIEW, 4, shuffle=False, last="pad", world=2).epoch(0)
    assert batch.real.tolist() == [True, True, True, False]
    counted = batch.counted()
    assert counted.ids.tolist() == source.ids.tolist()
    assert torch.equal(counted.images, batch.images[:3])
    assert batch.to("meta").real.is_meta


def on_a_rank(rank, world, folder, source):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)

    def gathered(value):
        parts = [None] * world
        distributed.all_gather_object(parts, value)
        return parts

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"seed": 5, "last": "pad", "max_bad": 1}
        loader = TorchLoader(source, VIEW, 8 // world, rank=rank, world=world, workers=rank % 2, **options)
        alone = TorchLoader(source, VIEW, 8, **options)
        for epoch in (0, 1):
            steps = gathered(rows(loader, epoch))
            if rank == 0:
                assert [[*chain(*step)] for step in zip(*steps, strict=True)] == rows(alone, epoch)
        # Stopped after two steps of another epoch on all ranks, resumed on one.
        stopped = TorchLoader(source, VIEW, 8 // world, rank=rank, world=world, **options)
        batches = stopped.epoch(2)
        next(batches), next(batches)
        states, rest = gathered(json.dumps(stopped.state())), gathered(rows(loader, 2, 2))
        if rank == 0:
            resumed = TorchLoader(source, VIEW, 8, **options)
            for state in states:
                resumed.load_state(json.loads(state))
            assert rows(resumed, 2, 2) == [[*chain(*step)] for step in zip(*rest, strict=True)]
            folder.joinpath(f"done{world}").touch()
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_of_a_process_group(tmp_path, in_memory, world):
    source = failing(in_memory(37), {3, 11})
    torch.multiprocessing.start_processes(on_a_rank, (world, tmp_path, source), nprocs=world, start_method="fork")
    assert (tmp_path / f"done{world}").exists()


# Bad samples


def failing(source, bad):
    """The source, unable to read these indices."""
    read = source.read

    def broken(index):
        if index in bad:
            raise OSError(f"{source.where(index)} is gone")
        return read(index)

    source.read = broken
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_and_remembered(in_memory, workers):
    source = failing(in_memory(23), {4, 9})
    loader = TorchLoader(source, VIEW, 4, seed=2, workers=workers, max_bad=0.1)
    good = TorchLoader(in_memory(23), VIEW, 4, seed=2)
    lost = source.ids[[4, 9]].tolist()
    for epoch in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = rows(loader, epoch)
        # On a machine with one processor torch warns of two workers.
        named = " ".join(str(warning.message) for warning in caught if "can no longer be read" in str(warning.message))
        # Each is named once; 3 of 23 samples are dropped in an epoch, so it may be in a later one.
        assert epoch > 0 or "can no longer be read; others stand in for them: in memory:" in named
        assert epoch < 2 or not named
        whole = {row[0]: row for step in rows(TorchLoader(in_memory(23), VIEW, 1, seed=2), epoch) for row in step}
        for step, plain in zip(got, rows(good, epoch), strict=True):
            for row, usual in zip(step, plain, strict=True):
                if usual[0] in lost:
                    assert row == whole[row[0]]  # an image as it would be in its own place, with its own label
                    assert row[0] not in lost
                else:
                    assert row == usual
    assert loader.state()["bad"] == {str(i): f"in memory:{k} is gone" for i, k in zip(lost, (4, 9), strict=True)}


def test_replacements_are_pinned(in_memory):
    """A run resumed with a later release must go on with the samples that stood in."""
    loader = TorchLoader(in_memory(10), VIEW, 5, seed=-7)
    assert loader.plan(3, 0)[0].tolist() == [8, 7, 0, 1, 2]
    assert loader.plan(3, 0, {7: "", 1: ""})[0].tolist() == [8, 8, 0, 6, 2]
    # Sample 8 is lost too, in its own place and where it stood in.
    assert loader.plan(3, 0, {7: "", 1: "", 8: ""})[0].tolist() == [4, 0, 0, 6, 2]


@settings(max_examples=25, deadline=None)
@given(
    bad=st.sets(st.integers(0, 22), max_size=12),
    batch_size=st.integers(1, 11),
    seed=INT64,
    stop=st.integers(0, 40),
    last=st.sampled_from(("drop", "keep", "pad")),
)
def test_a_resumed_loader_goes_on_as_an_uninterrupted_one(in_memory, bad, batch_size, seed, stop, last):
    def make():
        return TorchLoader(failing(in_memory(23), bad), VIEW, batch_size, seed=seed, last=last, max_bad=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = make()
        steps = [step for epoch in range(2) for step in rows(whole, epoch)]
        stop = stop % (len(steps) + 1)
        stopped = make()
        epoch, step = divmod(stop, stopped.steps_per_epoch)
        for number in range(epoch):
            rows(stopped, number)
        batches = stopped.epoch(epoch)
        for _ in range(step):
            next(batches)
        resumed = make()
        resumed.load_state(json.loads(json.dumps(stopped.state())))
        assert resumed.bad == stopped.bad
        rest = [batch for number in range(epoch, 2) for batch in rows(resumed, number, step if number == epoch else 0)]
    assert rest == steps[stop:]
    assert resumed.state() == whole.state()


def test_a_sample_that_is_lost_for_a_moment_stays_bad(in_memory, tmp_path):
    """Worker 1 could read, as a replacement, what worker 0 could not a step before."""
    lost = 7

    def make(workers, name):
        source = failing(in_memory(23), {4})
        read = source.read

        def once(index):
            if index == lost:
                try:
                    (tmp_path / name).touch(exist_ok=False)
                except FileExistsError:
                    return read(index)
                raise OSError("a moment")
            return read(index)

        source.read = once
        return TorchLoader(source, VIEW, 4, seed=seed, workers=workers, max_bad=1)

    # A seed by which sample 4 comes in the step after sample 7's, and would be replaced by it.
    for seed in range(10_000):
        plain = TorchLoader(in_memory(23), VIEW, 4, seed=seed)
        steps = [plain.plan(0, step)[0].tolist() for step in range(4)]
        if lost in steps[0] and 4 in steps[1] and lost in plain.plan(0, 1, {4: ""})[0]:
            break
    else:
        raise AssertionError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, crowd = rows(make(0, "alone"), 0), rows(make(2, "crowd"), 0)
    assert alone == crowd
    assert in_memory(23).ids[lost].item() not in {row[0] for step in crowd for row in step}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_the_list(in_memory, workers):
    loader = TorchLoader(failing(in_memory(23), {1, 2, 3}), VIEW, 4, seed=2, last="keep", workers=workers, max_bad=0.09)
    with pytest.warns(UserWarning, match="no longer be read"), pytest.raises(BadSamplesError) as caught:
        rows(loader, 0)
    assert "3 of 23 images of in memory cannot be read, more than max_bad = 0.09 allows" in str(caught.value)
    assert all(f"in memory:{k} is gone" in str(caught.value) for k in (1, 2, 3))
    source = in_memory(23)
    source.skipped = ("a.jpg: broken", "b.jpg: broken")
    with pytest.raises(BadSamplesError, match=r"3 of 25 images .* in memory:5 is gone; a.jpg: broken; b.jpg: broken"):
        rows(TorchLoader(failing(source, {5}), VIEW, 4, last="keep", workers=workers, max_bad=0.1), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_left_to_read_stops_the_run(in_memory, workers):
    loader = TorchLoader(failing(in_memory(9), set(range(9))), VIEW, 4, workers=workers, max_bad=1)
    with pytest.raises(BadSamplesError, match="9 of 9 images of in memory cannot be read"):
        rows(loader, 0)


def test_a_lower_limit_counts_what_was_bad_before(in_memory):
    before = TorchLoader(failing(in_memory(23), {1, 2}), VIEW, 23, max_bad=1)
    with pytest.warns(UserWarning, match="2 images of in memory can no longer"):
        rows(before, 0)
    with pytest.raises(BadSamplesError, match="2 of 23"):
        TorchLoader(in_memory(23), VIEW, 23, max_bad=0.05).load_state(before.state())


def test_files_lost_after_indexing_are_replaced(tmp_path, make_folder):
    source = open_source(make_folder(tmp_path, each=20), "train", cache=tmp_path / "cache")
    broken = tmp_path / "train" / "cat" / "0007.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "train" / "dog" / "0003.png").unlink()
    loader = TorchLoader(source, VIEW, 8, last="pad", workers=1, max_bad=0.05)
    with pytest.warns(UserWarning, match="can no longer be read"):
        counted = [row[0] for step in rows(loader, 0) for row in step if row[3]]
    lost = {i for i, label in zip(source.ids.tolist(), source.labels.tolist(), strict=True)} - set(counted)
    assert len(counted) == 38
    assert {str(i) for i in lost} == set(loader.state()["bad"])
    assert sorted(reason.split(" was readable")[0].split("/")[-1] for reason in loader.bad.values()) == [
        "0003.png",
        "0007.png",
    ]


def test_states_of_other_data_or_backends_are_refused(in_memory):
    state = TorchLoader(in_memory(23), VIEW, 4).state()
    assert json.loads(json.dumps(state)) == state
    with pytest.raises(ValueError, match="it had 23 images and has 22"):
        TorchLoader(in_memory(22), VIEW, 4).load_state(state)
    other = in_memory(23)
    other.ids = other.ids.flip(0)
    with pytest.raises(ValueError, match="or has others"):
        TorchLoader(other, VIEW, 4).load_state(state)
    with pytest.raises(ValueError, match="resume it with --loader dali"):
        TorchLoader(in_memory(23), VIEW, 4).load_state({**state, "backend": "dali"})


def test_a_killed_worker_is_named(in_memory):
    source = in_memory(23)

    def deadly(index):
        os.kill(os.getpid(), signal.SIGKILL)

    source.read = deadly
    with pytest.raises(ChildProcessError, match=r"died before step 0 of epoch 3: .*\(pid"):
        rows(TorchLoader(source, VIEW, 4, workers=2), 3)


def test_an_error_in_a_view_is_not_taken_for_a_dead_worker(in_memory):
    def view(image, rng):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        rows(TorchLoader(in_memory(23), view, 4, workers=1), 0)


# The choice of a backend


@pytest.mark.parametrize(
    ("images", "world", "local", "workers"),
    [
        (999, 1, None, 0),  # would end before a worker has paid for its start
        (5000, 1, None, 5),
        (10**6, 1, None, 12),
        (10**6, 8, "4", 3),
        (10**6, 16, "16", 0),
        (5000, 4, "2", 1),
    ],
)
def test_workers_are_as_many_as_help(in_memory, monkeypatch, images, world, local, workers):
    monkeypatch.setattr(backends, "processors", lambda: 12)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)

    class Encoded(in_memory):
        def encoded(self, index): ...
        def plain_length(self, index): ...
        def dali(self, index): ...
        def __len__(self):
            return images

    assert default_workers(Encoded(4), world) == workers
    assert open_loader(Encoded(4), VIEW, 4, backend="torch", world=world).workers == workers
    assert open_loader(Encoded(4), VIEW, 4, backend="torch", world=world, workers=2).workers == 2
    monkeypatch.setattr(in_memory, "__len__", lambda self: images)
    assert default_workers(in_memory(4), world) == 0
    monkeypatch.setattr(backends, "processors", lambda: 2000)
    assert default_workers(Encoded(4), 1) == min(images // 1000, 16)


def test_open_loader_takes_what_can_serve(in_memory):
    source = in_memory(23)
    reasons = loader_backends(source, VIEW)
    assert list(reasons) == ["dali", "torch"]
    assert reasons["torch"] == []
    assert reasons["dali"]  # images in memory, and RandAugment
    options = {"seed": 3, "last": "pad", "rank": 1, "world": 2, "max_bad": 0.5}
    expected = rows(TorchLoader(source, VIEW, 4, **options), 1)
    for backend in ("auto", "torch"):
        loader = open_loader(source, VIEW, 4, backend=backend, workers=1, **options)
        assert (loader.backend, loader.workers, loader.max_bad) == ("torch", 1, 0.5)
        assert rows(loader, 1) == expected
    with pytest.raises(ValueError, match="the loader 'dali' cannot serve in memory: ") as caught:
        open_loader(source, VIEW, 4, backend="dali")
    assert all(reason in str(caught.value) for reason in reasons["dali"])
    with pytest.raises(ValueError, match="loader must be auto, dali or torch, got 'tensorflow'"):
        open_loader(source, VIEW, 4, backend="tensorflow")


def test_cifar10_jpegs_load(tmp_path, data_folder):
    archive = data_folder / "cifar10_jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}: set DENIM_DATA to the folder that holds it")
    import tarfile

    with tarfile.open(archive) as tar:
        wanted = []
        for member in tar:
            if member.isfile():
                wanted.append(member)
            if len(wanted) == 2000:
                break
        tar.extractall(tmp_path, members=wanted, filter="data")
    split = next(path for path in tmp_path.rglob("*.jpg")).parents[1]
    source = open_source(split, "all")
    assert len(source) == 2000
    assert source.skipped == ()
    batch = next(TorchLoader(source, TrainView(32), 64).epoch(0))
    assert batch.images.shape == (64, 32, 32, 3)


# --- faults of the machine

CROP = TrainView(8)  # which both loaders make


def refusing(monkeypatch, name, number, times=10**9):
    """Opening this file fails with an error of the system."""
    real, left = os.open, [times]

    def opening(file, *args, **options):
        if str(file).endswith(name) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), file)
        return real(file, *args, **options)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr("denim.nim.data.decode.PAUSES", (0, 0))


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_fault_of_the_machine_stops_the_run_and_makes_nothing_bad(
    tmp_path, make_folder, monkeypatch, backend, number
):
    source = ImageFolder(make_folder(tmp_path), "train")
    if backend == "dali" and loader_backends(source, CROP)["dali"]:
        pytest.skip(f"no DALI: {loader_backends(source, CROP)['dali']}")
    loader = open_loader(source, CROP, 2, backend=backend, shuffle=False)
    refusing(monkeypatch, "dog/0000.png", number)
    batches = loader.epoch(0)
    assert len(next(batches).ids) == 2
    with pytest.raises(MachineError, match=rf"dog/0000.png cannot be read: {os.strerror(number)}\. The machine"):
        list(batches)
    assert loader.bad == {}
    monkeypatch.undo()
    assert sorted(i for batch in loader.epoch(0) for i in batch.ids.tolist()) == sorted(source.ids.tolist())


def test_it_reaches_the_run_from_a_worker_too(tmp_path, make_folder, monkeypatch):
    source = ImageFolder(make_folder(tmp_path), "train")
    refusing(monkeypatch, "dog/0000.png", errno.EACCES)  # workers are forks
    with pytest.raises(MachineError, match=r"dog/0000\.png cannot be read: Permission denied"):
        list(TorchLoader(source, CROP, 2, workers=1, shuffle=False).epoch(0))


def test_a_fault_that_passes_is_not_noticed(tmp_path, make_folder, monkeypatch):
    source = ImageFolder(make_folder(tmp_path), "train")
    refusing(monkeypatch, "dog/0000.png", errno.EIO, times=2)
    assert sum(len(batch.ids) for batch in TorchLoader(source, CROP, 2).epoch(0)) == 6


def test_where_the_whole_folder_is_gone_a_disk_is(tmp_path, make_folder):
    source = ImageFolder(make_folder(tmp_path / "disk"), "train")
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="No such file or directory"):
        list(TorchLoader(source, CROP, 2).epoch(0))


# --- the host's side of a GPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_for_a_gpu_lie_in_pinned_memory(in_memory, monkeypatch, device):
    """Without a GPU nothing can be pinned: a driver and the call are played."""
    pinned = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
    loader = open_loader(in_memory(8), CROP, 4, backend="torch", device=device)
    batches = list(loader.epoch(0))
    assert len(batches) == 2
    assert [tensor.shape for tensor in pinned] == [batch.images.shape for batch in batches if device == "cuda"]
