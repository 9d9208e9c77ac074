"""The noise contract: noise is a pure function of (seed of the sample, position in the sample).

Nothing else enters: not sigma, the batch, the patch size, a block size, the rank, the device, nor whether levels and
draws are looped or batched. The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011); its key is the seed, and its counter holds the number of a group of four positions and the use
of the words (`Stream`). This module is the torch version of the arithmetic in the GPU kernels: the words have the same
bits, and normals are within 1e-5 of the float64 definition.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from denim.kernels.dispatch import register

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Stream",
    "check_seeds",
    "noise_backend",
    "noise_words",
    "normal_noise",
    "normals_from_words",
    "philox",
    "uniform_noise",
]

# Multipliers and key increments of Philox-4x32 (Salmon et al. 2011, table 2 and section 4.3).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF

Array = TypeVar("Array", Tensor, "npt.NDArray[np.int64]")
Words = tuple[Tensor, Tensor, Tensor, Tensor]

# Up to this many words are drawn by NumPy: its operations are 3 to 4 times cheaper to call than torch's, which have one
# thread on so few elements.
FEW = 1 << 15


class Stream(IntEnum):
    """Use of the words of a seed, in word 2 of the counter. The streams of a seed are independent of each other."""

    NOISE = 0
    SEED = 1
    MASK = 2
    START = 3
    SIGMA = 4
    ERASE = 5
    MIX = 6
    DROP_PATH = 7


def philox(counter: tuple[Array, Array, Array, Array], key: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
    """Four words of Philox-4x32-10 for every counter.

    Args:
        counter: four int64 tensors that hold uint32 values, broadcastable with `key`; or arrays of NumPy.
        key: two of the same that hold uint32 values.

    Returns:
        Four of the same that hold uint32 values.

    torch has no unsigned 32 x 32 -> 64 bit product on all backends. The int64 product wraps modulo 2^64 and has the
    bits of the unsigned product, so a shift and a mask give both halves exactly.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        even, odd = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (
            ((odd >> 32) & WORD) ^ c1 ^ k0,
            odd & WORD,
            ((even >> 32) & WORD) ^ c3 ^ k1,
            even & WORD,
        )
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def split(seeds: Array) -> tuple[Array, Array]:
    """Low and high words of int64 seeds, as int64 that hold uint32 values."""
    return seeds & WORD, (seeds >> 32) & WORD


def _group_words(seeds: Array, groups: Array, stream: int) -> tuple[Array, Array, Array, Array]:
    """Words of groups (G,) for seeds (N,): four int64 tensors or arrays (N, G)."""
    group = groups[None, :]
    zero = group & 0
    return philox((group & WORD, group >> 32, zero + stream, zero), split(seeds[:, None]))


def _signed(word: Tensor) -> Tensor:
    """The word read as int32, as float32 (rounded to nearest)."""
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).to(torch.float32)


def normals_from_words(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two words, in the contract's pinned float32 arithmetic.

    Args:
        first: int64 tensor of uint32 values; it gives the radius.
        second: int64 tensor of uint32 values, same shape; it gives the angle.

    Returns:
        Two float32 tensors: r cos(a) and r sin(a) with r = sqrt(-2 ln u), u = (first + 1/2) / 2^32 and
        a = 2 pi * int32(second) / 2^32 (Box and Muller 1958).

    Near 1, u itself would round to 1, and the error of an approximate logarithm would be larger than its value. The
    arithmetic therefore uses h, which is u below one half and u - 1 above. Close to u = 1 the series of -2 ln(1 + h)
    replaces the logarithm. The largest magnitude is sqrt(66 ln 2) = 6.764, and the result is never NaN.
    """
    h = _signed(first) * 2.0**-32 + 2.0**-33
    u = torch.where(h > 0, h, 1 + h)
    series = h * (h * (-2.0 / 3.0 * h + 1.0) - 2.0)
    squared = torch.where((h < 0) & (h > -(2.0**-6)), series, -2.0 * math.log(2.0) * torch.log2(u))
    radius = torch.sqrt(squared)
    angle = _signed(second) * (math.pi * 2.0**-31)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _group_normals(seeds: Tensor, groups: int) -> Words:
    numbers = torch.arange(groups, dtype=torch.int64, device=seeds.device)
    w0, w1, w2, w3 = _group_words(seeds, numbers, Stream.NOISE)
    return (*normals_from_words(w0, w1), *normals_from_words(w2, w3))


@functools.cache
def noise_backend() -> str:
    """How noise is drawn on the CPU: "compiled" or "eager".

    "compiled" (by torch) where a C++ compiler is found, "eager" elsewhere; `DENIM_NOISE=eager|compiled` overrides this.
    The words are the same in both. Normals can differ in the last bit, because log2, sin and cos come from different
    vector libraries. The choice is therefore made once per process and does not depend on the size of a call.

    Raises:
        ValueError: DENIM_NOISE holds anything else.
    """
    chosen = os.environ.get("DENIM_NOISE", "auto")
    if chosen in ("eager", "compiled"):
        return chosen
    if chosen != "auto":
        raise ValueError(f"DENIM_NOISE is {chosen!r}; expected auto, eager or compiled")
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return "compiled" if any(shutil.which(name) for name in compilers if name) else "eager"


def _compilation_notice() -> object:
    """A pass of inductor's that changes nothing and says that a compilation has begun.

    Inductor runs its passes only where its cache on disk has no code, which is the slow case.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass  # loads inductor, which a GPU run never needs

    class Notice(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            logging.getLogger("denim").warning(
                "denim: compiling the noise kernel for this CPU, once per machine and release of torch (10 to 30 s)"
            )

        def uuid(self) -> str:  # part of the cache's key
            return "denim notice"

    return Notice()


@functools.cache
def _compiled_group_normals() -> Callable[[Tensor, int], Words]:
    # One compilation serves every later call. With its guards, dynamo would compile again under no_grad, autocast,
    # inference mode or another number of threads, and after eight compilations use eager code without a message: other
    # last bits in the middle of a run. The caller fixes everything that the code depends on (contiguous int64 rows,
    # sizes of at least two), so all guards are dropped. The number of threads is read at run time: a forked worker has
    # one. The function has four outputs instead of an interleaved one, since inductor then makes one vectorised loop,
    # and stacking them afterwards is cheaper than its strided stores (1.7 instead of 6 ns per element).
    options: dict[str, Any] = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "cpp.dynamic_threads": True,
        "post_grad_custom_pre_pass": _compilation_notice(),
    }
    compiled: Callable[[Tensor, int], Words] = torch.compile(_group_normals, dynamic=True, options=options)
    # torch warns at its first compilation if a CUDA toolkit is installed without a GPU. That does not concern this
    # code.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The two sizes differ on purpose: torch.compile gives equal sizes one symbol, and would assume them always
        # equal.
        compiled(torch.arange(3, dtype=torch.int64, device="cpu"), 5)
    except Exception as error:  # compilers fail with many kinds of errors, for example where headers are missing
        if os.environ.get("DENIM_NOISE") == "compiled":
            raise
        warnings.warn(
            f"noise is drawn eagerly, which is slower: torch could not compile it ({type(error).__name__}: {error}); "
            "DENIM_NOISE=eager chooses this without a warning",
            stacklevel=3,
        )
        return _group_normals
    finally:
        logger.setLevel(level)
    return compiled


def _reference(seeds: Tensor, count: int) -> Tensor:
    flat = seeds.reshape(-1)
    if flat.numel() == 0 or count == 0:
        return torch.empty((*seeds.shape, count), dtype=torch.float32, device=seeds.device)
    # Both sizes are at least two, because dynamo specialises on a size of one.
    groups = max(2, (count + 3) // 4)
    rows = (flat if flat.numel() > 1 else flat.expand(2)).contiguous()
    compiled = seeds.device.type == "cpu" and noise_backend() == "compiled"
    parts = (_compiled_group_normals() if compiled else _group_normals)(rows, groups)
    noise = torch.stack(parts, dim=-1).flatten(1)[: flat.numel(), :count]
    return noise.contiguous().view(*seeds.shape, count)


def _fake(seeds: Tensor, count: int) -> Tensor:
    return seeds.new_empty((*seeds.shape, count), dtype=torch.float32)


_normal_noise = register("normal_noise", _reference, _fake)


def check_seeds(seeds: Tensor, name: str = "seeds") -> None:
    """Check that seeds, or what seeds are derived from (`name`), are a tensor of the right dtype.

    Raises:
        TypeError: they are not an int64 tensor.
    """
    if not isinstance(seeds, Tensor):
        raise TypeError(f"{name} must be a tensor, got {seeds!r}; derive seeds with denim.kernels.derive_seeds")
    if seeds.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {seeds.dtype}; derive seeds with denim.kernels.derive_seeds")


def normal_noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals, a pure function of (seed, flat position): the noise of `noise_patchify`.

    Args:
        seeds: int64, any shape; one per sample and draw.
        shape: shape of one sample. Positions count through it in row-major order; for an image this is
            (H, W, C), the order of uint8 NHWC memory and of a patch row alike.

    Returns:
        float32 tensor of shape `seeds.shape + shape` on the device of the seeds.

    Raises:
        TypeError: seeds are not int64.
    """
    check_seeds(seeds)
    noise: Tensor = _normal_noise(seeds, math.prod(shape))
    return noise.reshape(*seeds.shape, *shape)


def _words_reference(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Reference in torch or NumPy, with the same bits; also the CPU kernel."""
    flat, groups = seeds.reshape(-1), (count + 3) // 4
    if seeds.device.type == "cpu" and flat.numel() * groups <= FEW:
        import numpy as np

        words = torch.from_numpy(np.stack(_group_words(flat.numpy(), np.arange(groups), stream), axis=-1))
    else:
        numbers = torch.arange(groups, dtype=torch.int64, device=seeds.device)
        words = torch.stack(_group_words(flat, numbers, stream), dim=-1)
    return words.flatten(1)[:, :count].reshape(*seeds.shape, count).contiguous()


def _words_fake(seeds: Tensor, count: int, stream: int) -> Tensor:
    return seeds.new_empty((*seeds.shape, count))


_noise_words = register("noise_words", _words_reference, _words_fake, triton="seeds_triton", part="_words")


def noise_words(seeds: Tensor, count: int, stream: Stream = Stream.NOISE) -> Tensor:
    """The first words of a stream for every seed.

    Args:
        seeds: int64, any shape.
        count: number of words per seed.
        stream: use of the words.

    Returns:
        int64 tensor that holds uint32 values, of shape `seeds.shape + (count,)`, on the device of the seeds.

    Raises:
        TypeError: seeds are not int64.
    """
    check_seeds(seeds)
    words: Tensor = _noise_words(seeds, count, int(stream))
    return words


def uniform_noise(seeds: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """Uniforms in (0, 1): (word + 1/2) / 2^32, computed in float64 and rounded to float32.

    Args:
        seeds: int64, any shape.
        shape: shape of one sample. Positions count through it in row-major order.
        stream: use of the words.

    Returns:
        float32 tensor of shape `seeds.shape + shape` on the device of the seeds.

    Raises:
        TypeError: seeds are not int64.
    """
    words = noise_words(seeds, math.prod(shape), stream)
    # The largest values would round to 1. The largest float32 below 1 is 1 - 2^-24.
    uniform = ((words.to(torch.float64) + 0.5) * 2.0**-32).to(torch.float32).clamp(max=1 - 2.0**-24)
    return uniform.reshape(*seeds.shape, *shape)
