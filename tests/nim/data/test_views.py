import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms import functional as tv

from denim.nim.data import EvalView, TrainView, keyed_globals, sample_rng

INT64 = st.integers(-(2**63), 2**63 - 1)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


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
def test_views_give_uint8_hwc(view, channels, shape, noise_image):
    out = view(noise_image(*shape, channels), sample_rng(0, 0, 0))
    assert out.dtype == np.uint8
    assert out.shape == (view.size, view.size, channels)


def test_plain_train_view_is_a_bicubic_resize(noise_image):
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


def test_windows_are_pinned():
    """A run resumed with a later release, or on another loader, must see the crops that the first one saw."""
    drawn = [
        TrainView(16).window(300, 200, sample_rng(1, 2, -3)),
        TrainView(16, crop_scale=None).window(300, 200, sample_rng(1, 2, -3)),
        TrainView(224, crop_scale=(0.08, 1.0)).window(500, 375, sample_rng(0, 0, 7)),
        TrainView(8, flip=False).window(300, 6, sample_rng(0, 0, 0)),
    ]
    assert drawn == [(49, 4, 217, 196, True), (0, 0, 300, 200, False), (38, 51, 381, 304, False), (146, 0, 8, 6, False)]
    # Without crop and flip nothing is drawn: the warp that follows has the first words.
    rng = sample_rng(1, 2, -3)
    TrainView(16, crop_scale=None, flip=False).window(300, 200, rng)
    assert rng.random() == sample_rng(1, 2, -3).random()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(300, 431), (70, 200), (18, 20)])
def test_pixels_are_those_of_torchvision_v2_in_the_window(shape, channels, noise_image):
    image = noise_image(*shape, channels)
    flips = set()
    for i in range(8):
        for view in (TrainView(32), TrainView(224, crop_scale=(0.08, 1.0)), TrainView(17, crop_scale=None)):
            left, upper, width, height, flip = view.window(image.width, image.height, sample_rng(0, 1, i))
            assert 0 <= left < left + width <= image.width
            assert 0 <= upper < upper + height <= image.height
            bicubic = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
            expected = v2.functional.resized_crop(image, upper, left, height, width, [view.size] * 2, **bicubic)
            expected = v2.functional.horizontal_flip(expected) if flip else expected
            out = view(image, sample_rng(0, 1, i))
            np.testing.assert_array_equal(out, np.asarray(expected).reshape(out.shape))
            flips.add(flip)
    assert flips == {False, True}


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


@pytest.mark.slow
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


def test_crop_of_an_extreme_shape_is_the_largest_allowed_one_in_the_centre(noise_image):
    image = noise_image(6, 300)
    view = TrainView(8, flip=False)(image, sample_rng(0, 0, 0))
    # Area at least 0.2 * 1800 at ratio at most 4/3 needs 16 rows: no window fits.
    expected = image.crop((146, 0, 154, 6)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(view, np.asarray(expected))


def test_half_of_the_views_are_flipped(noise_image):
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
def test_rand_augment_survives_every_operation(channels, noise_image):
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
def test_eval_view_of_photos_is_the_published_one(size, shape, noise_image):
    image = noise_image(*shape)
    resized = tv.resize(image, round(size * 256 / 224), tv.InterpolationMode.BICUBIC)
    expected = np.asarray(tv.center_crop(resized, [size, size]))
    np.testing.assert_array_equal(EvalView(size)(image, sample_rng(0, 0, 0)), expected)


@pytest.mark.parametrize(("shape", "size"), [((8, 8), 16), ((32, 32), 32), ((64, 64), 48)])
def test_eval_view_of_small_images_is_a_plain_resize(shape, size, noise_image):
    image = noise_image(*shape)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(EvalView(size)(image, sample_rng(0, 0, 0)), expected)


@pytest.mark.parametrize("view", [EvalView(32), EvalView(224), EvalView(33, resize=40)])
@pytest.mark.parametrize("shape", [(300, 431), (431, 300), (64, 64), (8, 12)])
def test_eval_view_geometry_is_what_a_call_does(view, shape, noise_image):
    image = noise_image(*shape)
    width, height, left, upper = view.geometry(image.width, image.height)
    assert min(width, height) >= view.size
    assert (2 * left + view.size - width, 2 * upper + view.size - height) == pytest.approx((0, 0), abs=1)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = resized.crop((left, upper, left + view.size, upper + view.size))
    np.testing.assert_array_equal(view(image, sample_rng(0, 0, 0)), np.asarray(expected))


def test_eval_view_resize(noise_image):
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
