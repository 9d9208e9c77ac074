"""Random erasing, mixup and cutmix of fine-tuning, as functions of the seed, the epoch and the sample ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from denim.kernels import Domain, Stream, derive_seeds, noise_patchify, noise_words

__all__ = ["Augmentation", "Draws"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

# Random erasing as in timm, whose defaults are those of Zhong et al. (AAAI 2020).
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_TRIES = 10


@dataclass(frozen=True)
class Draws:
    """What is random about images in one epoch, a row per image. Rows of whole groups can be taken out of it.

    Attributes:
        seeds: int64 (B,), of the noise in erased boxes, and of drop path.
        boxes: int32 (B, n, 4), each the first row and column and the end of rows and columns: the erased box, where
            there is erasing, then that of cutmix, where there is cutmix. A box of no pixels is empty.
        weights: float32 (B, 3): the share of an image's own pixels outside of the box of cutmix, then the weights of
            its own label and of its partner's.
    """

    seeds: Tensor
    boxes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random erasing, then mixup or cutmix, then soft targets, as timm's `RandomErasing` and `Mixup` make them.

    What is drawn depends on the seed, the epoch and the sample ids alone, so a global batch that is cut into
    micro-batches, among ranks or both has the same images and targets as the whole one.

    Mixing (mixup, Zhang et al., ICLR 2018; cutmix, Yun et al., ICCV 2019) works on groups of consecutive images of the
    global batch, as timm's mode "batch" does on the batch of one GPU. A group has one lambda, one choice between mixup
    and cutmix (each with probability 1/2 where both are on) and one box, and image i of it is mixed with image
    `mixup_group` - 1 - i.

    Attributes:
        seed: of the run.
        img_size: (H, W) in pixels.
        mean: per channel, of the normalised space in which erased pixels are N(0, 1).
        std: likewise.
        num_classes: K.
        erasing: probability of an erased box.
        mixup: alpha of mixup's Beta(alpha, alpha); 0 turns it off.
        cutmix: likewise of cutmix.
        mixup_group: images of a group, an even number.
        smoothing: label smoothing.
    """

    seed: int
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_group: int = 16
    smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix)

    def check_count(self, count: int) -> None:
        """Check that a number of images is one of whole groups, where images are mixed.

        Raises:
            ValueError: it is not.
        """
        if self.mixes and count % self.mixup_group:
            raise ValueError(f"mixing takes whole groups of {self.mixup_group} images, got {count} images")

    def draw(self, ids: Tensor, epoch: int) -> Draws:
        """Draw for images, on the host.

        Args:
            ids: int64 (B,), on the CPU, in the order of the global batch: all of it or whole groups of it.
            epoch: number of the epoch.

        Raises:
            ValueError: images are mixed, and B is no multiple of `mixup_group`.
        """
        count = len(ids)
        self.check_count(count)
        seeds = derive_seeds(self.seed, Domain.AUGMENT, ids, epoch)
        boxes: list[Integers] = []
        weights = np.broadcast_to(np.array([1, 1 - self.smoothing, 0], dtype=np.float32), (count, 3))
        if self.erasing:
            boxes.append(self._erased_boxes(seeds))
        if self.mixes:
            mixed, weights = self._mixing(seeds[:: self.mixup_group])
            if self.cutmix:
                boxes.append(mixed)
        stacked = np.stack(boxes, axis=1) if boxes else np.zeros((count, 0, 4), dtype=np.int32)
        return Draws(seeds, torch.from_numpy(stacked), torch.from_numpy(np.ascontiguousarray(weights)))

    def images(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Erase and mix.

        Args:
            pixels: float32 (B, C, H, W) in [0, 1], images of `draw` in its order.
            draws: on the device of the pixels.

        Returns:
            float32 (B, C, H, W), a new tensor. Erased pixels are mean + std * N(0, 1), outside of [0, 1] as well.
        """
        erased = cut = None
        if draws.boxes.shape[1]:
            inside = self._inside(draws.boxes)
            erased, cut = inside[:, :1], inside[:, -1:]
        if self.erasing:
            assert erased is not None
            pixels = torch.where(erased, self._erasing_noise(draws.seeds), pixels)
        if self.mixes:
            own = draws.weights[:, :1, None, None]
            if self.cutmix:
                assert cut is not None
                own = own.masked_fill(cut, 0.0)
            # At weights of 0 and 1 this is exactly the one image or the other.
            pixels = torch.lerp(self._partners(pixels), pixels, own)
        return pixels

    def targets(self, labels: Tensor, draws: Draws) -> Tensor:
        """Soft targets float32 (B, K), whose rows add up to 1: timm's `mixup_target`.

        (1 - smoothing) * (lambda * onehot(own label) + (1 - lambda) * onehot(partner's label)) + smoothing / K

        Args:
            labels: int64 (B,), of the images of `draw` in its order.
            draws: on the device of the labels.
        """
        shape = (len(labels), self.num_classes)
        targets = torch.full(shape, self.smoothing / self.num_classes, device=labels.device)
        # A call of its own for each label: no two of a call are in the same place, so the order of atomic additions
        # does not matter.
        targets.scatter_add_(1, labels[:, None], draws.weights[:, 1:2])
        if self.mixes:
            targets.scatter_add_(1, self._partners(labels)[:, None], draws.weights[:, 2:])
        return targets

    def _partners(self, values: Tensor) -> Tensor:
        """Row by row, what belongs to the other image of a pair."""
        return values.view(-1, self.mixup_group, *values.shape[1:]).flip(1).flatten(0, 1)

    def _inside(self, boxes: Tensor) -> Tensor:
        """bool (B, n, H, W): the pixels in each box."""
        height, width = self.img_size
        place = torch.arange(max(height, width), dtype=boxes.dtype, device=boxes.device)
        first, end = boxes[..., :2, None], boxes[..., 2:, None]
        within = (place >= first) & (place < end)  # rows and columns at once
        return within[:, :, 0, :height, None] & within[:, :, 1, None, :width]

    def _erasing_noise(self, seeds: Tensor) -> Tensor:
        """mean + std * N(0, 1), float32 (B, C, H, W)."""
        height, width = self.img_size
        channels = len(self.mean)
        # `noise_patchify` is (x - m) / s + sigma / 255 * noise / s. Patches of one pixel are pixels.
        noise = noise_patchify(
            torch.zeros((len(seeds), height, width, channels), dtype=torch.uint8, device=seeds.device),
            torch.full((len(seeds),), 255.0, device=seeds.device),
            seeds,
            patch_size=1,
            mean=[-mean / std for mean, std in zip(self.mean, self.std, strict=True)],
            std=[1 / std for std in self.std],
        )
        return noise.view(len(seeds), height, width, channels).permute(0, 3, 1, 2)

    def _erased_boxes(self, seeds: Tensor) -> Integers:
        """int32 (B, 4). Word 0 says whether; try t has words 4 t + 4 to 4 t + 7: area, ratio, row, column."""
        size = np.array(self.img_size)
        boxes = np.zeros((len(seeds), 4), dtype=np.int32)
        rows = np.flatnonzero(_uniforms(seeds, 1, Stream.ERASE)[:, 0] < self.erasing)
        tries = _uniforms(seeds[rows], 8, Stream.ERASE)[:, None, 4:]
        low, high = np.log(ERASED_RATIO)
        for number in range(ERASING_TRIES):
            area = size.prod() * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * tries[:, 0, 0])
            ratio = np.exp(low + (high - low) * tries[:, 0, 1])
            box = np.rint(np.sqrt(np.stack((area * ratio, area / ratio), axis=1)))
            fits = (box < size).all(axis=1)
            first = np.floor(tries[fits, 0, 2:] * (size - box[fits] + 1))
            boxes[rows[fits]] = np.concatenate((first, first + box[fits]), axis=1)
            rows = rows[~fits]
            if not rows.size:
                break
            if number == 0:  # rare, so the words of the other tries are drawn for these images alone
                tries = _uniforms(seeds[rows], 4 * ERASING_TRIES + 4, Stream.ERASE)[:, 8:].reshape(len(rows), -1, 4)
            else:
                tries = tries[~fits, 1:]
        return boxes

    def _mixing(self, seeds: Tensor) -> tuple[Integers, npt.NDArray[np.float32]]:
        """Boxes of cutmix, int32 (B, 4), and weights, float32 (B, 3), from the seed of each group's first image.

        Words: 0 chooses between mixup and cutmix, 1 gives lambda by inversion, 2 and 3 the centre of the box.
        """
        size = np.array(self.img_size)
        uniforms = _uniforms(seeds, 4, Stream.MIX)
        cuts = uniforms[:, 0] < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        share = np.empty(len(seeds))
        share[cuts] = _beta(self.cutmix, uniforms[cuts, 1])
        share[~cuts] = _beta(self.mixup, uniforms[~cuts, 1])
        # The box has the share 1 - lambda of the image; what of it lies outside is left out, and lambda corrected.
        box = np.where(cuts[:, None], np.sqrt(1 - share)[:, None] * size, 0).astype(np.int64)
        centre = np.floor(uniforms[:, 2:] * size).astype(np.int64)
        first, end = np.clip(centre - box // 2, 0, size), np.clip(centre + (box + 1) // 2, 0, size)
        share = np.where(cuts, 1 - (end - first).prod(axis=1) / size.prod(), share)
        own = np.where(cuts, 1, share)
        labels = (1 - self.smoothing) * np.stack((share, 1 - share), axis=1)
        boxes = np.concatenate((first, end), axis=1).astype(np.int32)
        weights = np.concatenate((own[:, None], labels), axis=1).astype(np.float32)
        return np.repeat(boxes, self.mixup_group, axis=0), np.repeat(weights, self.mixup_group, axis=0)


def _uniforms(seeds: Tensor, count: int, stream: Stream) -> Floats:
    """The first words of a stream as uniforms in (0, 1), float64 (B, count)."""
    return (noise_words(seeds, count, stream).numpy() + 0.5) * 2.0**-32


def _beta(alpha: float, uniforms: Floats) -> Floats:
    """Draws of Beta(alpha, alpha), by inversion of its distribution function."""
    if alpha == 1 or not uniforms.size:
        return uniforms
    from scipy import special  # as slow to import as the models, and only such an alpha needs it

    draws: Floats = special.betaincinv(alpha, alpha, uniforms)
    return draws
