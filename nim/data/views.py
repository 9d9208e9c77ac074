"""What the model sees of an image: random views for training, one view for evaluation.

Everything random about a view is a pure function of (seed, epoch, sample id), through the generator that
`sample_rng` makes. Neither the batch nor the order, the worker nor the step at which a run resumed can enter.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN

__all__ = ["EvalView", "TrainView", "View", "Window", "dali_policy", "keyed_globals", "sample_rng"]

View = Callable[[Image.Image, np.random.Generator], npt.NDArray[np.uint8]]
"""From an image of mode L or RGB and the sample's own generator to uint8 (H, W, C), of one shape for all images."""

_WORD = (1 << 64) - 1
CROP_ATTEMPTS = 10
SMALL_IMAGE = 64
MOST_RESIZED = (
    1 << 24
)  # pixels of the whole resized image: one of 12,000 x 1 would have 800 million at 256 on its shorter side
DALI_MAGNITUDE = 30  # of DALI's RandAugment at most
DALI_OPERATIONS = 10  # of it on one image at most; every further one enlarges DALI's graph


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The generator of everything random about one sample in one epoch.

    Philox-4x64 under the key (seed, sample id), its counter starting at epoch * 2^192. Key and counter hold whole
    64-bit integers, so different triples give different streams, with no chance of a collision.

    Args:
        seed: any int64.
        epoch: any int64.
        sample_id: any int64.
    """
    key = np.array((seed & _WORD, sample_id & _WORD), dtype=np.uint64)
    counter = np.array((0, 0, 0, epoch & _WORD), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@contextmanager
def keyed_globals(seed: int) -> Iterator[None]:
    """Inside, the global generators `random` and `np.random` are a function of `seed`; after, they are as before.

    For timm's RandAugment, which draws from nothing else. Both generators belong to the process:
    two threads must not be inside at once. The global torch generator is not touched.

    Args:
        seed: any int; its lowest 64 bits count.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.seed(seed & _WORD)
        np.random.seed((seed & 0xFFFFFFFF, (seed & _WORD) >> 32))  # noqa: NPY002
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Window(NamedTuple):
    """What a training view takes of an image: a box in pixels of the upright image, mirrored left-right or not.

    It is drawn from the size of the image alone, before any pixel is decoded, so that a decoder can be handed it.
    """

    left: int
    upper: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class TrainView:
    """Random crop and flip, then optionally an affine warp, then optionally RandAugment.

    Called with an image of mode L or RGB and a generator; returns uint8 (size, size, C), C = 1 or 3.

    Attributes:
        size: side of the view in pixels.
        crop_scale: the crop's share of the image area is uniform in this range (Szegedy et al., "Going deeper with
            convolutions", CVPR 2015, as torchvision's RandomResizedCrop: up to ten windows are tried, then the
            largest centred one whose aspect ratio is allowed). None: the whole image, whatever its aspect ratio.
        crop_ratio: width / height of the crop is log-uniform in this range.
        flip: mirror left-right with probability 1/2.
        degrees: rotation is uniform in +-degrees.
        translate: shift, in both directions, is uniform in +-translate, as share of `size`.
        zoom: magnification is uniform in 1 +- zoom.
        auto_augment: RandAugment in timm's notation, such as "rand-m9-mstd0.5-inc1", or DALI's own, such as
            "dali-rand-m9-n2": n = 2 operations (1 to 10), each at magnitude m = 9 of 30.

    Crops are resized bicubically with anti-aliasing, by Pillow: for its images torchvision's transforms v2 call the
    same functions of Pillow's, so their pixels are the same. The warp is one bilinear resampling about the centre;
    what comes from outside is 0. timm's RandAugment fills with the ImageNet mean, with 128 in images of one channel.

    DALI's RandAugment is another policy than timm's, and only `DaliLoader` makes it, of images of three channels;
    calling a view that has it raises ValueError. What differs from "rand-m9-mstd0.5-inc1":

    - Operations: the identity instead of Invert and SolarizeAdd; the other thirteen are the same: shear and shift (x
      and y), rotation, brightness, contrast, colour, sharpness, posterize, solarize, equalize, auto-contrast.
    - Each of the n operations is applied; timm applies each with probability 1/2.
    - Magnitude: m of 30 and always that; timm's is m of 10, here plus N(0, 0.5^2), at most 10. timm's 9 is DALI's 27.
    - At full magnitude, posterize keeps 4 bits (timm: 0), at none 8 (timm: 4); shifts reach 100 / 224 of the side
      (timm: 0.45). Shear 0.3, rotation 30 degrees, factors 1 +- 0.9 and the threshold 256 to 0 are the same.
    - Warps are bilinear and fill with 128 (timm: bicubic, the ImageNet mean).
    - Equalize has OpenCV's formula, sharpness changes the border too, and the centre of contrast is not rounded.

    Raises:
        ValueError: a value outside its range, or a policy that neither timm nor DALI has.
    """

    size: int
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    degrees: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    auto_augment: str | None = None

    def __post_init__(self) -> None:
        _check_side("size", self.size)
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be None or (low, high) with 0 < low <= high <= 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ValueError(f"crop_ratio must be (low, high) with 0 < low <= high, got {self.crop_ratio}")
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees must be in [0, 180], got {self.degrees}")
        for name in ("translate", "zoom"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.auto_augment is not None and dali_policy(self.auto_augment) is None:
            _rand_augment(self.auto_augment, self.size, "RGB")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """View (size, size, C), uint8, of `image`; all randomness comes from `rng`.

        Raises:
            ValueError: `auto_augment` is DALI's.
        """
        if dali_policy(self.auto_augment) is not None:
            raise ValueError(f"auto_augment={self.auto_augment!r} is DALI's policy: take the loader 'dali'")
        window = self.window(image.width, image.height, rng)
        if self.crop_scale is not None:
            left, upper, width, height, _ = window
            image = image.crop((left, upper, left + width, upper + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if window.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.degrees or self.translate or self.zoom:
            image = self._warp(image, rng)
        if self.auto_augment is not None:
            augment = _rand_augment(self.auto_augment, self.size, image.mode)
            with keyed_globals(int(rng.integers(1 << 63))):
                image = augment(image)
        return _as_array(image)

    def window(self, width: int, height: int, rng: np.random.Generator) -> Window:
        """The crop and the flip, the first draws of a view; the whole image where there is no crop.

        Args:
            width: of the upright image, in pixels.
            height: likewise.
            rng: from `sample_rng`, fresh: a loader that decodes elsewhere draws the window that a call would draw.
        """
        box = (0, 0, width, height) if self.crop_scale is None else self._crop(self.crop_scale, width, height, rng)
        return Window(*box, flip=self.flip and rng.random() < 0.5)

    def _crop(
        self, scale: tuple[float, float], width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(CROP_ATTEMPTS):
            area = width * height * rng.uniform(*scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (width - w) // 2, (height - h) // 2, w, h

    def _warp(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        dx, dy = rng.uniform(-self.translate, self.translate, size=2) * self.size
        scale = rng.uniform(1 - self.zoom, 1 + self.zoom)
        # Pillow wants the inverse, from a point of the result to a point of the image: undo the shift, then turn and
        # scale back about the centre.
        c, s = math.cos(angle) / scale, math.sin(angle) / scale
        centre = self.size / 2
        x, y = centre + dx, centre + dy
        inverse = (c, s, centre - c * x - s * y, -s, c, centre + s * x - c * y)
        return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=0)


@dataclass(frozen=True)
class EvalView:
    """Shorter side resized to `resize` (bicubic, anti-aliased), then the centre crop of size x size.

    Called with an image of mode L or RGB and a generator, which it does not use; returns uint8 (size, size, C).

    Attributes:
        size: side of the view in pixels.
        resize: length of the shorter side before the crop. None: round(size * 256 / 224), the published evaluation
            of photos (256, then 224); for images whose shorter side has at most 64 pixels (digits, CIFAR), which have
            no margin to give away, `size`.

    Raises:
        ValueError: size below 1, or resize below size.
    """

    size: int
    resize: int | None = None

    def __post_init__(self) -> None:
        _check_side("size", self.size)
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size = {self.size}, got {self.resize}")

    def __call__(self, image: Image.Image, _rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """View (size, size, C), uint8, of `image`."""
        width, height, left, upper = self.geometry(image.width, image.height)
        if width * height > MOST_RESIZED:
            # What is cut away is not made. Pillow takes the box in float32, so pixels may differ by rounding.
            x, y = image.width / width, image.height / height
            box = (left * x, upper * y, (left + self.size) * x, (upper + self.size) * y)
            return _as_array(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return _as_array(image.crop((left, upper, left + self.size, upper + self.size)))

    def geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height to which an upright image of this size is resized, then left and upper edge of the crop.

        Rounded as torchvision's Resize and CenterCrop do, by which the published numbers were taken.
        """
        short = min(width, height)
        target = self.resize
        if target is None:
            target = self.size if short <= SMALL_IMAGE else round(self.size * 256 / 224)
        width, height = (target if side == short else int(target * side / short) for side in (width, height))
        return width, height, round((width - self.size) / 2), round((height - self.size) / 2)


def dali_policy(policy: str | None) -> tuple[int, int] | None:
    """Magnitude and number of operations where the policy is DALI's RandAugment; None where it is timm's or none.

    Args:
        policy: see `TrainView.auto_augment`.

    Raises:
        ValueError: it begins with "dali" and is not "dali-rand-m<0..30>-n<1..10>".
    """
    if policy is None or not policy.startswith("dali"):
        return None
    match = re.fullmatch(r"dali-rand-m([0-9]{1,2})-n([0-9]{1,2})", policy)
    magnitude, count = map(int, match.groups()) if match else (-1, -1)
    if not 0 <= magnitude <= DALI_MAGNITUDE or not 1 <= count <= DALI_OPERATIONS:
        raise ValueError(
            f"auto_augment of DALI must be 'dali-rand-m<magnitude>-n<operations>' with a magnitude in "
            f"0..{DALI_MAGNITUDE} and 1..{DALI_OPERATIONS} operations, such as 'dali-rand-m9-n2', got {policy!r}"
        )
    return magnitude, count


def _check_side(name: str, side: int) -> None:
    if side < 1:
        raise ValueError(f"{name} must be at least 1 pixel, got {side}")


def _as_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@functools.lru_cache
def _rand_augment(policy: str, size: int, mode: str) -> RandAugment:
    fill = 128 if mode == "L" else tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
    # As timm's own training transform sets them: shifts up to 0.45 of the side, bicubic.
    settings = {"translate_const": int(0.45 * size), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    try:
        augment: RandAugment = rand_augment_transform(policy, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"auto_augment must be a RandAugment policy of timm, such as 'rand-m9-mstd0.5-inc1', or DALI's, such as "
            f"'dali-rand-m9-n2', got {policy!r} {error}"
        ) from error
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # timm asks for 0 bits at full magnitude (a black image, part of the published recipe), which Pillow 13 refuses.
    table = [level >> (8 - bits) << (8 - bits) for level in range(256)]
    return image.point(table * len(image.getbands()))
