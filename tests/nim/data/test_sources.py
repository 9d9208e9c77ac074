import hashlib
import pickle
import tarfile
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from denim.nim.data import Digits, EncodedSource, ImageFolder, Subset, hold_out, indexing, open_source
from denim.nim.data.listing import sample_id


def smooth_image(height=24, width=32):
    """Colours that JPEG keeps within a few levels."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([60 + 4 * x, 200 - 4 * y, 90 + x + y], axis=-1).astype(np.uint8))


def test_digits_split_is_fixed_disjoint_and_stratified(digits):
    train, test = digits
    assert (len(train), len(test)) == (1197, 600)
    assert sorted(train.ids.tolist() + test.ids.tolist()) == list(range(1797))
    full = torch.cat([train.labels, test.labels]).bincount()
    # Stratified: every class within one image of its exact share.
    assert (test.labels.bincount() - full * 600 / 1797).abs().max() < 1
    # Results are comparable between versions only if nobody changes the split.
    assert hashlib.sha256(test.ids.numpy().tobytes()).hexdigest()[:16] == "5e3a7a586544e588"


def test_digits_images_are_the_full_set_at_pixel_levels(digits):
    from sklearn.datasets import load_digits

    full = load_digits()
    for source in digits:
        assert source.channels == 1
        assert source.classes == tuple("0123456789")
        for index in (0, 7, len(source) - 1):
            image, original = source.read(index), source.ids[index].item()
            assert (image.mode, image.size) == ("L", (8, 8))
            assert source.labels[index] == full.target[original]
            np.testing.assert_array_equal(np.asarray(image), np.rint(full.images[original] / 16 * 255))


def test_digits_errors():
    with pytest.raises(ValueError, match=r"'train' and 'test', got 'val'"):
        Digits("val")
    with pytest.raises(ValueError, match="digits has one channel, got channels=3"):
        open_source("digits", "train", channels=3)


def test_folder_order_labels_and_layouts(tmp_path, noise_image, make_folder):
    make_folder(tmp_path / "data", classes=("dog", "cat", "ant"), splits=("train", "test"))
    nested = tmp_path / "data" / "train" / "cat" / "more"
    nested.mkdir()
    noise_image(9, 9, seed=77).save(nested / "deep.BMP")
    (tmp_path / "data" / "train" / "cat" / "notes.txt").write_text("not an image, and not meant as one")
    (tmp_path / "data" / "train" / ".cache").mkdir()

    source = open_source(tmp_path / "data", "train")
    assert source.name == "data/train"
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels.dtype == source.ids.dtype == torch.int64
    assert source.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert source.skipped == ()
    assert source.read(6).tobytes() == noise_image(9, 9, seed=77).tobytes()
    assert len(set(source.ids.tolist())) == len(source) == 10

    # Without split folders the root holds the classes, and every split is the whole set.
    bare = open_source(str(tmp_path / "data" / "train"), "test")
    assert bare.name == "train"
    assert bare.ids.tolist() == source.ids.tolist()


def test_folder_ids_are_hashes_of_the_path_below_the_classes(tmp_path, make_folder):
    source = ImageFolder(make_folder(tmp_path), "train")
    digest = hashlib.blake2b(b"cat/0000.png", digest_size=8).digest()
    assert source.ids[0].item() == int.from_bytes(digest, "little", signed=True)


def test_folder_ids_stay_when_files_are_added(tmp_path, noise_image, make_folder):
    before = ImageFolder(make_folder(tmp_path), "train")
    for name in ("ant", "cat"):
        (tmp_path / "train" / name).mkdir(exist_ok=True)
        noise_image(8, 8).save(tmp_path / "train" / name / "0000a.png")
    after = ImageFolder(tmp_path, "train")
    assert len(after) == len(before) + 2
    pixels = {i: after.read(k).tobytes() for k, i in enumerate(after.ids.tolist())}
    for k, i in enumerate(before.ids.tolist()):
        assert pixels[i] == before.read(k).tobytes()


def test_conversions(tmp_path):
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    rgb = smooth_image()
    # EXIF orientation 6: the stored picture has to be turned 90 degrees clockwise to stand upright.
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.transpose(Image.Transpose.ROTATE_90).save(folder / "exif.png", exif=exif)
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    alpha.save(folder / "alpha.png")
    palette = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 7).convert("P")
    palette.putpalette([k * 11 % 256 for k in range(768)])
    palette.save(folder / "palette.png", transparency=bytes([0, 128, 255] * 3))
    sixteen = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    rgb.convert("1").save(folder / "two_levels.png")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source, grey = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "train", channels=1)
    names = sorted(path.name for path in folder.iterdir())
    images = {name: source.read(k) for k, name in enumerate(names)}
    assert {(image.mode, image.size) for image in images.values()} == {("RGB", (32, 24))}
    assert {(grey.read(k).mode, grey.read(k).size) for k in range(len(grey))} == {("L", (32, 24))}

    def worst(name, expected):
        return np.abs(np.asarray(images[name], dtype=int) - np.asarray(expected, dtype=int)).max()

    assert worst("exif.png", rgb) == 0
    assert worst("alpha.png", rgb) == 0
    assert worst("grey.png", np.asarray(rgb.convert("L"))[:, :, None]) == 0
    assert worst("palette.png", palette.convert("RGB")) == 0
    assert worst("sixteen.png", (sixteen >> 8)[:, :, None]) == 0
    # Quality 100 without chroma subsampling: a level or two of rounding per colour conversion; an inverted CMYK image,
    # the classic mistake, is off by over 100.
    assert worst("cmyk.jpg", rgb) <= 4


@pytest.fixture
def damaged(tmp_path, noise_image, make_folder):
    """Good images, and one of every kind of bad one."""
    folder = make_folder(tmp_path) / "train" / "dog"
    noise_image(64, 64).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(folder / "float.tif")
    # Pillow would hand PostScript to Ghostscript, whatever the file is called.
    (folder / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return tmp_path


def test_corrupt_images_are_named_skipped_and_counted(damaged):
    with pytest.warns(UserWarning, match="5 of 11 images below .* cannot be read and are left out") as caught:
        source = ImageFolder(damaged, "train", max_bad=0.5)
    assert len(caught) == 1
    assert len(source) == len(source.ids) == len(source.labels) == 6
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    bad = {Path(entry.split(": ")[0]).name: entry.split(": ", 1)[1] for entry in source.skipped}
    assert set(bad) == {"truncated.jpg", "page.jpg", "empty.png", "float.tif", "script.jpg"}
    assert "truncated" in bad["truncated.jpg"]
    assert bad["page.jpg"] == bad["empty.png"] == bad["script.jpg"] == "not an image in a known format"
    assert "no defined range" in bad["float.tif"]
    for name in bad:
        assert name in str(caught[0].message)
    for index in range(len(source)):
        assert source.read(index).mode == "RGB"
        assert Path(source.where(index)).exists()


def test_more_bad_images_than_allowed(damaged):
    message = r"5 of 11 images .* more than max_bad = 40.00% of them: .*truncated.*`denim data check .*train`"
    with pytest.raises(ValueError, match=message):
        open_source(damaged, "train", max_bad=0.4)
    with pytest.raises(ValueError, match=r"more than max_bad = 1.00%"):
        open_source(damaged, "train")
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        open_source(damaged, "train", max_bad=1.5)


def test_oversized_images_are_skipped_without_decoding(tmp_path, monkeypatch, noise_image, make_folder):
    make_folder(tmp_path)
    # The limit of Pillow itself: over it a warning, over twice it an error. For us both are bad.
    noise_image(30, 30).save(tmp_path / "train" / "cat" / "over.png")
    noise_image(60, 60).save(tmp_path / "train" / "cat" / "twice.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with pytest.warns(UserWarning, match="2 of 8 images") as caught:
        source = ImageFolder(tmp_path, "train", max_bad=0.3)
    assert len(caught) == 1
    assert len(source) == 6
    assert all("exceeds limit of" in entry for entry in source.skipped)


def test_only_corrupt_images(tmp_path):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for k in range(8):
        (folder / f"{k}.jpg").write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"none of the 8 images .*0\.jpg: not an image in a known format; .*4\.jpg: .*; and 3 more"
    ):
        ImageFolder(tmp_path, "train")


def test_class_without_a_readable_image(tmp_path, make_folder):
    make_folder(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "bee" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no readable image for class 'ant', 'bee' in .*bee/0.png: not an image"):
        ImageFolder(tmp_path, "train")
    with pytest.warns(UserWarning, match="1 of 7 images"):
        pretraining = ImageFolder(tmp_path, "train", labelled=False, max_bad=0.2)  # takes no notice of classes
    assert len(pretraining) == 6


def test_folder_errors(tmp_path, noise_image, make_folder):
    with pytest.raises(ValueError, match=r"no data set '.*absent'"):
        ImageFolder(tmp_path / "absent", "train")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        ImageFolder(tmp_path / "file", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty: expected <split>/<class>/<image>"):
        ImageFolder(tmp_path / "empty", "train")
    (tmp_path / "flat").mkdir()
    noise_image(8, 8).save(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="no class folders in"):
        ImageFolder(tmp_path / "flat", "train")
    (tmp_path / "texts" / "cat").mkdir(parents=True)
    (tmp_path / "texts" / "cat" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no images below .*: expected files ending in .*\.jpg"):
        ImageFolder(tmp_path / "texts", "train")
    make_folder(tmp_path / "data", splits=("train", "val"))
    with pytest.raises(ValueError, match="has no split 'test', it has 'train', 'val'"):
        ImageFolder(tmp_path / "data", "test")
    with pytest.raises(ValueError, match=r"channels must be 1 .* or 3 .*, got 4"):
        ImageFolder(tmp_path / "data", "train", channels=4)
    with pytest.raises(ValueError, match="no data set 'imagenet': expected 'digits', 'cifar10', 'cifar100' or"):
        open_source("imagenet", "train")


def test_file_that_vanishes_is_named(tmp_path, make_folder):
    source = ImageFolder(make_folder(tmp_path), "train")
    (tmp_path / "train" / "cat" / "0001.png").unlink()
    for read in (source.read, source.encoded):
        with pytest.raises(OSError, match=r"0001\.png was readable at the start and no longer is: No such file"):
            read(1)


def test_sizes_are_those_of_the_upright_images(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    exif = Image.Exif()
    for orientation in range(9):  # 0 is undefined, 1 upright; 5 to 8 swap the sides
        exif[0x0112] = orientation
        smooth_image(24, 32).save(folder / f"{orientation}.jpg", exif=exif)
        smooth_image(24, 32).save(folder / f"{orientation}.png", exif=exif)
    source = ImageFolder(tmp_path, "train")
    assert (source.sizes.dtype, source.sizes.shape) == (torch.int32, (18, 2))
    assert [source.read(k).size for k in range(18)] == list(map(tuple, source.sizes.tolist()))
    assert set(map(tuple, source.sizes.tolist())) == {(32, 24), (24, 32)}


def test_encoded_images_are_the_files_and_formats_go_by_content(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    formats = {"a.png": "JPEG", "b.jpg": "PNG", "c.jpg": "GIF", "d.tif": "WEBP", "e.jpg": "BMP", "f.bmp": "TIFF"}
    formats |= {"g.jpg": "PPM", "h.jpg": "JPEG"}
    for name, kind in formats.items():
        smooth_image().save(folder / name, format=kind)
    # What some cameras write: a second picture behind the first, which is what counts.
    smooth_image(9, 9).save(folder / "h.jpg", format="MPO", save_all=True, append_images=[smooth_image(5, 5)])
    source = ImageFolder(tmp_path, "train")
    assert isinstance(source, EncodedSource)
    assert [source.image_format(k) for k in range(len(source))] == list(formats.values())
    assert [source.encoded(k) for k in range(len(source))] == [(folder / name).read_bytes() for name in formats]
    assert source.read(7).size == (9, 9)


def test_flat_folders_need_no_labels(tmp_path, noise_image, make_folder):
    for k in range(3):
        noise_image(8, 8, seed=k).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="no class folders"):
        open_source(tmp_path, "train")
    source = open_source(tmp_path, "train", labelled=False)
    assert source.classes == ("",)
    assert source.labels.tolist() == [0, 0, 0]
    assert source.ids[2] == sample_id("2.png")
    # Images beside folders: all of them count, whatever the folders mean.
    make_folder(tmp_path, splits=("more",))
    source = open_source(tmp_path, "train", labelled=False)
    assert (len(source), source.classes) == (9, ("",))
    assert source.ids[3] == sample_id("more/cat/0000.png")


def test_class_folders_stay_classes_without_labels(tmp_path, make_folder):
    plain = open_source(make_folder(tmp_path), "train")
    unlabelled = open_source(tmp_path, "train", labelled=False)
    assert unlabelled.classes == plain.classes
    assert torch.equal(unlabelled.ids, plain.ids)
    assert torch.equal(unlabelled.labels, plain.labels)


def test_a_class_without_images_is_noticed_at_a_second_opening(tmp_path, make_folder):
    ImageFolder(make_folder(tmp_path), "train")
    (tmp_path / "train" / "zebra").mkdir()
    with pytest.raises(ValueError, match="no readable image for class 'zebra'"):
        ImageFolder(tmp_path, "train")


def test_a_second_opening_decodes_nothing(tmp_path, monkeypatch, make_folder):
    first = ImageFolder(make_folder(tmp_path), "train")
    monkeypatch.setattr(indexing, "judge_all", None)
    second = ImageFolder(tmp_path, "train")
    for name in ("ids", "labels", "sizes"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert ImageFolder(tmp_path / "train", "any").ids.tolist() == first.ids.tolist()


def test_sources_in_memory_have_sizes_and_places(digits):
    for source in digits:
        assert source.sizes.tolist() == [[8, 8]] * len(source)
        assert source.sizes.dtype == torch.int32
        assert not isinstance(source, EncodedSource)
    assert digits[1].where(7) == "digits/test:7"


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """torchvision's CIFAR-10, its archive replaced by one of four training images and two test images."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(chosen):
        return {"data": pixels[chosen].reshape(-1, 3072), "labels": [k % 2 for k in range(6)][chosen]}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(slice(4)))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(slice(4, 6)))])
    name, digest = write("batches.meta", {"label_names": ["plane", "car"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    archive = tmp_path / "served" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "*")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=archive.parent)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield archive, pixels.transpose(0, 2, 3, 1)
        server.shutdown()


def test_cifar_is_downloaded_once(tiny_cifar, tmp_path, monkeypatch):
    archive, pixels = tiny_cifar
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = open_source("cifar10", "train")
    archive.unlink()
    test = open_source("cifar10", "test")
    assert (tmp_path / "cache" / "denim" / archive.name).exists()
    assert (train.name, train.classes, train.channels) == ("cifar10/train", ("plane", "car"), 3)
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.ids.tolist() == [0, 1, 2, 3]
    assert test.ids.tolist() == [50_000, 50_001]
    assert test.sizes.tolist() == [[32, 32]] * 2
    for k in range(4):
        np.testing.assert_array_equal(np.asarray(train.read(k)), pixels[k])
    grey = open_source("cifar10", "test", channels=1)
    np.testing.assert_array_equal(np.asarray(grey.read(1)), np.asarray(Image.fromarray(pixels[5]).convert("L")))
    assert (grey.channels, grey.read(0).mode) == (1, "L")
    with pytest.raises(ValueError, match="cifar10 has the splits 'train' and 'test', got 'val'"):
        open_source("cifar10", "val")


@pytest.mark.parametrize("damage", ["absent", "corrupt"])
def test_cifar_without_internet_says_what_to_do(tiny_cifar, tmp_path, damage):
    archive, _ = tiny_cifar
    if damage == "absent":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[:-9])
    message = r"cifar10 is not in .*cache and cannot be downloaded from http:.* put cifar-10-python.tar.gz into .*cache"
    with pytest.raises(OSError, match=message) as caught:
        open_source("cifar10", "train", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_subset_is_a_fixed_random_part():
    whole = Digits("test")
    part = Subset(whole, 50, seed=3)
    assert len(part) == 50
    assert len(set(part.ids.tolist())) == 50
    places = {sample_id: index for index, sample_id in enumerate(whole.ids.tolist())}
    for index in range(50):
        place = places[int(part.ids[index])]
        assert part.labels[index] == whole.labels[place]
        assert part.where(index) == whole.where(place)
        assert part.sizes[index].tolist() == whole.sizes[place].tolist()
        assert part.read(index).tobytes() == whole.read(place).tobytes()
    assert torch.equal(part.ids, Subset(whole, 50, seed=3).ids)
    assert torch.equal(part.ids[:20], Subset(whole, 20, seed=3).ids)  # a smaller one is the beginning of a larger
    assert not torch.equal(part.ids, Subset(whole, 50, seed=4).ids)
    assert len(set(part.labels[:12].tolist())) > 3  # not in the order of the classes


def test_a_subset_of_encoded_images_is_one(damaged):
    with pytest.warns(UserWarning, match="left out"):
        whole = ImageFolder(damaged, "train", max_bad=1)
    part = Subset(whole, 4)
    assert isinstance(part, EncodedSource)
    assert not isinstance(Subset(Digits("test"), 4), EncodedSource)
    copy = pickle.loads(pickle.dumps(part))  # as workers that are not forked get it
    for k in range(4):
        assert part.encoded(k) == copy.encoded(k) == Path(part.where(k)).read_bytes()
        assert part.plain_length(k) == copy.plain_length(k) == len(part.encoded(k))
    # What was left out of the whole would look like a large share of a small part.
    assert part.skipped == ()


@pytest.mark.parametrize("count", [0, 601])
def test_a_subset_is_no_larger_than_its_source(count):
    with pytest.raises(ValueError, match="1 to 600 images"):
        Subset(Digits("test"), count)


def test_what_is_held_out_depends_on_id_and_seed_alone(in_memory):
    whole = Digits("train")
    rest, held = hold_out(whole, 0.2, seed=3)
    assert sorted(rest.ids.tolist() + held.ids.tolist()) == sorted(whole.ids.tolist())
    # A binomial of 1197 draws, five standard deviations to each side.
    assert abs(len(held) - 0.2 * 1197) < 5 * (1197 * 0.2 * 0.8) ** 0.5
    assert held.name == "digits/train, held out"
    places = {sample_id: index for index, sample_id in enumerate(whole.ids.tolist())}
    place = places[int(held.ids[5])]
    assert (held.where(5), held.labels[5]) == (whole.where(place), whole.labels[place])
    assert held.read(5).tobytes() == whole.read(place).tobytes()
    # The same images of a part of the source, and of a larger share: nobody changes sides.
    _, of_half = hold_out(Subset(whole, 600), 0.2, seed=3)
    assert set(of_half.ids.tolist()) <= set(held.ids.tolist())
    assert set(held.ids.tolist()) < set(hold_out(whole, 0.3, seed=3)[1].ids.tolist())
    assert set(held.ids.tolist()) != set(hold_out(whole, 0.2, seed=4)[1].ids.tolist())
    assert sum(map(len, hold_out(in_memory(), 0.5))) == 23  # ids all over int64


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, "between 0 and 1, got 0"),
        (float("nan"), "between 0 and 1, got nan"),
        (1e-9, "1e-09 of the 600 images of digits/test holds out none"),
        (0.99999, "10 of 10 classes have no image left to train on: '0', '1'"),
    ],
)
def test_shares_that_cannot_be_held_out(share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Digits("test"), share)
