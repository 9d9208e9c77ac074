"""What the parts of `benchmarks.gpu_check` have in common: the rows of its report, and how much of everything."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SIZES", "Row", "Sizes"]


@dataclass(frozen=True)
class Row:
    """One line of the report: a check where `limit` is given (the value may not exceed it), else a measured number."""

    what: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """NaN is beyond every limit."""
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        patch_sizes: cases on patches of these sides are checked.
        words: of the generator whose instructions are measured, a power of two; all of them is 2^32.
        draws: of `normal_noise`.
        attention: (B, heads, N, head_dim).
        levels: of the sweep, in 0-255 pixel levels.
        timed: words that choose benchmarks of `denim bench kernels`, and whether torch.compile is timed beside them.
        small: preset of the autoencoder that is compiled and captured.
        large: preset of the autoencoder that is timed.
        batch: of the timed pretraining step.
        steps: that are timed.
        images: of the sweep.
        attacked: images of an attack step.
        eot: draws of an attack step.
        photos: JPEG files of the pretraining run.
        run_batch: images of its updates.
        updates: that it makes, in whole epochs.
        attention_timed: (B, heads, N, head_dim) of the timed attention.
        backend: of torch.compile.
    """

    patch_sizes: tuple[int, ...]
    words: int
    draws: int
    attention: tuple[tuple[int, int, int, int], ...]
    levels: tuple[float, ...]
    timed: tuple[tuple[str, bool], ...]
    small: str = "tiny"
    large: str = "base"
    batch: int = 256
    steps: int = 20
    images: int = 16
    attacked: int = 4
    eot: int = 20
    photos: int = 640
    run_batch: int = 64
    updates: int = 50
    attention_timed: tuple[int, int, int, int] = (64, 12, 197, 64)
    backend: str = "inductor"


# One benchmark of every operation is also compared with torch.compile, which takes many seconds to compile.
TIMED = (
    "noise_patchify, 224 x 224, uint8, patch 16, bf16, forward",
    "patch_loss, 224 x 224, uint8, patch 16, bf16, forward + backward",
    "decode_patches, 224 x 224, input, uint8, patch 16, bf16, forward + backward",
    "attack_step, 224 x 224, bf16, forward",
)
SIZES = {
    "full": Sizes(
        patch_sizes=(1, 2, 4, 5, 7, 8, 14, 16, 32),
        words=1 << 32,
        draws=1 << 26,
        attention=((4, 12, 197, 64), (3, 16, 197, 32), (1, 3, 63, 64), (2, 5, 1000, 80)),
        levels=(0.0, 35.0, 70.0, 105.0, 140.0),
        timed=(*((name, True) for name in TIMED), ("224 x 224", False)),
    ),
    "quick": Sizes(
        patch_sizes=(4, 14, 16),
        words=1 << 26,
        draws=1 << 22,
        attention=((4, 12, 197, 64),),
        levels=(0.0, 70.0, 140.0),
        timed=tuple((name, False) for name in TIMED),
        steps=5,
        images=8,
        updates=20,
    ),
    "tiny": Sizes(
        patch_sizes=(2, 4, 14),
        words=1 << 16,
        draws=1 << 12,
        attention=((2, 3, 17, 16),),
        levels=(0.0, 70.0),
        timed=(("attack_step, 32 x 32, fp32", False),),
        small="micro",
        large="micro",
        batch=4,
        steps=2,
        images=2,
        attacked=2,
        eot=3,
        photos=20,
        run_batch=4,
        updates=10,
        attention_timed=(2, 3, 17, 16),
        backend="eager",
    ),
}
