"""One decoder decides: both loaders see its picture in every file of a corpus of odd ones."""

import io
import itertools
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms

from denim.cli import denoise
from denim.nim import Autoencoder
from denim.nim.autoencoder import preset
from denim.nim.data import EvalView, TorchLoader, TrainView, open_source, sample_rng
from denim.nim.data.dali_loader import DaliLoader, problem
from denim.nim.data.decode import Place, decode, judge, read_image

WIDTH, HEIGHT = 73, 51


def smooth(mode="RGB", seed=0, size=(WIDTH, HEIGHT)):
    """Slowly changing colours: two decoders of one picture agree within rounding, of two pictures nowhere."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return image.resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def segments(jpeg, *bodies, marker=0xE1):
    """With these segments right after the start."""
    return jpeg[:2] + b"".join(segment(marker, body) for body in bodies) + jpeg[2:]


def tiff(*entries, order="<"):
    """An EXIF block with these (tag, kind, count, value of 4 bytes) in its first directory."""
    rows = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + rows + bytes(4)


def turned(number, order="<", kind=3, count=1):
    """An EXIF block with an orientation."""
    value = {3: f"{order}HH", 4: f"{order}I", 1: f"{order}BBH"}[kind]
    body = struct.pack(value, *([number] + [0] * (len(value) - 2)))
    return tiff((0x112, kind, count, body), order=order)


def xmp(number, element=False):
    said = f"<tiff:Orientation>{number}</tiff:Orientation>" if element else ""
    attribute = "" if element else f' tiff:Orientation="{number}"'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{said}</rdf:Description></rdf:RDF>'
        "</x:xmpmeta>"
    ).encode()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def chunks(png, *parts, after=False):
    """With these chunks before the pixels, or after them."""
    place = png.index(b"IEND" if after else b"IDAT") - 4
    return png[:place] + b"".join(chunk(*part) for part in parts) + png[place:]


def raw_png(depth, colour, rows, *parts):
    """A PNG of packed rows, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = [chunk(b"IHDR", header), *(chunk(*part) for part in parts), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def riff(*parts):
    """A WebP file of these chunks."""
    body = b"".join(name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def patched(jpeg, marker, change):
    """With the body of the first segment of this marker changed."""
    place = jpeg.index(bytes((0xFF, marker)))
    (length,) = struct.unpack(">H", jpeg[place + 2 : place + 4])
    body = bytearray(jpeg[place + 4 : place + 2 + length])
    change(body)
    return jpeg[: place + 4] + bytes(body) + jpeg[place + 2 + length :]


def without(jpeg, marker):
    place = jpeg.index(bytes((0xFF, marker)))
    (length,) = struct.unpack(">H", jpeg[place + 2 : place + 4])
    return jpeg[:place] + jpeg[place + 2 + length :]


def odd_jpegs():
    rgb = smooth()
    plain = save(rgb, "JPEG", quality=95, subsampling=0)
    half = save(rgb, "JPEG", quality=95)
    exif, photo = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
    cmyk = save(rgb.convert("CMYK"), "JPEG", quality=95)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", colorTemp=5000)).tobytes()
    yield "plain", plain
    yield "420", half
    yield "422", save(rgb, "JPEG", quality=95, subsampling=1)
    yield "progressive", save(rgb, "JPEG", quality=95, progressive=True)
    yield "optimised", save(rgb, "JPEG", quality=95, optimize=True)
    yield "restart", save(rgb, "JPEG", quality=95, restart_marker_blocks=2)
    yield "grey", save(smooth("L"), "JPEG", quality=95)
    yield "one-pixel", save(smooth(size=(1, 1)), "JPEG")
    for number in range(1, 9):
        yield f"exif-{number}", segments(plain, exif + turned(number))
    yield "exif-big-endian-6", segments(plain, exif + turned(6, ">"))
    for number in (0, 9, 300):
        yield f"exif-{number}-is-none", segments(plain, exif + turned(number))
    yield "exif-long-6", segments(plain, exif + turned(6, kind=4))
    yield "exif-byte-6", segments(plain, exif + turned(6, kind=1))
    yield "exif-two-values-6", segments(plain, exif + turned(6, count=2))
    entry = (0x112, 3, 1)
    twice = tiff((*entry, struct.pack("<HH", 3, 0)), (*entry, struct.pack("<HH", 6, 0)))
    yield "exif-entry-twice", segments(plain, exif + twice)
    yield "exif-segment-3-then-1", segments(plain, exif + turned(3), exif + turned(1))
    yield "exif-segment-1-then-3", segments(plain, exif + turned(1), exif + turned(3))
    yield "exif-6-without-second-zero", segments(plain, b"Exif\0\xff" + turned(6))
    yield "exif-6-as-app2", segments(plain, exif + turned(6), marker=0xE2)
    yield "exif-6-cut-short", segments(plain, (exif + turned(6))[:-9])
    yield "exif-6-magic-43", segments(plain, exif + turned(6).replace(b"II*", b"II+"))
    yield "exif-6-after-frame", half.replace(b"\xff\xc4", segment(0xE1, exif + turned(6)) + b"\xff\xc4", 1)
    yield (
        "exif-8-and-odd-unit",
        segments(plain, exif + tiff((0x112, 3, 1, struct.pack("<HH", 8, 0)), (0x128, 2, 2, b"2\0\0\0"))),
    )
    yield "xmp-3", segments(plain, photo + xmp(3))
    yield "xmp-3-element", segments(plain, photo + xmp(3, element=True))
    yield "xmp-1", segments(plain, photo + xmp(1))
    yield "xmp-3-exif-6", segments(plain, photo + xmp(3), exif + turned(6))
    yield "xmp-3-exif-without", segments(plain, photo + xmp(3), exif + tiff((0x128, 3, 1, b"\2\0\0\0")))
    yield "fill-bytes", plain[:2] + b"\xff\xff\xff" + plain[2:]
    yield "comment", segments(plain, b"a comment", marker=0xFE)
    yield "tail", plain + b"what a camera adds" * 9
    yield "two-in-one-file", plain + save(smooth(seed=1), "JPEG")
    yield "multi-picture", save(rgb, "MPO", save_all=True, append_images=[smooth(seed=1)])
    yield "profile-lab", segments(plain, b"ICC_PROFILE\0\1\1" + profile, marker=0xE2)
    yield "cmyk-adobe", cmyk
    yield "cmyk-without-adobe", without(cmyk, 0xEE)
    yield "cmyk-as-ycck", patched(cmyk, 0xEE, lambda body: body.__setitem__(11, 2))
    bare = without(plain, 0xE0)
    adobe = b"Adobe\0\x64\0\0\0\0"
    for number in (0, 1):
        yield f"adobe-{number}", segments(bare, adobe + bytes([number]), marker=0xEE)
        yield f"adobe-{number}-and-jfif", segments(plain, adobe + bytes([number]), marker=0xEE)
    yield "no-jfif", bare

    def lettered(body, letters):
        for k, letter in enumerate(letters):
            body[6 + 3 * k] = letter

    for letters in (b"RGB", b"\0\1\2", b"YCc"):
        scan = lambda body, letters=letters: [body.__setitem__(1 + 2 * k, c) for k, c in enumerate(letters)]  # noqa: E731
        for name, base in (("bare", bare), ("jfif", plain)):
            changed = patched(base, 0xC0, lambda body, letters=letters: lettered(body, letters))
            yield f"components-{letters.hex()}-{name}", patched(changed, 0xDA, scan)


def odd_pngs():
    rgb, grey = smooth(), smooth("L")
    plain = save(rgb, "PNG")
    layered = smooth()
    layered.putalpha(smooth("L", 1))
    palette = rgb.quantize(37)
    exif = turned(3)
    old = b"\nexif\n%8d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    yield "plain", plain
    yield "grey", save(grey, "PNG")
    yield "rgba", save(layered, "PNG")
    yield "la", save(layered.convert("LA"), "PNG")
    yield "palette", save(palette, "PNG")
    yield "palette-transparent", save(palette, "PNG", transparency=bytes(range(0, 222, 6)))
    yield "one-bit", save(grey.convert("1"), "PNG")
    for depth in (2, 4):
        levels = np.asarray(grey) >> (8 - depth)
        bits = ((levels[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8).reshape(HEIGHT, -1)
        yield f"grey-{depth}-bits", raw_png(depth, 0, [row.tobytes() for row in np.packbits(bits, axis=1)])
    sixteen = np.asarray(rgb).astype(">u2") * 257
    yield "sixteen-rgb", raw_png(16, 2, [row.tobytes() for row in sixteen])
    yield "sixteen-grey", save(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    yield "key-colour", chunks(plain, (b"tRNS", struct.pack(">3H", *rgb.getpixel((3, 3)))))
    yield "background", chunks(save(layered, "PNG"), (b"bKGD", struct.pack(">3H", 255, 0, 0)))
    yield "gamma", chunks(plain, (b"gAMA", struct.pack(">I", 100_000)))
    yield "srgb", chunks(plain, (b"sRGB", b"\0"))
    yield "white", chunks(plain, (b"cHRM", struct.pack(">8I", *[30_000] * 8)))
    yield "significant-bits", chunks(plain, (b"sBIT", b"\5\6\5"))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", colorTemp=5000)).tobytes()
    yield "profile-lab", save(rgb, "PNG", icc_profile=profile)
    yield "exif-3", chunks(plain, (b"eXIf", exif))
    yield "exif-3-at-the-end", chunks(plain, (b"eXIf", exif), after=True)
    yield "exif-1-then-3", chunks(plain, (b"eXIf", turned(1)), (b"eXIf", exif))
    yield "imagemagick-3", chunks(plain, (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(old)))
    yield "xmp-3", chunks(plain, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(3)))
    yield "animated", save(rgb, "PNG", save_all=True, append_images=[smooth(seed=1)])
    yield "animated-default", save(rgb, "PNG", save_all=True, append_images=[smooth(seed=1)], default_image=True)
    yield "text-bomb", chunks(plain, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(9_000_000), 9)))
    damaged = bytearray(chunks(plain, (b"tEXt", b"Comment\0a note")))
    damaged[damaged.index(b"a note")] ^= 1
    yield "damaged-comment", bytes(damaged)
    yield "tail", plain + b"more"


def odd_webps():
    rgb = smooth()
    layered = smooth()
    layered.putalpha(smooth("L", 1))
    lossless = save(rgb, "WEBP", lossless=True)
    body = lossless[20 : 20 + struct.unpack("<I", lossless[16:20])[0]]
    canvas = struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    yield "lossy", save(rgb, "WEBP", quality=95)
    yield "lossless", lossless
    yield "alpha", save(layered, "WEBP", quality=95)
    yield "alpha-lossless", save(layered, "WEBP", lossless=True)
    yield "exif-3", save(rgb, "WEBP", lossless=True, exif=b"Exif\0\0" + turned(3))
    yield "xmp-3", save(rgb, "WEBP", lossless=True, xmp=xmp(3))
    yield "exif-not-announced", riff((b"VP8X", bytes(4) + canvas), (b"VP8L", body), (b"EXIF", turned(3)))
    yield "animated", save(rgb, "WEBP", save_all=True, append_images=[smooth(seed=1)], lossless=True)


def odd_others():
    rgb, grey = smooth(), smooth("L")
    layered = smooth()
    layered.putalpha(smooth("L", 1))
    yield "rgb.bmp", save(rgb, "BMP")
    yield "rgba.bmp", save(layered, "BMP")
    yield "one-bit.bmp", save(grey.convert("1"), "BMP")
    yield "plain.gif", save(rgb, "GIF")
    yield "animated.gif", save(rgb, "GIF", save_all=True, append_images=[smooth(seed=1)])
    yield "rgb.tif", save(rgb, "TIFF")
    yield "turned.tif", save(rgb, "TIFF", tiffinfo={0x112: 6})
    yield "deflate.tif", save(rgb, "TIFF", compression="tiff_adobe_deflate")
    yield "pages.tif", save(rgb, "TIFF", save_all=True, append_images=[smooth(seed=1)])
    yield "la.tif", save(layered.convert("LA"), "TIFF")
    yield "sixteen.tif", save(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "TIFF")
    yield "cmyk.tif", save(rgb.convert("CMYK"), "TIFF")
    yield "rgb.ppm", save(rgb, "PPM")
    yield "dark.ppm", f"P6 {WIDTH} {HEIGHT} 100\n".encode() + (np.asarray(rgb) // 3).tobytes()
    yield "text.pgm", f"P2 {WIDTH} {HEIGHT} 255\n".encode() + " ".join(map(str, np.asarray(grey).flat)).encode()
    yield "bits.pbm", save(grey.convert("1"), "PPM")
    if Image.registered_extensions().get(".avif") in Image.SAVE:
        yield "plain.avif", save(rgb, "AVIF")


def corpus():
    """All of them, by file name."""
    kinds = ((odd_jpegs, ".jpg"), (odd_pngs, ".png"), (odd_webps, ".webp"), (odd_others, ""))
    return {f"{name}{ending}": content for made, ending in kinds for name, content in made()}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A source of the corpus."""
    folder = tmp_path_factory.mktemp("odd") / "data" / "a"
    folder.mkdir(parents=True)
    for name, content in corpus().items():
        (folder / name).write_bytes(content)
    return open_source(folder.parent, "train", labelled=False, cache=folder.parents[1] / "cache")


def name_of(source, index):
    return Path(source.where(index)).name


def test_every_one_is_an_image(odd):
    assert len(odd) == len(corpus()) >= 100
    assert odd.skipped == ()
    warnings.simplefilter("ignore")
    for k, (width, height) in enumerate(odd.sizes.tolist()):
        assert odd.read(k).size == (width, height)


@pytest.mark.skipif(problem() is not None, reason=f"no DALI: {problem()}")
@pytest.mark.parametrize("side", [40, 80])  # resized by DALI, and by torch
def test_both_loaders_see_the_same_picture(odd, side):
    """Of another picture, or of one that is turned or in other colours, the mean difference is above 20 levels."""
    view = TrainView(side, None, flip=False)
    (ours,), (theirs,) = (loader(odd, view, len(odd), shuffle=False).epoch(0) for loader in (DaliLoader, TorchLoader))
    apart = (ours.images.int() - theirs.images.int()).abs().flatten(1).float()
    plain = [odd.plain_length(k) >= 0 for k in range(len(odd))]
    for k in range(len(odd)):
        if plain[k]:  # a bit of dithering is an edge, where resizing clips differently
            assert apart[k].mean() < (2 if name_of(odd, k) == "one-bit.png" else 0.7), name_of(odd, k)
        else:  # the very same view
            assert apart[k].max() == 0, name_of(odd, k)
    assert 35 <= sum(plain) <= 60  # DALI has its share


USUAL = (
    "plain.jpg", "420.jpg", "422.jpg", "progressive.jpg", "grey.jpg", "exif-1.jpg", "exif-6.jpg", "xmp-1.jpg",
    "exif-big-endian-6.jpg", "xmp-3-exif-6.jpg", "comment.jpg", "tail.jpg", "multi-picture.jpg", "profile-lab.jpg",
    "adobe-1.jpg", "no-jfif.jpg", "plain.png", "grey.png", "rgba.png", "palette.png", "gamma.png", "lossy.webp",
    "lossless.webp",
)  # fmt: skip


def test_usual_files_are_for_dali(odd):
    """What cameras, phones, editors and browsers write must not lose its speed."""
    plain = {name_of(odd, k) for k in range(len(odd)) if odd.plain_length(k) >= 0}
    assert plain >= {*USUAL}


# --- metadata


def odd_entry(tag, kind, count, value, extra=b""):
    """A portrait (orientation 6) of which one other entry has an unusual type."""
    rows = sorted([(0x112, 3, 1, struct.pack("<HH", 6, 0)), (tag, kind, count, value)])
    return segments(save(smooth(), "JPEG"), b"Exif\0\0" + tiff(*rows) + extra)


PORTRAITS = {
    "resolution unit as byte": odd_entry(0x128, 1, 1, b"\2\0\0\0"),
    "resolution unit as text": odd_entry(0x128, 2, 2, b"2\0\0\0"),
    "resolution of -1/0": odd_entry(0x11A, 10, 1, struct.pack("<I", 38), struct.pack("<ii", -1, 0)),
    "description as rational": odd_entry(0x10E, 5, 1, struct.pack("<I", 38), struct.pack("<II", 1, 2)),
    "version as float": odd_entry(0x9000, 11, 1, struct.pack("<f", 2.3)),
    "directory at a negative place": odd_entry(0x8769, 6, 1, b"\xff\0\0\0"),
    "unknown type": odd_entry(0x128, 77, 1, b"\2\0\0\0"),
}
# Earlier releases of Pillow read nothing behind such an entry, the orientation neither.
if int(PIL.__version__.split(".")[0]) >= 13:
    PORTRAITS["a place behind the end"] = odd_entry(0x10F, 2, 99, struct.pack("<I", 1 << 30))


@pytest.mark.parametrize("name", PORTRAITS)
def test_metadata_do_not_decide_validity(name, tmp_path):
    (tmp_path / "x.jpg").write_bytes(PORTRAITS[name])
    verdict = judge(Place(str(tmp_path / "x.jpg"), -1, 1))
    assert (verdict.fault, verdict[:2]) == ("", (HEIGHT, WIDTH))
    upright = np.asarray(decode(PORTRAITS[name], 3))
    stored = np.asarray(Image.open(io.BytesIO(save(smooth(), "JPEG"))))
    assert np.array_equal(upright, np.rot90(stored, -1))


def test_what_is_stripped_leaves_the_pixels_and_the_orientation():
    """Pillow gives up on a comment that unpacks to 9 MB; on damaged pixels it has to, with metadata or without."""
    turned_bomb = chunks(corpus()["text-bomb.png"], (b"eXIf", turned(6)))
    assert np.array_equal(np.asarray(decode(turned_bomb, 3)), np.rot90(np.asarray(smooth()), -1))
    damaged = bytearray(turned_bomb)
    damaged[damaged.index(b"IDAT") + 40] ^= 1
    with pytest.raises(Exception, match=r"broken|CRC|checksum|decompress"):
        decode(bytes(damaged), 3)


def test_a_file_that_was_replaced_is_refused_before_it_is_decoded(tmp_path):
    """A header of 30,000 x 30,000 in place of a small image would take 2.6 GB."""
    rows = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="had 73 x 51 pixels at the start and now has 9000 x 9000"):
        decode(huge, 3, (WIDTH, HEIGHT))
    with pytest.raises(Exception, match=r"truncated|incomplete"):
        decode(huge, 3)
    over = huge.replace(header, struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    over = over[:29] + struct.pack(">I", zlib.crc32(over[12:29])) + over[33:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="10000 x 10000 pixels, exceeds limit of"):
            decode(over, 3)


# --- huge thin images


@pytest.mark.parametrize("size", [(12_000, 1), (1, 12_000), (9000, 5), (3, 7000)])
@pytest.mark.parametrize("loader", [TorchLoader, DaliLoader])
def test_thin_images_take_no_gigabytes(tmp_path, size, loader):
    if loader is DaliLoader and problem() is not None:
        pytest.skip(f"no DALI: {problem()}")
    (tmp_path / "a").mkdir()
    image = smooth(size=size)
    image.save(tmp_path / "a" / "x.png")
    smooth().save(tmp_path / "a" / "y.png")
    source = open_source(tmp_path, "train")
    (batch,) = loader(source, EvalView(224), 2, shuffle=False).epoch(0)
    # By the definition, in float64: the value at the centre of each pixel of the view, of a picture that is resized.
    thin, side = min(size), 224
    assert batch.images.shape == (2, side, side, 3)
    scale = 256 / thin
    row = np.asarray(image).reshape(max(size), thin, 3) if size[0] < size[1] else np.asarray(image).swapaxes(0, 1)
    along = (np.arange(side) + round((max(size) * scale - side) / 2) + 0.5) / scale - 0.5
    nearest = row[np.clip(np.rint(along).astype(int), 0, max(size) - 1)].mean(1)
    got = batch.images[0].numpy().mean(0 if size[0] > size[1] else 1)
    assert np.abs(got - nearest).max() < 12  # slowly changing colours


def test_what_is_cut_away_changes_nothing(monkeypatch):
    """The view of a thin image is that of the whole resized image, within rounding."""
    view, image = EvalView(32, 36), smooth(size=(300, 7))
    whole = view(image, sample_rng(0, 0, 0))
    monkeypatch.setattr("denim.nim.data.views.MOST_RESIZED", 100)
    assert np.abs(view(image, sample_rng(0, 0, 0)).astype(int) - whole).max() <= 1


# --- one decoder


def test_a_picture_that_a_user_names(tmp_path):
    Image.fromarray(np.full((64, 64), 60 * 257, np.uint16)).save(tmp_path / "sixteen.png")
    assert np.asarray(read_image(tmp_path / "sixteen.png", 1)).max() == 60
    (tmp_path / "vector.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage\n%%EOF\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, why in (("vector.jpg", "not an image in a known"), ("pipe.jpg", "not a regular"), ("no.jpg", "No such")):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image: {why}"):
            read_image(tmp_path / name, 1)


@pytest.mark.parametrize("name", ["version as float", "sixteen"])
def test_denoise_has_no_decoder_of_its_own(name, tmp_path, monkeypatch):
    Autoencoder(preset("micro", img_size=32, patch_size=4, channels=1)).save_pretrained(tmp_path / "model")
    Image.fromarray(np.full((64, 64), 60 * 257, np.uint16)).save(tmp_path / "sixteen", "PNG")
    (tmp_path / "version as float").write_bytes(PORTRAITS["version as float"])
    seen = []
    monkeypatch.setattr("denim.nim.reconstruct", lambda model, images, *rest, **options: seen.append(images) or stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise.main(tmp_path / name, (0.0,), tmp_path / "model", tmp_path / "out.png")
    expected = EvalView(32)(read_image(tmp_path / name, 1), sample_rng(0, 0, 0))
    assert torch.equal(seen[0][0], torch.from_numpy(expected))


def test_nobody_else_opens_images():
    """`Image.open` stands in one file alone: what it does with orientation, modes and formats holds everywhere."""
    root = Path(__file__).parents[3]
    files = itertools.chain.from_iterable((root / part).rglob("*.py") for part in ("kernels", "nim", "defense", "cli"))
    assert {file.name for file in files if "Image.open(" in file.read_text()} == {"decode.py"}
