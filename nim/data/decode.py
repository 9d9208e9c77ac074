"""The one decoder whose word decides what is a valid image, and the script that many processes run to ask it.

Run as a script (by `denim.nim.data.manifest`), it imports Pillow and nothing of Denim: a process is ready in a tenth
of a second, holds no lock of its parent's and takes no parent with it if a decoder crashes on a malformed file.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

__all__ = ["EXTENSIONS", "Place", "Verdict", "decode", "judge", "open_place", "reason"]

# Decoders by content, not by extension. Others stay shut: Pillow would start Ghostscript for PostScript named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", *([".avif"] if "AVIF" in FORMATS else []),
))  # fmt: skip


class Place(NamedTuple):
    """Where the bytes of an encoded image are.

    Attributes:
        file: path.
        offset: of the first byte; -1 for an image that is the whole file.
        length: in bytes; -1 where `file` is no regular file.
    """

    file: str
    offset: int
    length: int


class Verdict(NamedTuple):
    """What the decoder says of an encoded image.

    Attributes:
        width, height: of the upright image, its EXIF orientation applied; 0 for a bad one.
        format: of the content, whatever the name says: one of `FORMATS`; empty for a bad one.
        fault: why it cannot be used; empty if it can.
    """

    width: int
    height: int
    format: str
    fault: str


def open_place(place: Place) -> BinaryIO:
    """The encoded image as a binary file.

    Raises:
        OSError: no such file, or one that ends before the image does.
    """
    if place.length < 0:
        raise OSError("not a regular file, nor a link to one")
    if place.offset < 0:
        return open(place.file, "rb")  # noqa: PTH123 (the caller closes it)
    with open(place.file, "rb") as file:  # noqa: PTH123
        file.seek(place.offset)
        content = file.read(place.length)
    if len(content) < place.length:
        raise OSError(f"{place.file} ends {place.length - len(content)} bytes before the image does")
    return io.BytesIO(content)


def decode(file: BinaryIO, channels: int) -> Image.Image:
    """The image, upright, in mode L (one channel) or RGB (three).

    EXIF orientation is applied; greyscale, CMYK, palette and 16-bit images are converted; an alpha channel is dropped;
    of several frames the first counts.

    Raises:
        Exception: Pillow's decoders raise nearly anything on malformed files.
    """
    with Image.open(file, formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)  # decodes, whether or not there is something to turn
    _check_range(upright)
    mode = "L" if channels == 1 else "RGB"
    if upright.mode == mode:
        return upright
    if upright.mode.startswith("I;16"):
        # Pillow would clip at 255. The high byte is what it takes of 16-bit RGB.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode == "P":
        upright = upright.convert("RGBA")
    return upright.convert(mode)


def judge(place: Place) -> Verdict:
    """Decode strictly and say what came of it: `decode` takes what passes here, and nothing else.

    An image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels is bad before any of it is decoded. Damage that leaves a
    JPEG decodable is not noticed.
    """
    try:
        with open_place(place) as file, Image.open(file, formats=FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
                width, height = height, width
            # Of a JPEG, one pixel of each 8x8 block: all of the data are parsed, a third of the time goes.
            image.draft(None, (1, 1))
            ImageOps.exif_transpose(image, in_place=True)  # decodes
            _check_range(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        return Verdict(0, 0, "", reason(error))
    return Verdict(width, height, "JPEG" if kind == "MPO" else kind, "")  # MPO: a JPEG with more of them behind it


def reason(error: Exception) -> str:
    """Why an image cannot be read, for people, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own text repeats the path
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" or type(error).__name__


def _check_range(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no defined range: convert the file to 8 bits")


def judge_all(places: Iterable[Place]) -> list[Verdict]:
    """`judge` for many, in this thread. Filters of warnings belong to the process: no other thread may touch them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow only warns between one and two times MAX_IMAGE_PIXELS: here that is an error like the rest.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return [judge(place) for place in places]


def _serve() -> None:
    """Answer each line of places on stdin by a line of verdicts on stdout, both JSON, until stdin closes."""
    Image.MAX_IMAGE_PIXELS = json.loads(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(judge_all(Place(*place) for place in json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
