"""The one decoder: what is a valid image, which way it stands, and its pixels. Also a script that many processes run.

Run as a script (by `denim.nim.data.indexing`), it imports Pillow and nothing of Denim: a process is ready in a tenth
of a second, holds no lock of its parent's and takes no parent with it if a decoder crashes on a malformed file.
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import stat
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "DaliTrial",
    "MachineError",
    "Place",
    "Verdict",
    "decode",
    "is_machines",
    "judge",
    "open_place",
    "patiently",
    "read_content",
    "read_image",
    "reason",
]

# Decoders by content, not by extension. Others stay shut: Pillow would start Ghostscript for PostScript named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", *([".avif"] if "AVIF" in FORMATS else []),
))  # fmt: skip
SAME = 12  # levels: mean difference of two decoders' pictures in the small at most; subsampled colours take up to 6
LARGE = 1 << 25  # pixels of an image from which on Pillow alone decodes it, which takes the least memory
MOST_BYTES = 1 << 30  # of an encoded image: 89 million pixels of 8 bytes fit
# EXIF orientation -> what turns the stored picture upright (CIPA DC-008, tag 274). 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Chunks of a PNG that make its pixels, and those that Denim's and DALI's decoders both skip.
PIXEL_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
PLAIN_CHUNKS = frozenset((
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"sRGB", b"gAMA", b"cHRM", b"iCCP",
))  # fmt: skip
PAUSES = (0.05, 0.5)  # seconds before a read that failed for the machine's sake is tried again
# Faults of the machine that may be over in a moment.
FLEETING = frozenset((
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
))  # fmt: skip
_T = TypeVar("_T")


class MachineError(OSError):
    """An image cannot be read for the machine's sake: no permission, a failing disk, too many open files, no memory."""


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
        plain: whether any decoder sees the same picture in it (see `_is_plain`).
        passing: whether the fault is the machine's and says nothing of the image.
        dali: the version of DALI that has decoded it, alone, to the same picture; with "-" before it if that version
            refuses it, sees another picture in it or dies of it; empty where none has tried.
    """

    width: int
    height: int
    format: str
    fault: str
    plain: bool = False
    passing: bool = False
    dali: str = ""


def open_place(place: Place) -> BinaryIO:
    """The encoded image as a binary file.

    Raises:
        OSError: no such file, no regular one, or one that ends before the image does.
    """
    if place.length < 0:
        raise OSError("not a regular file, nor a link to one")
    if place.offset < 0:
        return open_regular(place.file)
    if place.length > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB encoded")
    with open_regular(place.file) as file:
        file.seek(place.offset)
        content = file.read(place.length)
    if len(content) < place.length:
        raise OSError(f"{place.file} ends {place.length - len(content)} bytes before the image does")
    return io.BytesIO(content)


def open_regular(path: str) -> BinaryIO:
    """A regular file, open for reading. A pipe, in which a reader would wait for ever, is refused.

    Raises:
        OSError: no such file, or no regular one.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("not a regular file, nor a link to one")
    return os.fdopen(handle, "rb")


def read_image(path: Path, channels: int) -> Image.Image:
    """The image in a file that a user named. Pixels: see `decode`.

    Raises:
        ValueError: no such file, or no image that can be read; the message names it.
    """
    try:
        with open_regular(str(path)) as file:
            return decode(read_content(file), channels)
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        raise ValueError(f"{path} cannot be read as an image: {reason(error)}") from error


def decode(content: bytes, channels: int, size: tuple[int, int] | None = None) -> Image.Image:
    """The image, upright, in mode L (one channel) or RGB (three).

    EXIF orientation is applied; greyscale, CMYK, palette and 16-bit images are converted; an alpha channel is dropped;
    of several frames the first counts. Metadata other than the orientation have no effect, damaged ones neither.

    Args:
        content: the encoded image.
        channels: 1 or 3.
        size: width and height of the upright image, if they are known: with others it is refused undecoded.

    Raises:
        Exception: Pillow's decoders raise nearly anything on malformed files.
    """
    image, _ = _upright(content, size=size)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255. The high byte is what it takes of 16-bit RGB.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image.convert(mode)


def judge(place: Place) -> Verdict:
    """Decode strictly and say what came of it: `decode` takes what passes here, and nothing else.

    An image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels is bad before any of it is decoded. Damage that leaves a
    JPEG decodable is not noticed.
    """
    try:
        content = patiently(lambda: _content_of(place))
        peeked = patiently(lambda: _upright(content, small=True)[1])
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        return Verdict(0, 0, "", reason(error), passing=is_machines(error))
    return Verdict(peeked.width, peeked.height, peeked.format, "", peeked.plain)


def patiently(read: Callable[[], _T]) -> _T:
    """What `read` returns; it is called again, after a pause, where it fails in a way that may be over in a moment.

    Raises:
        Exception: what `read` raises, the last time.
    """
    for pause in PAUSES:
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not isinstance(error, MemoryError) and error.errno not in FLEETING:
                raise
        time.sleep(pause)
    return read()


def is_machines(error: Exception) -> bool:
    """Whether an error is the machine's fault, not the image's: those that the system numbers, and want of memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def reason(error: Exception) -> str:
    """Why an image cannot be read, for people, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own text repeats the path
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" or type(error).__name__


def _content_of(place: Place) -> bytes:
    with open_place(place) as file:
        return read_content(file)


def read_content(file: BinaryIO) -> bytes:
    """All of an encoded image.

    Raises:
        ValueError: it has more than `MOST_BYTES`.
    """
    if file.seek(0, os.SEEK_END) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB encoded")
    file.seek(0)
    return file.read()


def _upright(
    content: bytes, *, small: bool = False, size: tuple[int, int] | None = None
) -> tuple[Image.Image, Verdict]:
    """The image as it is meant to stand, in whatever mode it has, and what is said of it.

    Args:
        content: the encoded image.
        small: of a JPEG, decode one pixel of each 8x8 block: all of the data are parsed, a third of the time goes. The
            verdict has the size of the whole.
        size: see `decode`.
    """
    try:
        return _decoded(content, None, small, size)
    except Exception as error:
        if is_machines(error):
            raise
        # A reader of metadata may have raised it, and metadata do not decide what is an image.
        bare = _without_metadata(content)
        if len(bare) == len(content):
            raise
        return _decoded(bare, _stored_orientation(content), small, size)


def _decoded(
    content: bytes, orientation: int | None, small: bool, size: tuple[int, int] | None
) -> tuple[Image.Image, Verdict]:
    """As `_upright`; `orientation` is what `content` has been stripped of, or None for the image's own."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        kind, (width, height) = image.format or "", image.size
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise ValueError(f"{width} x {height} pixels, exceeds limit of {limit} pixels")
        if size is not None and {width, height} != {*size}:  # to know which is which may take decoding
            raise ValueError(f"had {size[0]} x {size[1]} pixels at the start and now has {width} x {height}")
        plain = orientation is None
        if orientation is None:
            orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        if size is not None and size != (width, height):
            raise ValueError(f"had {size[0]} x {size[1]} pixels at the start and now has {width} x {height}")
        if small:
            image.draft(None, (1, 1))
        image.load()
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} (32 bits) have no defined range: convert the file to 8 bits")
        kind = "JPEG" if kind == "MPO" else kind  # a JPEG with more of them behind it
        verdict = Verdict(width, height, kind, "", plain and _is_plain(content, kind, orientation))
        # Nothing of the metadata is written back: entries of unusual types could not be.
        return image.transpose(TURNS[orientation]) if orientation in TURNS else image, verdict


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, where Pillow finds it: in EXIF, or else in XMP. 1 where metadata are damaged."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(number) if number in TURNS else 1
    except Exception:  # Pillow's readers raise nearly anything on malformed metadata
        return 1


def _is_plain(content: bytes, kind: str, orientation: int) -> bool:
    """Whether decoders that honour the standard can see but one picture in it.

    Other decoders than Pillow look for the orientation in other places, ignore what they do not know, and disagree on
    colours that need interpretation. So this is a list of what is allowed, by container:

    - JPEG: 8 bits, baseline or progressive; grey, or YCbCr with components 1, 2, 3 and a usual subsampling; at most one
      EXIF segment, whose orientation (SHORT, once, 1 to 8) is the one that Pillow found.
    - PNG: 8 bits a channel at most; no chunks but those that change no pixel; upright.
    - WebP: one lossy or lossless picture without alpha; upright.

    Args:
        content: the encoded image.
        kind: its format.
        orientation: that Pillow found.
    """
    try:
        match kind:
            case "JPEG":
                return _is_plain_jpeg(content, orientation)
            case "PNG":
                depth = content[24]
                names = {name for name, _, _ in _chunks(content)}
                return orientation == 1 and depth <= 8 and names <= PLAIN_CHUNKS
            case "WEBP":
                lossless = content[12:16] == b"VP8L" and not content[24] & 0x10  # bit 28 of the header says alpha
                return orientation == 1 and (content[12:16] == b"VP8 " or lossless)
    except (struct.error, IndexError, ValueError):
        pass
    return False


def _is_plain_jpeg(content: bytes, orientation: int) -> bool:
    exif, frames, colours = [], [], []
    for marker, begin, end in _segments(content):
        body = content[begin + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif"):
            exif.append(body)
        elif marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            frames.append((marker, body))
        elif marker == 0xEE and body.startswith(b"Adobe"):
            colours.append(body[11])
        elif marker == 0xDA:
            break
    if len(exif) > 1 or len(frames) != 1 or len(colours) > 1:
        return False
    found = _exif_orientation(exif[0]) if exif else 1
    ((marker, frame),) = frames
    precision, height, _, components = struct.unpack(">BHHB", frame[:6])
    parts = [tuple(frame[6 + 3 * k : 8 + 3 * k]) for k in range(components)]
    grey = components == 1 and parts[0][1] == 0x11 and not colours
    colour = (
        components == 3
        and [number for number, _ in parts] == [1, 2, 3]
        and parts[0][1] in (0x11, 0x21, 0x12, 0x22, 0x41)
        and parts[1][1] == parts[2][1] == 0x11
        and colours in ([], [1])  # YCbCr
    )
    return marker in (0xC0, 0xC1, 0xC2) and precision == 8 and height > 0 and (grey or colour) and found == orientation


def _stored_orientation(content: bytes) -> int:
    """The orientation in the first EXIF segment of a JPEG or chunk of a PNG; 1 where there is none that can be read."""
    try:
        if content.startswith(b"\xff\xd8"):
            bodies = (content[begin + 4 : end] for marker, begin, end in _segments(content) if marker == 0xE1)
            exif = [body for body in bodies if body.startswith(b"Exif\0\0")]
        else:
            exif = [
                b"Exif\0\0" + content[begin + 8 : end - 4] for name, begin, end in _chunks(content) if name == b"eXIf"
            ]
        return (_exif_orientation(exif[0]) or 1) if exif else 1
    except (struct.error, IndexError, ValueError):
        return 1


def _exif_orientation(segment: bytes) -> int:
    """The orientation in an EXIF segment, 1 where it has none; 0 where readers may differ on it.

    Raises:
        struct.error: it is cut short.
    """
    order = {b"II": "<", b"MM": ">"}.get(segment[6:8])
    if not segment.startswith(b"Exif\0\0") or order is None:
        return 0
    magic, offset = struct.unpack_from(f"{order}HI", segment, 8)
    (count,) = struct.unpack_from(f"{order}H", segment, 6 + offset)
    entries = [struct.unpack_from(f"{order}HHIH", segment, 8 + offset + 12 * k) for k in range(count)]
    found = [entry[1:] for entry in entries if entry[0] == ExifTags.Base.Orientation]
    if magic != 42 or len(found) > 1:
        return 0
    if not found:
        return 1
    ((kind, length, number),) = found
    return number if kind == 3 and length == 1 and 1 <= number <= 8 else 0  # kind 3: SHORT


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of the segments of a JPEG: those before the first scan, then all the rest as one.

    Raises:
        ValueError, IndexError, struct.error: it is cut short before, or has something else between segments.
    """
    place = 2
    while True:
        while content[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if content[place] != 0xFF:
            raise ValueError("no segment")
        marker = content[place + 1]
        if marker == 0xDA:  # start of scan
            yield marker, place, len(content)
            return
        (length,) = struct.unpack_from(">H", content, place + 2)
        if length < 2 or place + 2 + length > len(content):
            raise ValueError("cut short")
        yield marker, place, place + 2 + length
        place += 2 + length


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of the chunks of a PNG: four bytes of length, the name, the body, four of checksum.

    Raises:
        ValueError, struct.error: it is cut short.
    """
    place, name = 8, b""
    while name != b"IEND":
        (length,) = struct.unpack_from(">I", content, place)
        name = content[place + 4 : place + 8]
        if place + 12 + length > len(content):
            raise ValueError("cut short")
        yield name, place, place + 12 + length
        place += 12 + length


def _without_metadata(content: bytes) -> bytes:
    """The same JPEG or PNG without what changes no pixel; anything else, and what is cut short, as it is."""
    try:
        if content.startswith(b"\xff\xd8"):
            kept = [
                content[begin:end]
                for marker, begin, end in _segments(content)
                if marker not in (*range(0xE1, 0xEE), 0xEF, 0xFE)  # APP1 to APP15 but Adobe's APP14; comments
            ]
            return content[:2] + b"".join(kept)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            kept = [content[begin:end] for name, begin, end in _chunks(content) if name in PIXEL_CHUNKS]
            return content[:8] + b"".join(kept)
    except (struct.error, IndexError, ValueError):
        pass
    return content


class DaliTrial:
    """A graph of DALI's for one image at a time, on the CPU, whose picture is compared with Pillow's.

    With an image that cannot be decoded among others, DALI (2.4) gives up the batch while its threads go on decoding
    the others into memory that is freed, which ends the process more often than not. Alone, it raises an error.
    """

    def __init__(self) -> None:
        dali: Any = importlib.import_module("nvidia.dali")
        content: list[Any] = []
        self._content = content
        self._pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with self._pipe:
            encoded = dali.fn.external_source(lambda: [content.pop()], dtype=dali.types.UINT8)
            self._pipe.set_outputs(dali.fn.decoders.image(encoded))

    def __call__(self, content: bytes) -> bool:
        """Whether DALI sees the picture in it that `decode` sees: the same size, and colours that agree in the small.

        Raises:
            RuntimeError: DALI cannot decode it; this object is of no more use.
            Exception: `decode` cannot.
        """
        self._content.append(np.frombuffer(content, np.uint8))
        theirs = np.asarray(self._pipe.run()[0].at(0))
        image, verdict = _upright(content, small=True)
        if theirs.shape != (verdict.height, verdict.width, 3):
            return False
        # One pixel for each block of 8x8, which is what a JPEG decoder makes of its lowest frequency alone.
        ours = image.convert("RGB") if image.size != verdict[:2] else image.convert("RGB").reduce(8)
        small = np.asarray(Image.fromarray(theirs).reduce(8), np.int16)
        if small.shape != (ours.height, ours.width, 3):  # a JPEG of less than 8 pixels
            return True
        return bool(np.abs(small - np.asarray(ours)).mean() < SAME)


def try_dali(places: Iterable[Place]) -> list[bool | None]:
    """Whether DALI may be handed each of these images; None where the machine does not let it be told."""
    trial: DaliTrial | None = None
    answers: list[bool | None] = []
    for place in places:
        trial, answer = trial or DaliTrial(), None
        try:
            content = patiently(lambda place=place: _content_of(place))  # type: ignore[misc]
            answer = trial(content)
        except RuntimeError as error:
            trial = None
            answer = None if "memory" in f"{error}".lower() else False
        except Exception as error:
            answer = None if is_machines(error) else False
        answers.append(answer)
    return answers


def judge_all(places: Iterable[Place]) -> list[Verdict]:
    """`judge` for many, in this thread. Filters of warnings belong to the process: no other thread may touch them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [judge(place) for place in places]


def _serve() -> None:
    """Answer each line of places on stdin by a line of verdicts on stdout, both JSON, until stdin closes.

    Arguments: the limit of pixels, and the function that answers.
    """
    Image.MAX_IMAGE_PIXELS = json.loads(sys.argv[1])
    answer = {"judge": judge_all, "dali": try_dali}[sys.argv[2]]
    # What a library prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line in sys.stdin:
            answers.write(json.dumps(answer(Place(*place) for place in json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    _serve()
