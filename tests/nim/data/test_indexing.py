import contextlib
import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from denim.nim.data import Listing, Manifest, ManifestError, indexing, listing, manifest, processes
from denim.nim.data import decode as decoder
from denim.nim.data.dali_loader import dali_version, problem
from denim.nim.data.decode import MachineError, Place, Verdict, decode, judge, judge_all
from denim.nim.data.indexing import cache_folder, index, try_with_dali
from denim.nim.data.listing import list_images, sample_id
from denim.nim.files import WriteError

pytestmark = pytest.mark.slow

INT64 = st.integers(-(2**63), 2**63 - 1)


def opened(root, cache=None):
    """The manifest of a folder of class folders."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    listing = list_images(root, classes)
    return index(root, listing.key(), lambda: listing, cache)


def file_of(root):
    """The manifest of a folder, if there is one."""
    return cache_folder() / "manifests" / indexing.file_name(root)


def rows(found):
    """All that a manifest says, by path."""
    return {
        found.path(k): (
            found.ids[k].item(),
            found.classes[found.labels[k]],
            tuple(found.sizes[k].tolist()),
            found.image_format(k),
            found.fault(k),
            found.place(k)[1:],
        )
        for k in range(len(found))
    }


@pytest.fixture
def folder(tmp_path, make_folder):
    return make_folder(tmp_path / "data") / "train"


@pytest.fixture
def many(tmp_path, noise_image):
    """700 files, more than are decoded in process, some of them bad."""
    root = tmp_path / "data"
    for k in range(700):
        path = root / f"class{k % 3}" / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k % 50 == 7:
            path.write_bytes(b"nothing")
        else:
            noise_image(2 + k % 5, 3, seed=k).save(path)
    return root


# --- what it says


def test_rows(folder):
    (folder / "cat" / "0001.png").write_bytes(b"")
    found = opened(folder)
    # Valid rows first, each part in the order of the paths.
    paths = ["cat/0000.png", "cat/0002.png", "dog/0000.png", "dog/0001.png", "dog/0002.png", "cat/0001.png"]
    assert [found.path(k) for k in range(6)] == paths
    assert (found.valid, len(found), found.decoded) == (5, 6, 6)
    assert found.ids.tolist() == [sample_id(path) for path in paths]
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 0]
    assert found.sizes.tolist() == [[24, 20], [24, 22], [24, 20], [24, 21], [24, 22], [0, 0]]
    assert found.bytes.tolist() == [(folder / path).stat().st_size for path in paths]
    assert [found.where(k) for k in range(6)] == [str(folder / path) for path in paths]
    assert [found.image_format(k) for k in range(6)] == ["PNG"] * 5 + [""]
    assert [found.fault(k) for k in range(6)] == [""] * 5 + ["not an image in a known format"]
    assert found.format_counts() == {"PNG": 5}
    assert (found.ids.dtype, found.labels.dtype, found.sizes.dtype) == (torch.int64, torch.int64, torch.int32)
    with found.open(3) as file:
        assert file.read() == (folder / "dog" / "0001.png").read_bytes()


names = st.lists(
    st.binary(min_size=1, max_size=9).filter(lambda name: not set(name) & set(b"\0/")), max_size=20, unique=True
)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), paths=names)
def test_any_listing_comes_back(data, paths, tmp_path_factory):
    """Names are bytes to the system, and need not be text."""
    file = tmp_path_factory.mktemp("manifest") / "file"
    listing = Listing(Path("root"), ("a", "b"), ("x.tar", "y.tar"))
    positive = st.integers(1, 2**31 - 1)
    faults = st.sampled_from(["", "", "bad"])
    verdict = st.builds(
        Verdict, positive, positive, st.sampled_from(["JPEG", "PNG"]), faults, st.booleans(), st.just(False)
    )
    verdicts = [data.draw(verdict) for _ in paths]
    ids = data.draw(st.lists(INT64, min_size=len(paths), max_size=len(paths), unique=True))
    for k, path in enumerate(paths):
        listing.add_member(os.fsdecode(path), k % 2, k, -k, ids[k], (k + 1) % 2, 512 * k)
    Manifest.write(file, listing, verdicts, "key")
    found = Manifest(file, Path("root"), "key")
    assert found.valid == sum(not verdict.fault for verdict in verdicts)
    order = sorted(range(len(paths)), key=lambda k: bool(verdicts[k].fault))
    for row, k in enumerate(order):
        assert os.fsencode(found.path(row)) == paths[k]
        assert found.ids[row] == ids[k]
        assert found.labels[row] == k % 2
        said = *found.sizes[row].tolist(), found.image_format(row), found.fault(row), found.is_plain(row)
        assert said == verdicts[k][:5]
        assert found.place(row) == Place(f"root/{'yx'[k % 2]}.tar", 512 * k, k)
        assert found.where(row) == f"root/{'yx'[k % 2]}.tar:{os.fsdecode(paths[k])}"
    assert dict(found.verdicts(listing)) == dict(enumerate(verdicts))


def test_members_of_shards_are_read_by_offset(tmp_path, noise_image):
    buffer = io.BytesIO()
    noise_image(5, 7).save(buffer, "PNG")
    content = buffer.getvalue()
    (tmp_path / "s.tar").write_bytes(b"x" * 512 + content + b"y" * 100 + content[:-40])
    listing = Listing(tmp_path, ("",), ("s.tar",))
    listing.add_member("a.png", 0, len(content), 1, 10, 0, 512)
    listing.add_member("b.png", 0, len(content) - 40, 1, 11, 0, 612 + len(content))
    listing.add_member("c.png", 0, len(content), 1, 12, 0, 612 + len(content))
    found = index(tmp_path, "key", lambda: listing)
    assert found.valid == 1
    with found.open(0) as file:
        assert file.read() == content
    assert "truncated" in found.fault(1)
    assert found.fault(2) == f"{tmp_path}/s.tar ends 40 bytes before the image does"
    with pytest.raises(OSError, match="ends 40 bytes before"):
        found.open(2)
    assert index(tmp_path, "key", lambda: pytest.fail("listed again")).ids.tolist() == [10, 11, 12]


def test_another_process_maps_the_same_file(folder):
    found = opened(folder)
    pickled = pickle.dumps(found)
    assert len(pickled) < 500
    assert rows(pickle.loads(pickled)) == rows(found)
    (folder / "cat" / "0000.png").unlink()
    opened(folder)
    with pytest.raises(ManifestError, match=r"that of another folder, or .* has changed since"):
        pickle.loads(pickled)


# --- the decoder's word


def test_every_kind_of_bad_file(folder, noise_image, monkeypatch):
    cat = folder / "cat"
    noise_image(24, 24).save(cat / "short.jpg")
    whole = (cat / "short.jpg").read_bytes()
    (cat / "short.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (cat / "empty.jpg").touch()
    (cat / "text.png").write_text("a note")
    (cat / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(cat / "pipe.png")  # opening one waits for a writer for ever
    (cat / "a_folder.png").mkdir()
    noise_image(1, 1000).save(cat / "absurd.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    bad = {Path(path).name: row[4] for path, row in rows(opened(folder)).items() if row[4]}
    assert set(bad) == {f.name for f in cat.iterdir()} - {"0000.png", "0001.png", "0002.png", "a_folder.png"}
    assert "truncated" in bad["short.jpg"].lower()
    assert bad["dangling.png"] == bad["pipe.png"] == "not a regular file, nor a link to one"
    assert bad["absurd.png"] == "1000 x 1 pixels, exceeds limit of 999 pixels"


@contextlib.contextmanager
def failing(number, times=10**9, error=None):
    """Opening any file called 0001.png fails with this error of the system, so many times."""
    real, left = os.open, [times]

    def opening(file, *args, **options):  # bits of permission do not bind root, who may run this
        if str(file).endswith("0001.png") and left[0]:
            left[0] -= 1
            raise error or OSError(number, os.strerror(number), file)
        return real(file, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opening)
        patch.setattr(decoder, "PAUSES", (0, 0))
        yield


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOENT, errno.ENOMEM])
def test_a_fault_of_the_machine_is_no_verdict(folder, number):
    with failing(number), pytest.raises(MachineError, match=rf"2 of 6 .*dog/0001.png: {os.strerror(number)}\. They do"):
        opened(folder)
    found = opened(folder)
    assert (found.valid, found.decoded) == (6, 2)  # what could be decoded was kept


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_fault_that_passes_is_not_noticed(folder, number):
    with failing(number, times=2):
        assert opened(folder).valid == 6


def test_want_of_memory_is_no_verdict(folder):
    with failing(0, error=MemoryError()), pytest.raises(MachineError, match="not enough memory"):
        opened(folder)
    assert opened(folder).valid == 6


@pytest.mark.parametrize("save", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_what_passes_can_be_decoded_and_nothing_else(tmp_path, noise_image, save):
    """The verdict on a JPEG decodes an eighth of the resolution: it must be that of the whole."""
    draw = random.Random(0)
    buffer = io.BytesIO()
    noise_image(40, 50).save(buffer, **save)
    verdicts = []
    for trial in range(150):
        content = bytearray(buffer.getvalue())
        if trial % 3 == 0:
            del content[draw.randrange(len(content)) :]
        else:
            for _ in range(draw.choice([1, 3, 30])):
                content[draw.randrange(len(content))] = draw.randrange(256)
        path = tmp_path / str(trial)
        path.write_bytes(content)
        try:
            size = decode(bytes(content), 3).size
        except Exception:
            size = (0, 0)
        (verdict,) = judge_all([Place(str(path), -1, len(content))])
        assert verdict[:2] == size
        verdicts.append(bool(verdict.fault))
    assert 20 < sum(verdicts) < 150  # both kinds were seen


def test_links_are_followed_but_not_in_circles(folder, tmp_path, noise_image):
    (tmp_path / "elsewhere").mkdir()
    noise_image(4, 4).save(tmp_path / "elsewhere" / "far.png")
    (folder / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "loop").symlink_to(folder / "dog")
    assert [path for path in rows(opened(folder)) if "0" not in path] == ["dog/link/far.png"]


def test_processes_say_what_this_one_says(many, capfd):
    found = opened(many)
    assert capfd.readouterr().err == ""  # no bar where nobody sees it move
    assert (found.decoded, found.valid) == (700, 686)
    listing = list_images(many, found.classes)
    assert dict(found.verdicts(listing)) == dict(enumerate(judge_all(map(listing.place, range(700)))))


def test_the_limit_reaches_the_processes(many, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    low = opened(many)
    assert low.sizes.numpy().prod(axis=1).max() <= 10
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    # Another limit, another word: nothing of the earlier manifest counts.
    high = opened(many)
    assert (high.decoded, high.valid) == (700, 686)
    assert low.valid < 686


# --- refreshing


def test_only_what_changed_is_decoded_again(folder, noise_image, monkeypatch):
    before = rows(opened(folder))
    assert opened(folder).decoded == 0

    decoded = []
    monkeypatch.setattr(indexing, "judge_all", lambda places: [*map(seen, places)])

    def seen(place):
        decoded.append(Path(place.file).relative_to(folder).as_posix())
        return judge(place)

    noise_image(9, 9).save(folder / "dog" / "new.png")
    (folder / "dog" / "0000.png").unlink()
    time = (folder / "cat" / "0001.png").stat().st_mtime_ns
    noise_image(5, 5).save(folder / "cat" / "0001.png")
    os.utime(folder / "cat" / "0001.png", ns=(time, time))  # another size at the same time
    changed = (folder / "cat" / "0002.png").read_bytes()
    (folder / "cat" / "0002.png").write_bytes(changed)
    os.utime(folder / "cat" / "0002.png", ns=(1, 1))  # the same size at another time
    found = opened(folder)
    assert sorted(decoded) == ["cat/0001.png", "cat/0002.png", "dog/new.png"]
    assert found.decoded == 3
    after = rows(found)
    assert set(after) == (set(before) | {"dog/new.png"}) - {"dog/0000.png"}
    assert after["cat/0001.png"][2] == (5, 5)
    assert all(after[path] == before[path] for path in ("cat/0000.png", "cat/0002.png", "dog/0001.png"))
    # A class before the others changes labels, and needs no decoding.
    decoded.clear()
    (folder / "ant").mkdir()
    shutil.copy(folder / "cat" / "0000.png", folder / "ant" / "0000.png")
    assert rows(opened(folder))["dog/0001.png"] == before["dog/0001.png"]
    assert decoded == ["ant/0000.png"]


# --- where it is kept


def test_nothing_is_written_among_the_data(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    found = opened(folder)
    assert found.file.parent == cache_folder() / "manifests"
    assert sorted(folder.rglob("*")) == before
    assert opened(folder).decoded == 0
    # Asked for by name, a place of its own.
    assert opened(folder, tmp_path / "mine").file.parent == tmp_path / "mine"


def test_a_manifest_that_came_with_the_data_is_not_believed(folder, tmp_path):
    """It could name any file of the machine as one of its images."""
    Image.new("RGB", (3, 3)).save(tmp_path / "private.png")
    listing = list_images(folder, ("cat", "dog"))
    for row, path in enumerate([str(tmp_path / "private.png"), "cat/../../../../private.png"]):
        forged = Listing(folder, ("cat", "dog"))
        for k in range(len(listing)):
            if k != row:
                forged.add(listing.path(k), 0, 1, 1)
        forged.add(path, 0, (tmp_path / "private.png").stat().st_size, 1)
        for name in (".denim-manifest.safetensors", opened(folder).file.name):
            Manifest.write(folder / name, forged, [judge(forged.place(k)) for k in range(len(forged))], listing.key())
        found = opened(folder)
        assert found.file.parent == cache_folder() / "manifests"
        assert sorted(rows(found)) == sorted(listing.path(k) for k in range(len(listing)))


def test_a_link_in_place_of_the_journal_is_not_followed(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("data")
    journal = opened(folder, tmp_path / "cache").file.with_suffix(".journal")
    journal.with_suffix(".safetensors").unlink()
    journal.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        opened(folder, tmp_path / "cache")
    assert precious.read_text() == "data"
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(OSError, match=r"\.journal is not a regular file"):
        opened(folder, tmp_path / "cache")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp" / f"denim-{os.getuid()}"


@pytest.mark.parametrize("home", ["none", "unwritable"])
def test_without_a_cache_the_temporary_folder_serves(folder, tmp_path, monkeypatch, temporary, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "none":

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
        found = opened(folder)
    else:
        (tmp_path / "home").touch()  # no folder can be made in it, not even by root
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        with pytest.warns(UserWarning, match=r"manifests cannot be kept in .*: let XDG_CACHE_HOME name a folder"):
            found = opened(folder)
    assert found.file.parent == temporary / "manifests"
    assert temporary.stat().st_mode & 0o077 == 0
    assert opened(folder).decoded == 0


@pytest.mark.parametrize("who", ["a link", "writable for others"])
def test_a_temporary_folder_that_others_made_is_not_trusted(folder, tmp_path, monkeypatch, temporary, who):
    monkeypatch.setattr(indexing, "cache_folder", lambda: tmp_path / "file" / "denim")
    (tmp_path / "file").touch()
    if who == "a link":
        (tmp_path / "elsewhere").mkdir()
        temporary.symlink_to(tmp_path / "elsewhere")
    else:
        temporary.mkdir()
        temporary.chmod(0o777)
    with pytest.raises(OSError, match=r"cannot be written to .* or .*: name another folder for it \(cache, --cache\)"):
        opened(folder)
    assert not list(tmp_path.glob("elsewhere/**/*.safetensors"))


# --- damage


def contents(file):
    """The header and the columns of a manifest."""
    with safetensors.safe_open(file, framework="np") as content:
        return content.metadata(), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def rewritten(file, version=None, **parts):
    """The manifest with another version, or with columns of which only a part is kept; its digest is right."""
    header, columns = contents(file)
    for name, part in parts.items():
        if part is None:
            del columns[name]
        else:
            columns[name] = columns[name][part].copy()
    if version is not None:
        header["denim_manifest"] = version
    manifest._save(file, columns, header)


def changed(file, name, change):
    """The manifest with another column of this name; its digest is right."""
    header, columns = contents(file)
    columns[name] = np.ascontiguousarray(change(columns[name].copy()))
    manifest._save(file, columns, header)


def reheaded(file, **entries):
    """The manifest with other entries in its header; its digest is right."""
    header, columns = contents(file)
    manifest._save(file, columns, header | entries)


def upwards(paths):
    """ "cat/..." becomes "../t...": as long as it was, and below another folder."""
    paths[:3] = np.frombuffer(b"../", np.uint8)
    return paths


DAMAGES = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is truncated or damaged"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "is truncated or damaged"),
    "empty": (lambda file: file.write_bytes(b""), "is truncated or damaged"),
    "text": (lambda file: file.write_text("{}" * 99), "is truncated or damaged"),
    "other version": (lambda file: rewritten(file, version="0"), "is version 0 of the manifest, expected"),
    "weights": (lambda file: safetensors.numpy.save_file({"a": np.ones(3)}, file), "is no manifest of Denim"),
    "column missing": (lambda file: rewritten(file, sizes=None), "is damaged: it has no 'sizes'"),
    "faults missing": (lambda file: rewritten(file, faults=None), "is damaged: it has no 'faults'"),
    "paths cut": (lambda file: rewritten(file, paths=slice(-1)), "is damaged: its columns do not fit"),
    "column cut": (lambda file: rewritten(file, labels=slice(-1)), "is damaged: its columns do not fit"),
    "label of no class": (lambda file: changed(file, "labels", lambda x: x + 1), "its column labels is out of range"),
    "negative label": (lambda file: changed(file, "labels", lambda x: x - 1), "its column labels is out of range"),
    "float labels": (lambda file: changed(file, "labels", lambda x: x.astype(np.float32)), "labels is float32"),
    "flat sizes": (lambda file: changed(file, "sizes", lambda x: x[:, 0]), "column sizes is int32"),
    "wide sizes": (lambda file: changed(file, "sizes", lambda x: x.repeat(2, 1)), "columns do not fit"),
    "no pixels": (lambda file: changed(file, "sizes", lambda x: 0 * x), "sizes of valid images is out of range"),
    "unknown format": (lambda file: changed(file, "formats", lambda x: x + 9), "formats is out of range"),
    "length below -1": (lambda file: changed(file, "bytes", lambda x: x - 10**9), "bytes is out of range"),
    "ends go back": (lambda file: changed(file, "ends", lambda x: x[[1, 0, *range(2, len(x))]]), "do not fit"),
    "absolute path": (lambda file: changed(file, "paths", lambda x: np.where(x == ord("c"), 47, x)), "not below"),
    "path out": (lambda file: changed(file, "paths", upwards), r"'\.\./.*' is not below its folder"),
    "header of numbers": (lambda file: reheaded(file, classes="[1, 2]"), "its names are not text"),
    "header of a number": (lambda file: reheaded(file, reasons="3"), "is damaged: "),
    "header that is no JSON": (lambda file: reheaded(file, formats="{"), "is damaged: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named_and_made_anew(folder, damage):
    before = opened(folder)
    expected, file = rows(before), before.file
    del before
    spoil, message = DAMAGES[damage]
    spoil(file)
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest(file, folder)
    assert str(file) in str(caught.value)
    with pytest.warns(UserWarning, match=rf"{message}.*; it is made anew"):
        found = opened(folder)
    assert found.decoded == 6
    assert rows(found) == expected


def test_a_flipped_bit_in_a_manifest_is_noticed(folder):
    """Also one that leaves every value in its range: another size, label or verdict would be believed."""
    file = opened(folder).file
    whole = file.read_bytes()
    header, columns = contents(file)
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            Manifest(file, folder)
        except ManifestError:
            continue
        # JSON allows a space or another spelling in some places: what it says must be the same.
        assert contents(file)[0] == header
        assert all(np.array_equal(column, columns[name]) for name, column in contents(file)[1].items())


def test_a_manifest_of_another_folder(folder, tmp_path, make_folder):
    other = opened(make_folder(tmp_path / "other", each=2) / "train")
    with pytest.raises(ManifestError, match=r"no manifest .*absent"):
        Manifest(tmp_path / "absent", folder)
    with pytest.raises(ManifestError, match=rf"{other.file} is that of another folder"):
        Manifest(other.file, folder, list_images(folder, ("cat", "dog")).key())
    # Copied to where that of this folder belongs, it is not taken for it.
    opened(folder).file.write_bytes(other.file.read_bytes())
    found = opened(folder)
    assert [found.path(k) for k in range(6)] == [f"{name}/000{k}.png" for name in ("cat", "dog") for k in range(3)]


def test_two_samples_with_one_id(folder, monkeypatch):
    monkeypatch.setattr(listing, "sample_id", lambda path: 12 - path.count("1") - 5 * path.count("dog"))
    with pytest.raises(ValueError, match=r"dog/0000.png and .*dog/0002.png have the same id 7, .* rename or remove"):
        opened(folder)
    assert not list((cache_folder() / "manifests").glob(f"{file_of(folder).stem}*.safetensors"))


def test_a_full_disk_leaves_nothing_half_written(folder, monkeypatch):
    before = rows(opened(folder))
    (folder / "cat" / "0000.png").unlink()

    def full(columns, file, metadata):
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match=rf"cannot write the manifest {file_of(folder)}: No space left on device"):
            opened(folder)
    kept = {path.name for path in file_of(folder).parent.glob(f"*{file_of(folder).stem}*")}
    assert kept == {file_of(folder).name, file_of(folder).with_suffix(".journal").name}
    assert rows(Manifest(file_of(folder), folder)) == before
    assert rows(opened(folder)) == {path: row for path, row in before.items() if path != "cat/0000.png"}


def test_a_journal_that_cannot_be_written_is_named(folder, monkeypatch):
    """The file has a buffer: it fails again as it is closed."""

    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", lambda handle, mode: io.BufferedRandom(Full(handle, "a+")))
    with pytest.raises(WriteError, match=rf"^cannot write {file_of(folder).with_suffix('.journal')}: No space left on"):
        opened(folder)


# --- interruption


def test_a_killed_indexing_goes_on(many, monkeypatch):
    """Killed for good after three chunks, in a process of its own, with a line half written."""
    chunks = 3
    if (child := os.fork()) == 0:
        # In process: the child has none of the threads of this one.
        monkeypatch.setattr(indexing, "IN_PROCESS", 10**6)
        judged = indexing._judge

        def dying(*args):
            for k, result in enumerate(judged(*args)):
                if k == chunks:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result

        indexing._judge = dying
        try:
            opened(many)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    journal = file_of(many).with_suffix(".journal")
    assert len(journal.read_bytes().splitlines()) == 1 + chunks
    with journal.open("ab") as file:
        file.write(b'[[123, 45, 67, 8, 9, "PN')
    assert not file_of(many).exists()
    found = opened(many)
    assert found.decoded == 700 - chunks * indexing.CHUNK
    assert not journal.exists()
    again = opened(many, many.parent / "cache")
    assert again.decoded == 700
    assert rows(again) == rows(found)


def test_what_a_killed_process_has_half_written_is_removed(folder):
    """The cache is shared: the half-written manifest of another folder, which may be alive, stays."""
    before = opened(folder)
    others = before.file.parent / "0123.part"
    others.mkdir(exist_ok=True)
    there = {*others.parent.rglob("*")}
    if (child := os.fork()) == 0:
        try:
            safetensors.numpy.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            manifest._save(before.file, {"ids": np.zeros(3)}, {})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {*others.parent.rglob("*")} > there
    (folder / "cat" / "0001.png").unlink()
    assert len(opened(folder)) == 5
    assert {*others.parent.rglob("*")} == there


def journal_of(root, monkeypatch):
    """The journal that an interrupted indexing leaves: two lines of verdicts, of 4 and 2 samples."""
    monkeypatch.setattr(indexing, "CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opened(root)
    return file_of(root).with_suffix(".journal")


def test_a_journal_of_another_limit_counts_nothing(folder, monkeypatch):
    journal = journal_of(folder, monkeypatch)
    header = json.loads(journal.read_text().splitlines()[0])
    assert header == {"manifest": manifest.VERSION, "limit": Image.MAX_IMAGE_PIXELS}
    content = journal.read_bytes()
    for limit, decoded in ((1, 6), (Image.MAX_IMAGE_PIXELS, 0)):
        file_of(folder).unlink(missing_ok=True)
        journal.write_bytes(content.replace(str(Image.MAX_IMAGE_PIXELS).encode(), str(limit).encode(), 1))
        assert opened(folder).decoded == decoded


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (1, lambda line: b"{" + line, "line 2 of .*journal is not valid JSON"),
        (2, lambda line: b"[]", "line 3 of .*journal holds"),
        (2, lambda line: b"{}", "line 3 of .*journal is not as it was written"),
        (2, lambda line: line.replace(b'"PNG"', b'"GIF"', 1), "line 3 of .*journal is not as it was written"),
    ],
)
def test_a_damaged_journal_is_named_and_what_it_said_is_found_out_anew(folder, monkeypatch, line, change, words):
    journal = journal_of(folder, monkeypatch)
    lines = journal.read_bytes().splitlines()
    lines[line] = change(lines[line])
    journal.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=words):
        found = opened(folder)
    assert found.decoded == {1: 6, 2: 2}[line]
    assert not journal.exists()
    assert rows(found) == rows(opened(folder, folder.parent / "cache"))


def test_of_two_that_ask_at_once_one_does_the_work(many, monkeypatch):
    monkeypatch.setattr(indexing, "IN_PROCESS", 10**6)
    found = []
    threads = [threading.Thread(target=lambda: found.append(opened(many))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.decoded for each in found) == [0, 0, 700]
    assert rows(found[0]) == rows(found[1]) == rows(found[2])


def test_who_waited_for_a_journal_that_was_removed_gets_a_new_one(tmp_path):
    path = tmp_path / "journal"
    found = []

    def wait():
        with indexing._locked(path) as journal:
            found.append(os.path.samestat(os.fstat(journal.fileno()), path.stat()))

    with indexing._locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        sleep(0.2)  # it has opened the file, and waits
        path.unlink()
    thread.join()
    assert found == [True]


def test_a_killed_process_changes_nothing(many, monkeypatch):
    expected = rows(opened(many, many.parent / "cache"))
    started = []
    start = processes._Processes._start

    def remembered(self):
        started.append(start(self))
        return started[-1]

    monkeypatch.setattr(processes._Processes, "_start", remembered)
    answer = processes._Processes.__call__
    asked = []

    def killing(self, places):
        asked.append(None)
        if len(asked) in (2, 5):
            started[-1].kill()
        return answer(self, places)

    monkeypatch.setattr(processes._Processes, "__call__", killing)
    count = len(os.sched_getaffinity(0))
    assert rows(opened(many)) == expected
    assert len(started) > count
    assert all(process.poll() is not None for process in started)


SCRIPT = """
import json, os, signal, sys
for line in sys.stdin:
    places = json.loads(line)
    if any("0100" in place[0] for place in places):
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps([[1, 1, "PNG", ""] for place in places]), flush=True)
"""


def test_an_image_that_crashes_the_decoder_is_a_bad_one(many, monkeypatch, tmp_path):
    (tmp_path / "decode.py").write_text(SCRIPT)
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "processes.py"))
    found = opened(many)
    assert found.valid == 699
    assert (found.path(699), found.fault(699)) == ("class1/0100.png", "kills the decoder")


def test_an_image_whose_process_is_killed_from_outside_is_none(many, monkeypatch, tmp_path):
    """Where memory runs out, the system kills what takes most of it."""
    (tmp_path / "decode.py").write_text(SCRIPT.replace("SIGSEGV", "SIGKILL"))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "__file__", str(tmp_path / "processes.py"))
        patch.setattr(processes, "PAUSES", (0, 0))
        with pytest.raises(MachineError, match=r"1 of 700 .*class1/0100.png: the process .* was ended by SIGKILL"):
            opened(many)
    found = opened(many)
    assert (found.valid, found.decoded) == (700, 1)  # the script takes all for images


# --- DALI's word


dali = pytest.mark.skipif(problem() is not None, reason=f"no DALI: {problem()}")


@dali
def test_dalis_word_is_kept(folder, noise_image, tmp_path, monkeypatch):
    (folder / "cat" / "grey16.png").write_bytes(b"")
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(folder / "cat" / "grey16.png")  # not for DALI
    before, version = opened(folder), dali_version()
    assert [before.dali(k) for k in range(7)] == [""] * 7
    after = try_with_dali(before, version)
    assert rows(after) == rows(before)
    words = {after.path(k): after.dali(k) for k in range(7)}
    assert words.pop("cat/grey16.png") == ""
    assert {*words.values()} == {version}
    # Whoever opens the folder has it; what is new is asked, and nothing else; another version is asked anew.
    noise_image(9, 9).save(folder / "dog" / "new.png")
    again = opened(folder)
    asked = []
    ask = indexing.ask_processes
    monkeypatch.setattr(indexing, "ask_processes", lambda *a: asked.append(len(a[2])) or ask(*a))
    try_with_dali(try_with_dali(again, version), version)
    assert asked == [1]
    assert try_with_dali(opened(folder), "0.1").dali(0) == "0.1"
    assert asked == [1, 7]


@dali
def test_an_image_that_dali_dies_of_is_refused_and_named(folder, monkeypatch, tmp_path):
    script = SCRIPT.replace("0100", "dog/0001").replace('[[1, 1, "PNG", ""] for', "[True for")
    (tmp_path / "decode.py").write_text(script)
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "processes.py"))
    before = opened(folder)
    with pytest.warns(UserWarning, match=r"DALI 7\.8 dies of .*dog/0001\.png"):
        after = try_with_dali(before, "7.8")
    assert {after.path(k): after.dali(k) for k in range(6)} == {
        after.path(k): "-7.8" if after.path(k) == "dog/0001.png" else "7.8" for k in range(6)
    }


@dali
def test_killed_while_dali_is_asked(folder, monkeypatch):
    before = opened(folder)

    def stopping(*args):
        rows = args[2]
        yield rows[:4], [True, True, False, None]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "ask_processes", stopping)
        with pytest.raises(KeyboardInterrupt):
            try_with_dali(before, "7.8")
    asked = []
    monkeypatch.setattr(indexing, "ask_processes", lambda *a: asked.append(list(a[2])) or iter([(a[2], [True] * 3)]))
    after = try_with_dali(opened(folder), "7.8")
    assert asked == [[3, 4, 5]]
    assert [after.dali(k) for k in range(6)] == ["7.8", "7.8", "-7.8", "7.8", "7.8", "7.8"]
    assert rows(after) == rows(before)


def test_processes_that_do_not_start_are_no_verdict(many, monkeypatch, tmp_path):
    (tmp_path / "decode.py").write_text("import no_such_module")
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "processes.py"))
    with pytest.raises(OSError, match=r"do not start: .*No module named 'no_such_module'"):
        opened(many)


def test_the_journal_of_a_whole_manifest_is_removed(folder, tmp_path):
    """Its process was killed right after it wrote the manifest. One that is in use stays."""
    journal = opened(folder, tmp_path / "cache").file.with_suffix(".journal")
    journal.write_bytes(b"")
    with indexing._locked(journal):
        assert opened(folder, tmp_path / "cache").decoded == 0
        assert journal.exists()
    assert opened(folder, tmp_path / "cache").decoded == 0
    assert not journal.exists()
