import hashlib
import math
import os
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from denim.nim.data import (
    Batch,
    Digits,
    EvalView,
    ImageFolder,
    Subset,
    TorchLoader,
    TrainView,
    keyed_globals,
    open_source,
    sample_rng,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def noise_image(height, width, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def smooth_image(height=24, width=32):
    """Colours that JPEG keeps within a few levels."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([60 + 4 * x, 200 - 4 * y, 90 + x + y], axis=-1).astype(np.uint8))


def make_folder(root, classes=("cat", "dog"), each=3, splits=("train",)):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(each):
                noise_image(20 + k, 24, seed=100 * label + k).save(folder / f"{k:04d}.png")
    return root


class InMemory:
    """A source with ids all over int64, images of several sizes, and a count of what was read."""

    name, classes, channels, skipped = "in memory", ("a", "b"), 3, ()

    def __init__(self, count=23):
        words = np.random.default_rng(5).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
        words[:4] = np.array([0, -1, -(2**63), 2**63 - 1])[:count]
        self.ids = torch.from_numpy(words)
        self.labels = torch.arange(count) % 2
        self.images = [noise_image(18 + k % 5, 20 + k % 3, seed=k) for k in range(count)]
        self.read_indices = []

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.read_indices.append(index)
        return self.images[index]


@pytest.fixture(scope="module")
def digits():
    return Digits("train"), Digits("test")


# --- digits


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


# --- folders


def test_folder_order_labels_and_layouts(tmp_path):
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


def test_folder_ids_are_hashes_of_the_path_below_the_classes(tmp_path):
    source = ImageFolder(make_folder(tmp_path), "train")
    digest = hashlib.blake2b(b"cat/0000.png", digest_size=8).digest()
    assert source.ids[0].item() == int.from_bytes(digest, "little", signed=True)


def test_folder_ids_stay_when_files_are_added(tmp_path):
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
def damaged(tmp_path):
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
        source = ImageFolder(damaged, "train")
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


def test_oversized_images_are_skipped_without_decoding(tmp_path, monkeypatch):
    make_folder(tmp_path)
    # The limit of Pillow itself: over it a warning, over twice it an error. For us both are bad.
    noise_image(30, 30).save(tmp_path / "train" / "cat" / "over.png")
    noise_image(60, 60).save(tmp_path / "train" / "cat" / "twice.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with pytest.warns(UserWarning, match="2 of 8 images") as caught:
        source = ImageFolder(tmp_path, "train")
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


def test_class_without_a_readable_image(tmp_path):
    make_folder(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "bee" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no readable image for class 'ant', 'bee' in .*bee/0.png: not an image"):
        ImageFolder(tmp_path, "train")


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*absent"):
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
    with pytest.raises(ValueError, match="no data set 'imagenet': expected 'digits' or the path of a folder"):
        open_source("imagenet", "train")


def test_file_that_vanishes_is_named(tmp_path):
    source = ImageFolder(make_folder(tmp_path), "train")
    (tmp_path / "train" / "cat" / "0001.png").unlink()
    with pytest.raises(OSError, match=r"0001\.png was readable at the start and no longer is"):
        source.read(1)


# --- views


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "view",
    [
        TrainView(16),
        TrainView(17, crop_scale=None, flip=False),
        TrainView(16, degrees=15, translate=0.1, zoom=0.1),
        TrainView(32, auto_augment=RAND_AUGMENT),
        EvalView(16),
        EvalView(16, resize=20),
    ],
)
@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (300, 31), (70, 200)])
def test_views_give_uint8_hwc(view, channels, shape):
    out = view(noise_image(*shape, channels), sample_rng(0, 0, 0))
    assert out.dtype == np.uint8
    assert out.shape == (view.size, view.size, channels)


def test_plain_train_view_is_a_bicubic_resize():
    image = noise_image(40, 50)
    view = TrainView(20, crop_scale=None, flip=False)(image, sample_rng(0, 0, 0))
    np.testing.assert_array_equal(view, np.asarray(tv.resize(image, [20, 20], tv.InterpolationMode.BICUBIC)))


@given(seeds=st.tuples(INT64, INT64, INT64), other=st.tuples(INT64, INT64, INT64))
def test_sample_rng_is_a_function_of_seed_epoch_and_id(seeds, other):
    first = sample_rng(*seeds).random(8)
    np.testing.assert_array_equal(first, sample_rng(*seeds).random(8))
    if seeds != other:
        # Keys and counters are distinct whole integers, so eight equal doubles would be a broken derivation.
        assert (first != sample_rng(*other).random(8)).any()


def test_sample_rng_is_pinned():
    """A resumed run and a later release must see the views that the first one saw."""
    raw = sample_rng(1, 2, -3).bit_generator.random_raw(2)
    # Philox-4x64 under key (seed, id) at counter (1, 0, 0, epoch): NumPy counts up before the first block.
    state = np.random.Philox(key=np.array([1, 2**64 - 3], dtype=np.uint64)).state
    state["state"]["counter"] = np.array([0, 0, 0, 2], dtype=np.uint64)
    reference = np.random.Philox()
    reference.state = state
    np.testing.assert_array_equal(raw, reference.random_raw(2))
    assert [int(word) for word in raw] == [12730863038193768852, 11883492434647647337]


def recovered_windows(view, count, side):
    """Widths, heights and left edges of the crops, in source pixels, read off a picture of its own coordinates."""
    ramp = (np.arange(side) * (255 / (side - 1))).round().astype(np.uint8)
    across = Image.fromarray(np.tile(ramp, (side, 1)))
    down = Image.fromarray(np.tile(ramp[:, None], (1, side)))
    a, b = view.size // 4, 3 * view.size // 4  # away from the edges, where the filter of a resize is cut off
    windows = []
    for i in range(count):
        x = view(across, sample_rng(0, 0, i))[view.size // 2, :, 0].astype(float) * (side - 1) / 255
        y = view(down, sample_rng(0, 0, i))[:, view.size // 2, 0].astype(float) * (side - 1) / 255
        width, height = (x[b] - x[a]) / (b - a) * view.size, (y[b] - y[a]) / (b - a) * view.size
        windows.append((width, height, x[a] + 0.5 - (a + 0.5) * width / view.size))
    return np.array(windows).T


def test_square_crops_have_uniform_area_and_position():
    side = 256
    width, height, left = recovered_windows(TrainView(32, crop_ratio=(1.0, 1.0), flip=False), 800, side)
    # One level of the ramp is one pixel, two roundings over half of the window: 2 levels each way, doubled.
    assert np.abs(width - height).max() <= 4
    # With ratio 1 no window is rejected, so area / image area is exactly U(0.2, 1). The draws are fixed, so this passes
    # or fails for good; 1e-3 is the chance that a correct sampler had of failing when the seed was chosen.
    assert stats.kstest(width * height / side**2, stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    roomy = side - width > 40  # else the error of a pixel or two in `left` shows
    assert stats.kstest((left / (side - width).clip(1))[roomy], stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_crops_follow_torchvision():
    side = 256
    width, height, _ = recovered_windows(TrainView(32, crop_scale=(0.2, 1.0), flip=False), 4000, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = Image.new("L", (side, side))
        params = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(20000)]
    _, _, h, w = np.array(params).T
    assert stats.ks_2samp(width * height, w * h).pvalue > 1e-3
    assert stats.ks_2samp(width / height, w / h).pvalue > 1e-3


def test_crop_of_an_extreme_shape_is_the_largest_allowed_one_in_the_centre():
    image = noise_image(6, 300)
    view = TrainView(8, flip=False)(image, sample_rng(0, 0, 0))
    # Area at least 0.2 * 1800 at ratio at most 4/3 needs 16 rows: no window fits.
    expected = image.crop((146, 0, 154, 6)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(view, np.asarray(expected))


def test_half_of_the_views_are_flipped():
    image = noise_image(8, 8)
    view = TrainView(8, crop_scale=None)
    upright = np.asarray(image)
    flipped = 0
    for i in range(400):
        out = view(image, sample_rng(3, 1, i))
        mirrored = np.array_equal(out, upright[:, ::-1])
        assert mirrored or np.array_equal(out, upright)
        flipped += mirrored
    # Exact binomial test of fixed draws, as above.
    assert stats.binomtest(flipped, 400).pvalue > 1e-3


def blob(size, x, y, radius=3.0):
    """A soft dot with its centre at (x, y) in pixel coordinates (pixel k covers k to k + 1)."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    return 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))


def moments(pixels):
    """Mass, centre x and centre y."""
    pixels = pixels.astype(float)
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    mass = pixels.sum()
    return mass, (pixels * columns).sum() / mass, (pixels * rows).sum() / mass


def warped(size=64, count=200, x=44.0, y=32.0, **options):
    image = Image.fromarray(blob(size, x, y).round().astype(np.uint8))
    view = TrainView(size, crop_scale=None, flip=False, **options)
    return np.array([moments(view(image, sample_rng(0, 0, i))[:, :, 0]) for i in range(count)])


# Bilinear resampling and 8-bit rounding shift the centre of a dot of radius 3 by far less than this (measured 0.02);
# the motions asked for are pixels.
CENTRE_ERROR = 0.1


def test_warp_rotates_about_the_centre():
    centre = warped(degrees=30)[:, 1:] - 32
    np.testing.assert_allclose(np.hypot(*centre.T), 12, atol=CENTRE_ERROR)
    angles = np.degrees(np.arctan2(centre[:, 1], centre[:, 0]))
    assert stats.kstest(angles, stats.uniform(-30, 60).cdf).pvalue > 1e-3


def test_warp_translates_in_both_directions():
    shift = warped(translate=0.125, x=32.0)[:, 1:] - 32
    for along in shift.T:
        assert np.abs(along).max() <= 8 + CENTRE_ERROR
        assert stats.kstest(along, stats.uniform(-8, 16).cdf).pvalue > 1e-3
    assert abs(stats.pearsonr(*shift.T).statistic) < 4 / math.sqrt(len(shift))  # four standard errors


def test_warp_zooms_about_the_centre():
    mass, x, y = warped(zoom=0.25).T
    zoom = (x - 32) / 12
    np.testing.assert_allclose(y, 32, atol=CENTRE_ERROR)
    # An inverse zoom would reach 1 / 0.75 = 1.33.
    assert abs(zoom - 1).max() <= 0.25 + CENTRE_ERROR / 12
    assert stats.kstest(zoom, stats.uniform(0.75, 0.5).cdf).pvalue > 1e-3
    # The area of the dot goes with the square. 2 %: rounding to 8 bits in the tails of the dot.
    np.testing.assert_allclose(mass / moments(blob(64, 44, 32))[0], zoom**2, rtol=0.02)


def test_warp_fills_with_black():
    view = TrainView(16, crop_scale=None, flip=False, translate=0.5)
    views = [view(Image.new("RGB", (16, 16), "white"), sample_rng(0, 0, i)) for i in range(20)]
    assert all(set(np.unique(out)) <= {0, 255} for out in views)
    assert any((out == 0).any() for out in views)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_survives_every_operation(channels):
    """Full magnitude asks for 0 bits of posterisation, which Pillow refuses: the published policy gets there."""
    image = noise_image(16, 16, channels)
    view = TrainView(16, crop_scale=None, flip=False, auto_augment="rand-m10-n3-inc1")
    black = 0
    for i in range(300):
        out = view(image, sample_rng(0, 0, i))
        np.testing.assert_array_equal(out, view(image, sample_rng(0, 0, i)))
        black += out.max() == 0
    # Three of 15 operations, each applied half the time; posterised to 0 bits last but for what keeps black black.
    assert black > 0


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(300, 431), (431, 300), (257, 256), (100, 65)])
def test_eval_view_of_photos_is_the_published_one(size, shape):
    image = noise_image(*shape)
    resized = tv.resize(image, round(size * 256 / 224), tv.InterpolationMode.BICUBIC)
    expected = np.asarray(tv.center_crop(resized, [size, size]))
    np.testing.assert_array_equal(EvalView(size)(image, sample_rng(0, 0, 0)), expected)


@pytest.mark.parametrize(("shape", "size"), [((8, 8), 16), ((32, 32), 32), ((64, 64), 48)])
def test_eval_view_of_small_images_is_a_plain_resize(shape, size):
    image = noise_image(*shape)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(EvalView(size)(image, sample_rng(0, 0, 0)), expected)


def test_eval_view_resize():
    image = noise_image(90, 120)
    expected = np.asarray(tv.center_crop(tv.resize(image, 40, tv.InterpolationMode.BICUBIC), [33, 33]))
    np.testing.assert_array_equal(EvalView(33, resize=40)(image, sample_rng(0, 0, 0)), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainView(0), "size must be at least 1"),
        (lambda: TrainView(16, crop_scale=(0.0, 1.0)), r"crop_scale .* got \(0.0, 1.0\)"),
        (lambda: TrainView(16, crop_scale=(0.5, 1.5)), "crop_scale"),
        (lambda: TrainView(16, crop_ratio=(2.0, 1.0)), "crop_ratio"),
        (lambda: TrainView(16, degrees=-1), r"degrees must be in \[0, 180\], got -1"),
        (lambda: TrainView(16, translate=math.nan), "translate must be in"),
        (lambda: TrainView(16, zoom=1.0), "zoom must be in"),
        (lambda: TrainView(16, auto_augment="original"), "auto_augment must be a RandAugment policy .* 'original'"),
        (lambda: EvalView(16, resize=15), "resize must be at least size = 16, got 15"),
    ],
)
def test_view_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(INT64)
def test_keyed_globals_are_keyed_and_restored(seed):
    def draw():
        return random.random(), *np.random.random(3), np.random.normal()  # noqa: NPY002

    def inside():
        with keyed_globals(seed):
            return draw()

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    first = inside()
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002
    draw()
    assert inside() == first
    for bit in (1, 1 << 62):
        with keyed_globals(seed ^ bit):
            other = draw()
        assert all(a != b for a, b in zip(first, other, strict=True))


def test_keyed_globals_tell_the_sign_of_a_seed():
    draws = []
    for seed in (5, -5):  # Python's own seed() takes the absolute value
        with keyed_globals(seed):
            draws.append(random.random())
    assert draws[0] != draws[1]


def test_keyed_globals_restore_after_an_error():
    python = random.getstate()
    with pytest.raises(RuntimeError), keyed_globals(0):
        raise RuntimeError
    assert random.getstate() == python


# --- loader


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


def test_batches():
    source = InMemory(23)
    batches = list(TorchLoader(source, VIEW, 5).epoch(0))
    assert len(batches) == TorchLoader(source, VIEW, 5).steps_per_epoch == 4
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((5, 16, 16, 3), torch.uint8)
        assert (batch.labels.shape, batch.labels.dtype) == ((5,), torch.int64)
        assert (batch.ids.shape, batch.ids.dtype) == ((5,), torch.int64)
        assert batch.images.is_contiguous()
    loader = TorchLoader(source, VIEW, 5, drop_last=False)
    assert loader.steps_per_epoch == 5
    seen, _ = by_id(loader, 0)
    assert {i: label for i, (label, _) in seen.items()} == dict(
        zip(source.ids.tolist(), source.labels.tolist(), strict=True)
    )
    moved = batches[0].to("meta")
    assert isinstance(moved, Batch)
    assert {moved.images.device.type, moved.labels.device.type, moved.ids.device.type} == {"meta"}


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
def test_view_depends_on_seed_epoch_and_id_alone(seed, epoch, batch_size, shuffle, share):
    source = InMemory(23)
    expected = {
        i: (label, VIEW(source.images[k], sample_rng(seed, epoch, i)).tobytes())
        for k, (i, label) in enumerate(zip(source.ids.tolist(), source.labels.tolist(), strict=True))
    }
    loader = TorchLoader(source, VIEW, batch_size, seed=seed, shuffle=shuffle, drop_last=False)
    start = round(share * loader.steps_per_epoch)
    seen, order = by_id(loader, epoch, start)
    # Nothing before the start is decoded, nothing is decoded twice.
    assert len(source.read_indices) == len(order) == max(0, 23 - start * batch_size)
    assert all(expected[i] == value for i, value in seen.items())
    # The order of a resumed epoch is the rest of the order of a whole one, whatever the batch size.
    _, whole = by_id(TorchLoader(source, EvalView(1), 23, seed=seed, shuffle=shuffle), epoch)
    assert order == whole[start * batch_size :]


@pytest.mark.parametrize("start_step", [0, 3])
def test_workers_change_nothing(start_step):
    source = InMemory(23)
    here = list(TorchLoader(source, VIEW, 4, seed=9).epoch(2, start_step))
    there = list(TorchLoader(source, VIEW, 4, seed=9, workers=2).epoch(2, start_step))
    assert len(here) == len(there) == 5 - start_step
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.ids, b.ids)


def test_augmentation_changes_with_epoch_and_seed():
    source = InMemory(8)
    views = [by_id(TorchLoader(source, VIEW, 8, seed=seed), epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i in source.ids.tolist():
        assert len({view[i] for view in views}) == 3


def test_order_is_a_uniform_permutation_of_seed_and_epoch():
    source = InMemory(4)
    orders = Counter()
    for seed in range(10):
        for epoch in range(240):
            _, order = by_id(TorchLoader(source, EvalView(1), 4, seed=seed), epoch)
            orders[tuple(order)] += 1
    assert len(orders) == 24
    # Chi-square over the 24 permutations, fixed draws as above.
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_order_is_pinned():
    """A run resumed with a later release must go on in the order in which it began."""
    source = InMemory(10)
    _, order = by_id(TorchLoader(source, EvalView(1), 10, seed=-7), 3)
    assert [source.ids.tolist().index(i) for i in order] == [8, 7, 0, 1, 2, 3, 6, 4, 9, 5]


def test_unshuffled_order_is_that_of_the_source():
    source = InMemory(10)
    for epoch in (0, 1):
        assert (
            by_id(TorchLoader(source, EvalView(8), 4, shuffle=False, drop_last=False), epoch)[1] == source.ids.tolist()
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_untouched(workers):
    torch_state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    list(TorchLoader(InMemory(9), VIEW, 4, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002


def test_loader_errors(digits):
    with pytest.raises(ValueError, match="has 600 images, less than one batch of 601, and drop_last"):
        TorchLoader(digits[1], EvalView(16), 601)
    assert TorchLoader(digits[1], EvalView(16), 601, drop_last=False).steps_per_epoch == 1
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TorchLoader(digits[1], EvalView(16), 0)
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        TorchLoader(digits[1], EvalView(16), 4, workers=-1)
    with pytest.raises(ValueError, match="in memory has no images"):
        TorchLoader(InMemory(0), EvalView(16), 4, drop_last=False)
    loader = TorchLoader(digits[1], EvalView(16), 100)
    assert list(loader.epoch(0, 6)) == []
    for start in (-1, 7):
        with pytest.raises(ValueError, match=rf"start_step must be in 0..6, got {start}"):
            loader.epoch(0, start)


# --- a real data set


def test_cifar10_jpegs_load(tmp_path):
    archive = Path(os.environ.get("DENIM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "cifar10_jpeg.tar.xz"
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


def test_a_subset_is_a_fixed_random_part():
    whole = Digits("test")
    part = Subset(whole, 50, seed=3)
    assert len(part) == 50
    assert len(set(part.ids.tolist())) == 50
    places = {sample_id: index for index, sample_id in enumerate(whole.ids.tolist())}
    for index in range(50):
        place = places[int(part.ids[index])]
        assert part.labels[index] == whole.labels[place]
        assert part.read(index).tobytes() == whole.read(place).tobytes()
    assert torch.equal(part.ids, Subset(whole, 50, seed=3).ids)
    assert torch.equal(part.ids[:20], Subset(whole, 20, seed=3).ids)  # a smaller one is the beginning of a larger
    assert not torch.equal(part.ids, Subset(whole, 50, seed=4).ids)
    assert len(set(part.labels[:12].tolist())) > 3  # not in the order of the classes


@pytest.mark.parametrize("count", [0, 601])
def test_a_subset_is_no_larger_than_its_source(count):
    with pytest.raises(ValueError, match="1 to 600 images"):
        Subset(Digits("test"), count)
