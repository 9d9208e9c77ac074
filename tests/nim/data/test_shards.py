"""WebDataset shards: what `pack` writes, what is made of shards by others, and what happens to damaged ones."""

import concurrent.futures
import errno
import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from denim.nim.data import EncodedSource, ImageFolder, TorchLoader, TrainView, open_manifest, open_source, shards
from denim.nim.data.listing import sample_id
from denim.nim.data.shards import ShardManifest, pack
from denim.nim.files import DamagedFileError, WriteError, atomic_write


def source(root, split="train", **options):
    return open_source(root, split, **{"max_bad": 1, **options})


def packed(folder, out, shard_bytes=4000, split="train", **options):
    manifest, _ = open_manifest(folder, split, **options)
    return pack(manifest, out, split, shard_bytes)


def png(noise_image, seed=0, height=9):
    buffer = io.BytesIO()
    noise_image(height, 11, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """Members as (name, bytes), or as finished TarInfo."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def assert_same_batches(one, other, view=None):
    """Bitwise, two epochs, with crops and flips."""
    view = view or TrainView(8)
    loaders = [TorchLoader(x, view, 4, seed=3, last="pad", max_bad=1) for x in (one, other)]
    for epoch in range(2):
        for a, b in itertools.zip_longest(*(loader.epoch(epoch) for loader in loaders)):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.labels, b.labels)


@pytest.fixture
def folder(tmp_path, make_folder, noise_image):
    """Seven images in two classes; two that a key would confuse, one with another extension than its content."""
    make_folder(tmp_path / "set")
    cat = tmp_path / "set" / "train" / "cat"
    noise_image(20, 21).save(cat / "0000.1.png")
    noise_image(20, 22).save(cat / "lies.png", "JPEG")
    return tmp_path / "set"


# --- own shards


def test_batches_from_folder_and_shards_are_the_same(folder, tmp_path):
    done = packed(folder, tmp_path / "out" / "train")
    files = sorted((tmp_path / "out" / "train").glob("*.tar"))
    assert [file.name for file in files] == [f"train-{k:06d}.tar" for k in range(done.shards)]
    assert done.shards > 1
    assert done[1:] == (8, sum(file.stat().st_size for file in files), ())
    one, other = source(folder), source(tmp_path / "out")
    assert isinstance(other, EncodedSource)
    assert (other.classes, other.skipped) == (one.classes, ())
    for name in ("ids", "labels", "sizes"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert [one.encoded(k) for k in range(8)] == [other.encoded(k) for k in range(8)]
    assert [one.image_format(k) for k in range(8)] == [other.image_format(k) for k in range(8)]
    assert_same_batches(one, other)
    # A run that began on one goes on with the other.
    TorchLoader(other, TrainView(8), 4).load_state(TorchLoader(one, TrainView(8), 4).state())


def test_members_are_what_webdataset_expects(folder, tmp_path):
    packed(folder, tmp_path / "out")
    classes, seen, names = ("cat", "dog"), {}, []
    for file in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            for facts, image in zip(members[::2], members[1::2], strict=True):
                said = json.load(tar.extractfile(facts))
                path = said["path"]
                key, extension = image.name.split(".")
                assert facts.name == f"{key}.json"
                assert extension == ("jpg" if "lies" in path else "png")
                assert classes[said["label"]] == said["class"] == path.split("/")[0]
                assert said["denim"]["id"] == sample_id(path)
                seen[path] = tar.extractfile(image).read()
                names.append(key)
                for member in (facts, image):
                    assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
    assert names == sorted(names)  # by id, not class by class
    train = folder / "train"
    assert seen == {f.relative_to(train).as_posix(): f.read_bytes() for f in train.rglob("*.png")}


def test_same_bytes_again_and_shards_of_shards(folder, tmp_path):
    packed(folder, tmp_path / "a")
    for file in folder.rglob("*.png"):
        os.utime(file, ns=(1, 1))
    packed(folder, tmp_path / "b")
    a, b = (sorted((tmp_path / name).glob("*.tar")) for name in "ab")
    assert [file.read_bytes() for file in a] == [file.read_bytes() for file in b]
    packed(tmp_path / "b", tmp_path / "c", 10**9)
    assert len(list((tmp_path / "c").glob("*.tar"))) == 1
    assert_same_batches(source(folder), source(tmp_path / "c"))


def test_flat_folders_have_no_labels(tmp_path, noise_image):
    (tmp_path / "flat").mkdir()
    for k in range(5):
        noise_image(9, 9, seed=k).save(tmp_path / "flat" / f"{k}.png")
    packed(tmp_path / "flat", tmp_path / "out", split="images", labelled=False)
    one, other = (source(tmp_path / name, labelled=False) for name in ("flat", "out"))
    assert other.classes == ("",)
    assert_same_batches(one, other)
    for _ in range(2):  # the manifest that is there does not hide it
        with pytest.raises(ValueError, match=r"images-000000.tar:\w+.png has no label: expected a whole number"):
            source(tmp_path / "out")


def test_bad_images_are_left_out(folder, tmp_path):
    (folder / "train" / "cat" / "page.png").write_text("<html>404</html>")
    (folder / "train" / "cat" / "empty.png").touch()
    done = packed(folder, tmp_path / "out")
    assert (done.samples, done.lost) == (8, ())
    with pytest.warns(UserWarning, match="left out"):
        one = source(folder)
    assert_same_batches(one, source(tmp_path / "out"))


def test_images_that_go_bad_meanwhile_are_named(folder, tmp_path):
    manifest, _ = open_manifest(folder, "train")
    cat = folder / "train" / "cat"
    (cat / "0001.png").unlink()
    (cat / "0002.png").write_bytes(b"longer or shorter")
    done = pack(manifest, tmp_path / "out", "train")
    assert done.samples == 6
    assert sorted(done.lost) == [
        "cat/0001.png: No such file or directory",
        "cat/0002.png: has changed since it was indexed",
    ]
    assert pack(manifest, tmp_path / "out", "train") == done
    assert len(source(tmp_path / "out")) == 6


def test_an_interrupted_call_goes_on(folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "whole")
    out, staging = tmp_path / "out", tmp_path / ".out.packing"
    write = shards._write
    calls = []

    def stopped(file, *rest):
        calls.append(file)
        if len(calls) == 3:
            file.write_bytes(b"half")
            file.rename(file.with_name(".train-000002.tar.killed"))  # what a kill leaves
            raise KeyboardInterrupt
        return write(file, *rest)

    monkeypatch.setattr(shards, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, out)
    assert not out.exists()
    assert {file.name for file in staging.glob("*.tar")} == {"train-000000.tar", "train-000001.tar"}
    before = len(calls)
    done = packed(folder, out)
    assert len(calls) - before == done.shards - 2
    assert not staging.exists()
    whole = tmp_path / "whole"
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_what_is_left_of_another_plan_is_not_used(folder, tmp_path):
    staging = tmp_path / ".out.packing"
    staging.mkdir()
    (staging / "train-000000.tar").write_bytes(b"another one")
    (staging / ".denim-pack.json").write_text('{"plan": "another", "lost": []}')
    packed(folder, tmp_path / "out", 10**9)
    assert len(source(tmp_path / "out")) == 8


@pytest.mark.parametrize("content", ["{", "{}", '{"plan": 3, "lost": []}', '{"plan": "p", "lost": "none"}'])
def test_a_damaged_record_of_a_call_is_named(folder, tmp_path, content):
    packed(folder, tmp_path / "out")
    (tmp_path / "out" / ".denim-pack.json").write_text(content)
    with pytest.raises(DamagedFileError, match=rf"^{tmp_path}/out/\.denim-pack\.json "):
        packed(folder, tmp_path / "out")


def test_a_full_disk_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    out, staging = tmp_path / "out", tmp_path / ".out.packing"
    real = Path.open

    class Full(io.FileIO):
        def write(self, content):
            if self.tell() + len(content) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    def opened(path, mode="r", *rest, **options):
        return Full(path, "w") if mode == "wb" else real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(
        OSError, match=r"cannot write .*out/train-000000.tar: No space left on device. What is finished"
    ):
        packed(folder, out, 10**6)
    assert not out.exists()
    assert [file.name for file in staging.iterdir()] == [".denim-pack.json"]
    monkeypatch.setattr(Path, "open", real)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shards.shutil._ntuple_diskusage(9000, 0, 9000))
    with pytest.raises(OSError, match=r"needs 0.00 GB, and 0.00 GB are free"):
        packed(folder, out, 10**6)
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=rf"^cannot write {tmp_path}/file/out: Not a directory"):
        packed(folder, tmp_path / "file" / "out")


def test_two_at_once_and_other_mistakes(folder, tmp_path, monkeypatch):
    manifest, _ = open_manifest(folder, "train")
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        pack(manifest, tmp_path / "out", "train", 0)
    write = shards._write

    def second(*rest):
        with pytest.raises(ValueError, match="another process is packing in"):
            pack(manifest, tmp_path / "out", "train")
        return write(*rest)

    monkeypatch.setattr(shards, "_write", second)
    done = pack(manifest, tmp_path / "out", "train")
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("written again"))
    assert pack(manifest, tmp_path / "out", "train") == done
    with pytest.raises(ValueError, match="exists already"):
        pack(manifest, tmp_path / "out", "train", 5000)


# --- shards of others


def test_foreign_labels_ids_and_names(tmp_path, noise_image):
    images = [png(noise_image, k) for k in range(6)]
    write_tar(
        tmp_path / "b.tar",
        [("x/001.JPG", images[0]), ("x/001.cls", b"1\n"), ("x/002.png", images[1]), ("x/002.json", b'{"label": 0}')],
    )
    write_tar(
        tmp_path / "a.tar",
        [
            ("readme.txt", b"hello"),
            ("__meta__", b""),
            ("x/._001.png", b"of another system"),
            ("x/001.cls", b"1"),
            ("x/001.seg.png", b"a mask"),
            ("x/001.png", images[2]),
            ("x/" + "long/" * 40 + "name.webp", images[3]),
            ("x/" + "long/" * 40 + "name.cls", b"0"),
            ("ü.png", images[4]),
            ("ü.json", json.dumps({"label": 2, "id": 7, "class": "x"}).encode()),
            ("./dot.png", images[5]),
            ("./dot.cls", b"0"),
        ],
    )
    found = source(tmp_path)
    # Keys repeat between shards: the shard is part of what is hashed, so ids do not depend on what else there is.
    keys = ["a.tar/x/001", "a.tar/x/" + "long/" * 40 + "name", "a.tar/ü", "a.tar/./dot", "b.tar/x/001", "b.tar/x/002"]
    assert found.ids.tolist() == [sample_id(key) for key in keys]
    assert found.labels.tolist() == [1, 0, 2, 0, 1, 0]
    assert found.classes == ("0", "1", "2")
    assert [found.encoded(k) for k in range(6)] == [images[k] for k in (2, 3, 4, 5, 0, 1)]
    assert found.where(4) == f"{tmp_path}/b.tar:x/001.JPG"
    assert found.read(0).size == (11, 9)
    (tmp_path / "a.tar").unlink()
    assert source(tmp_path).ids.tolist() == [sample_id(key) for key in keys[4:]]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path, noise_image, format):
    names = ["a.png", "d" * 90 + "/" + "f" * 80 + ".png"]
    if format != tarfile.USTAR_FORMAT:
        names += ["g" * 200 + ".png", "é" * 70 + ".png"]
    images = {name: png(noise_image, k) for k, name in enumerate(names)}
    write_tar(tmp_path / "s.tar", images.items(), format)
    found = source(tmp_path, labelled=False)
    assert {found.where(k).split(":")[1]: found.encoded(k) for k in range(len(found))} == images


def test_splits_in_folders_and_in_names(tmp_path, noise_image):
    for k, name in enumerate(("imagenet-train-000.tar", "imagenet-train-001.tar", "imagenet-val-000.tar")):
        write_tar(tmp_path / name, [(f"{k}.png", png(noise_image, k)), (f"{k}.cls", b"0")])
    for _ in range(2):
        assert (len(source(tmp_path, "train")), len(source(tmp_path, "val"))) == (2, 1)
    assert source(tmp_path, "val").name == f"{tmp_path.name}/val"
    with pytest.raises(ValueError, match="has no split 'test', it has 'train', 'val'"):
        source(tmp_path, "test")
    (tmp_path / "val").mkdir()
    (tmp_path / "imagenet-val-000.tar").rename(tmp_path / "val" / "part-0.tar")
    assert len(source(tmp_path, "val")) == 1


def test_a_shard_that_changes_is_indexed_anew_and_no_other(tmp_path, noise_image):
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", [(f"{j}.png", png(noise_image, j)) for j in range(3)])
    assert open_manifest(tmp_path, "all", labelled=False)[0].decoded == 6
    assert open_manifest(tmp_path, "all", labelled=False)[0].decoded == 0
    write_tar(tmp_path / "1.tar", [(f"{j}.png", png(noise_image, j)) for j in range(2)])
    manifest, _ = open_manifest(tmp_path, "all", labelled=False)
    assert (manifest.decoded, len(manifest)) == (2, 5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", "ok"), ("a.cls", b"cat")], r"s.tar:a.png has no label"),
        ([("a.png", "ok"), ("a.json", b'{"label": true}')], r"s.tar:a.png has no label"),
        ([("a.png", "ok"), ("a.json", b"{"), ("b.cls", b"1")], r"s.tar:a.png has no label"),
        ([("a.png", "ok"), ("a.cls", b"-1")], r"s.tar:a.png has no label"),
        ([("a.png", "ok"), ("a.jpg", "ok")], r"key 'a'\? a.png, a.jpg: a key ends at the first dot"),
        ([("a.1.png", "ok"), ("a.cls", b"0")], r"key 'a'\? a.1.png: a key ends at the first dot"),
        ([("a.png", "ok"), ("a.cls", b"0"), ("b.txt", b""), ("a.png", "ok"), ("a.cls", b"0")], "have the same id"),
        ([("a.txt", b"0")], "no images in the shards in"),
        ([], "no images in the shards in"),
        (
            [
                *(("a.png", "ok"), ("a.json", b'{"label": 0, "class": "x", "denim": {"id": 1, "position": 0}}')),
                *(("b.png", "ok"), ("b.json", b'{"label": 0, "class": "y", "denim": {"id": 2, "position": 1}}')),
            ],
            r"label 0 is class 'y' in .*s.tar:b.png, and 'x' in an earlier sample",
        ),
    ],
)
def test_mistakes_in_shards(tmp_path, noise_image, members, message):
    whole = png(noise_image)
    write_tar(tmp_path / "s.tar", [(name, whole if content == "ok" else content) for name, content in members])
    with pytest.raises(ValueError, match=message):
        source(tmp_path)


def test_no_archive_at_all(tmp_path, noise_image):
    write_tar(tmp_path / "a.tar", [("a.png", png(noise_image))])
    for content in (b"", b"<html>404</html>" * 100):
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.tar is no tar archive"):
            source(tmp_path, labelled=False)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    (tmp_path / "b.tar").unlink()
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed"):
        source(tmp_path, labelled=False)


# --- damage


def test_whatever_the_length_of_a_truncated_shard(tmp_path, noise_image):
    images = {f"{k}.png": png(noise_image, k) for k in range(3)}
    labels = {f"{k}.cls": b"0" for k in range(3)}
    whole = write_tar(
        tmp_path / "whole",
        [pair for k in range(3) for pair in ((f"{k}.png", images[f"{k}.png"]), (f"{k}.cls", labels[f"{k}.cls"]))],
    ).read_bytes()
    with tarfile.open(tmp_path / "whole") as tar:
        ends = [member.offset_data + member.size for member in tar]
    (tmp_path / "s").mkdir()
    shard = tmp_path / "s" / "s.tar"
    lengths = {end + more for end in ends for more in (-1, 0, 1, 511, 512, 513)} | set(range(1024, ends[-1] + 512, 300))
    for length in sorted(lengths):
        if length < ends[1]:
            continue  # not one whole sample
        shard.write_bytes(whole[:length])
        os.utime(shard, ns=(length, length))
        complete = sum(end <= length for end in ends[1::2])
        if length >= ends[-1] or any(end <= length <= -(-end // 512) * 512 for end in ends[1::2]):
            assert len(source(tmp_path / "s")) == complete  # it ends with a whole sample: nothing is lost
            assert source(tmp_path / "s").skipped == ()
            continue
        with pytest.warns(UserWarning, match="left out"):
            found = source(tmp_path / "s")
        # Of an image without its label no label is known.
        assert len(found) == complete, length
        assert [found.encoded(k) for k in range(complete)] == list(images.values())[:complete]
        rest = found.skipped[-1]
        assert rest.startswith(f"{shard}:(what was after byte ")
        assert rest.endswith("before the image does")
    shard.write_bytes(whole[: ends[-1] + 512 * 4])
    assert source(tmp_path / "s").skipped == ()


def archive(numbers, noise_image):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for k in numbers:
            for name, part in ((f"{k}.cls", b"0"), (f"{k}.png", png(noise_image, k))):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
        end = tar.offset
    return content.getvalue(), end


@pytest.mark.parametrize("zeros", [0, 512, 1024, 10240, 1000 * 512])
def test_archives_that_were_joined_are_read_to_the_end(tmp_path, noise_image, zeros):
    (first, end), (second, _) = archive(range(3), noise_image), archive(range(3, 5), noise_image)
    joined = first[:end] + bytes(zeros) + second
    (tmp_path / "s.tar").write_bytes(joined)
    found = source(tmp_path)
    assert [found.encoded(k) for k in range(5)] == [png(noise_image, k) for k in range(5)]
    (tmp_path / "s.tar").write_bytes(first[:end] + bytes(zeros or 512) + b"no header".ljust(700, b"."))
    with pytest.warns(UserWarning, match="left out"):
        found = source(tmp_path)
    assert len(found) == 3
    assert found.skipped[0].startswith(f"{tmp_path}/s.tar:(what was after byte {end + (zeros or 512)})")


@pytest.mark.parametrize("size", [-512, -1024, -(10**6)])
def test_a_member_of_negative_length_ends_the_shard(tmp_path, noise_image, size):
    """Python before 3.11.14 goes back by that length, and reads the same members for ever."""
    content, end = archive(range(2), noise_image)
    header = bytearray(tarfile.TarInfo("evil.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size + (1 << 96)).to_bytes(12, "big")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    (tmp_path / "s.tar").write_bytes(content[:end] + bytes(header) + content)
    with pytest.warns(UserWarning, match="left out"):
        found = source(tmp_path)
    assert len(found) == 2
    assert found.skipped[0].startswith(f"{tmp_path}/s.tar:(what was after byte {end})")


def test_a_pipe_is_no_shard(tmp_path, noise_image):
    write_tar(tmp_path / "a.tar", [("0.png", png(noise_image))])
    os.mkfifo(tmp_path / "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar is not a regular file"):
        source(tmp_path, labelled=False)


def test_members_and_files_that_are_passed_over_are_counted(tmp_path, noise_image):
    members = [
        ("a.png", png(noise_image)),
        ("a.txt", b"words"),
        ("a.seg.png", b"a mask"),
        ("b.cls", b"0"),
        ("._c", b""),
    ]
    write_tar(tmp_path / "s-train-0.tar", members)
    write_tar(tmp_path / "s-val-0.tar", [("a.png", png(noise_image))])
    write_tar(tmp_path / "extra.tar", [("a.png", png(noise_image))])
    for name in ("old.tar.gz", "s.idx"):
        (tmp_path / name).touch()
    manifest, _ = open_manifest(tmp_path, "train", labelled=False)
    assert manifest.passed_over == {
        "ending in .txt": (1, "s-train-0.tar:a.txt"),
        "images outside of the class folders": (1, "s-train-0.tar:a.seg.png"),
        "labels without an image": (1, "s-train-0.tar:b"),
        "hidden": (1, "s-train-0.tar:._c"),
        "ending in .gz": (1, "old.tar.gz"),
        "ending in .idx": (1, "s.idx"),
        "ending in .tar": (1, "extra.tar"),
    }


def test_damage_between_members(tmp_path, noise_image):
    whole = write_tar(tmp_path / "s.tar", [(f"{k}.png", png(noise_image, k)) for k in range(4)])
    with tarfile.open(whole) as tar:
        header = tar.getmembers()[2].offset
    content = bytearray(whole.read_bytes())
    content[header : header + 512] = b"\xff" * 512
    whole.write_bytes(content)
    with pytest.warns(UserWarning, match="left out"):
        found = source(tmp_path, labelled=False)
    assert len(found) == 2
    assert found.skipped == (f"{whole}:(what was after byte {header}): not an image in a known format",)
    whole.write_bytes(content[:header] + bytes(2_000_000))  # a crash of the system
    with pytest.warns(UserWarning, match="left out"):
        assert len(source(tmp_path, labelled=False)) == 2


def test_members_that_are_no_images(tmp_path, noise_image):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "ok.png"
    write_tar(tmp_path / "s.tar", [("page.png", b"<html>"), link, ("ok.png", png(noise_image))])
    with pytest.warns(UserWarning, match="left out"):
        found = source(tmp_path, labelled=False)
    assert found.skipped == (
        f"{tmp_path}/s.tar:page.png: not an image in a known format",
        f"{tmp_path}/s.tar:link.png: not a regular file, nor a link to one",
    )


def test_a_shard_that_goes_bad_later(tmp_path, noise_image):
    members = [(f"{k}.png", png(noise_image, k)) for k in range(3)]
    folder = tmp_path / "set"
    folder.mkdir()
    shard = write_tar(folder / "s.tar", members)
    expected = [content for _, content in members]

    def opened():
        return source(folder, labelled=False, cache=tmp_path / "cache")

    first = opened()
    assert [first.encoded(k) for k in range(3)] == expected
    kept = tmp_path / "kept"
    open_manifest(folder, "all", labelled=False, cache=tmp_path / "cache")[0].keep(kept)
    # Replaced: who has it open goes on with what was indexed.
    with atomic_write(shard) as staged:
        write_tar(staged, members[::-1])
    assert [first.encoded(k) for k in range(3)] == expected
    # A new process, that would find other members there, says so.
    shards._opened.cache_clear()
    second = ImageFolder(folder, "all", labelled=False, kept=kept)
    with pytest.raises(OSError, match=r"s.tar:0.png was readable at the start and no longer is: .*s.tar has changed"):
        second.encoded(0)
    # Another image under the same name, too.
    write_tar(shard, [("0.png", png(noise_image, 9, 19)), *members[1:]])
    shards._opened.cache_clear()
    with pytest.raises(OSError, match=r"s.tar has changed"):
        second.encoded(0)
    # The same members with another time of change are the same.
    write_tar(shard, members)
    os.utime(shard, ns=(5, 5))
    shards._opened.cache_clear()
    assert [second.encoded(k) for k in range(3)] == expected
    third = opened()
    assert third.encoded(2) == expected[2]
    os.truncate(shard, 2000)
    with pytest.raises(OSError, match=r"s.tar:2.png was readable .* bytes before the image does"):
        third.encoded(2)
    write_tar(shard, members)
    fourth = opened()
    shard.unlink()
    shards._opened.cache_clear()
    with pytest.raises(OSError, match=r"s.tar:0.png was readable .*No such file"):
        fourth.read(0)


def test_a_run_goes_on_without_a_shard(tmp_path, noise_image):
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", [(f"{j}.png", png(noise_image, j + 3 * k)) for j in range(3)])
    found = source(tmp_path, labelled=False)
    (tmp_path / "1.tar").unlink()
    loader = TorchLoader(found, TrainView(4), 6, max_bad=0.5)
    with pytest.warns(UserWarning, match=r"1.tar:\d.png"):
        (batch,) = loader.epoch(0)
    assert set(batch.ids.tolist()) <= set(found.ids[:3].tolist())
    assert len(loader.state()["bad"]) == 3


# --- threads and processes


def test_threads_share_shards_and_processes_open_their_own(tmp_path, noise_image, monkeypatch):
    for k in range(6):
        write_tar(tmp_path / f"{k}.tar", [(f"{j}.png", png(noise_image, 10 * k + j)) for j in range(5)])
    found = source(tmp_path, labelled=False)
    expected = [png(noise_image, 10 * (k // 5) + k % 5) for k in range(30)]
    # A cache too small for all: what it lets go of may be in use.
    monkeypatch.setattr(shards, "_opened", shards.functools.lru_cache(2)(shards._opened.__wrapped__))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [k * 7 % 30 for k in range(1200)]
        assert all(found.encoded(0) == expected[0] for _ in range(2))
        for row, content in zip(rows, pool.map(found.encoded, rows), strict=True):
            assert content == expected[row]
    if before is not None:
        assert len(list(descriptors.iterdir())) <= before + 2  # closed, all but two
    manifest = pickle.loads(pickle.dumps(open_manifest(tmp_path, "all", labelled=False)[0]))
    assert isinstance(manifest, ShardManifest)
    with manifest.open(17) as file:
        assert file.read() == expected[17]


def test_workers(folder, tmp_path):
    packed(folder, tmp_path / "out")
    one, other = source(folder), source(tmp_path / "out")
    other.encoded(0)  # opens a shard, which the workers inherit
    view = TrainView(8)
    a = [batch.images for batch in TorchLoader(one, view, 4).epoch(1)]
    b = [batch.images for batch in TorchLoader(other, view, 4, workers=2).epoch(1)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
