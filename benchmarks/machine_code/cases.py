"""The kernels and configurations that the ahead-of-time report builds: one entry of `CASES` each.

An entry calls a kernel's own launcher on tensors without memory (device "meta") in the sizes of real work, so a kernel
is specialised as on the GPU, and the grid tells how many programs an image takes, tails included. Entries are chosen
so that every branch that is decided when a kernel is built is built: not the product of all options.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from denim.kernels import attack_step_triton, decode_patches_triton, noise_patchify_triton, patch_loss_triton
from denim.kernels.dispatch import GPU

__all__ = ["CASES", "Case", "Work"]

# Divisible by 2, 4, 8, 14, 16 and 32.
SIDE = 224
BATCH = 64
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Work(NamedTuple):
    """What one launch does: the sizes that its machine instructions and bytes are divided by."""

    images: int
    elements: int
    """Output elements; of a loss, elements of the prediction."""
    moved: int
    """Bytes that the kernel reads and writes, a tensor counted as often as the kernel goes through it."""
    minimum: int
    """Bytes when every input is read once and every output written once."""
    written: int
    """Bytes of the outputs."""
    trips: tuple[int, ...] = ()
    """How often the kernel's loops run, outermost first."""


class Case(NamedTuple):
    """One kernel in one configuration."""

    operation: str
    configuration: str
    kernel: Any
    launch: Callable[[GPUTarget], Work]
    """Calls the launcher for a GPU."""
    also: tuple[Any, ...] = ()
    """Other kernels that the launcher starts."""
    draws: str = ""
    """"normal" or "uniform" numbers, if the kernel draws any."""
    rounds: bool = False
    """The kernel stores bfloat16, which has to be rounded to."""

    @property
    def name(self) -> str:
        """What `--only` and the budgets call it."""
        return f"{self.operation}, {self.configuration}"


def _gpu(target: GPUTarget) -> GPU:
    return GPU("ptx" if target.backend == "cuda" else "gcn", target.warp_size)


def _empty(
    *shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _work(
    elements: int, reads: Sequence[tuple[Tensor | None, int]], writes: Sequence[Tensor], trips: tuple[int, ...] = ()
) -> Work:
    written = sum(tensor.nbytes for tensor in writes)
    read = [(tensor.nbytes, times) for tensor, times in reads if tensor is not None]
    return Work(
        BATCH,
        elements,
        sum(size * times for size, times in read) + written,
        sum(size for size, _ in read) + written,
        written,
        trips,
    )


def _images(pixels: str, channels: int) -> Tensor:
    """`pixels`: "uint8", or a floating dtype, of channels_last memory where that is said behind it."""
    if pixels == "uint8":
        return _empty(BATCH, SIDE, SIDE, channels, dtype=torch.uint8)
    dtype, *last = pixels.split()
    layout = torch.channels_last if last else torch.contiguous_format
    return _empty(BATCH, channels, SIDE, SIDE, dtype=getattr(torch, dtype), layout=layout)


def _statistics(channels: int) -> tuple[list[float], list[float]]:
    return [0.5] * channels, [0.25] * channels


def _noise(
    pixels: str = "uint8",
    patch: int = 16,
    dtype: torch.dtype = BF16,
    channels: int = 3,
    levels: int = 1,
    draws: int = 1,
    threads: int = noise_patchify_triton.CONFIGURATIONS[0],
    *,
    gpu: GPUTarget,
) -> Work:
    images = _images(pixels, channels)
    sigma, seeds = _empty(levels, BATCH), _empty(draws, BATCH, dtype=torch.int64)
    mean, std = _statistics(channels)
    given = (images, sigma, seeds, patch, mean, std, dtype)
    out = noise_patchify_triton.launch(*given, gpu=_gpu(gpu), configurations=(threads,))
    # A loop over one level or one draw is none in machine code.
    loops = tuple(trips for trips in (draws, levels) if trips > 1)
    return _work(out.numel(), [(images, 1), (sigma, 1), (seeds, 1)], [out], loops)


def _noise_backward(
    grad: torch.dtype = BF16,
    dtype: torch.dtype = FP32,
    patch: int = 16,
    channels: int = 3,
    leads: int = 1,
    threads: int = noise_patchify_triton.CONFIGURATIONS[0],
    *,
    gpu: GPUTarget,
) -> Work:
    upstream = _empty(leads, BATCH, (SIDE // patch) ** 2, patch * patch * channels, dtype=grad)
    given = (upstream, SIDE, SIDE, patch, _statistics(channels)[1], dtype)
    out = noise_patchify_triton.launch_backward(*given, gpu=_gpu(gpu), configurations=(threads,))
    return _work(out.numel(), [(upstream, 1)], [out], (leads,) if leads > 1 else ())


def _loss(
    part: str,
    pixels: str = "uint8",
    patch: int = 16,
    dtype: torch.dtype = BF16,
    channels: int = 3,
    norm_pix: bool = True,
    masked: bool = False,
    *,
    gpu: GPUTarget,
) -> Work:
    images, length = _images(pixels, channels), (SIDE // patch) ** 2
    prediction = _empty(BATCH, length, patch * patch * channels, dtype=dtype)
    mask = _empty(BATCH, length, dtype=torch.bool) if masked else None
    mean, std = _statistics(channels)
    given = (prediction, images, mask, patch, mean, std, norm_pix)
    reads = [(prediction, 1), (images, 1), (mask, 1)]
    if part == "backward":
        out = patch_loss_triton.launch_backward(_empty(), *given, gpu=_gpu(gpu))
        return _work(prediction.numel(), reads, [out])
    patch_loss_triton.launch(*given, gpu=_gpu(gpu))
    cut = patch_loss_triton.tile(patch, channels)
    assert cut is not None
    partials = BATCH * math.ceil(length / max(1, 128 // cut["RUNS"]))
    if part == "forward":
        return _work(prediction.numel(), reads, [_empty(partials)])
    return _work(partials, [(_empty(partials), 1)], [_empty()], (math.ceil(partials / patch_loss_triton.PARTIALS),))


def _decode(
    part: str,
    statistics: str = "input",
    pixels: str = "uint8",
    patch: int = 16,
    dtype: torch.dtype = BF16,
    channels: int = 3,
    leads: int = 1,
    patches: bool = False,
    fixed: bool = False,
    *,
    gpu: GPUTarget,
) -> Work:
    """`patches`: into normalised patches of the prediction's dtype, not images. `fixed`: no gradient for the source."""
    length = (SIDE // patch) ** 2
    prediction = _empty(leads, BATCH, length, patch * patch * channels, dtype=dtype)
    source = sigma = None
    if statistics == "input":
        source = _images(pixels, channels)
    if statistics == "noisy":
        source, sigma = torch.empty_like(prediction), _empty(BATCH)
    mean, std = _statistics(channels)
    normal_mean, normal_std = (mean, std) if patches else ((), ())
    if part == "forward":
        out = decode_patches_triton.launch(
            prediction,
            source,
            sigma,
            SIDE,
            SIDE,
            patch,
            mean,
            std,
            statistics,
            normal_mean,
            normal_std,
            dtype if patches else FP32,
            gpu=_gpu(gpu),
        )
        return _work(out.numel(), [(prediction, 1), (source, leads), (sigma, 1)], [out])
    grad = torch.empty_like(prediction) if patches else _empty(leads, BATCH, channels, SIDE, SIDE)
    outputs = decode_patches_triton.launch_backward(
        grad, prediction, source, sigma, patch, mean, std, statistics, normal_std, not fixed, gpu=_gpu(gpu)
    )
    # Gradients reach the source through its values alone: bytes have none, but still give the statistics.
    return _work(
        sum(output.numel() for output in outputs),
        [(grad, 1), (prediction, 1), (source, 1), (sigma, 1)],
        outputs,
        (leads,) if leads > 1 else (),
    )


def _attack(
    dtype: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    elements: int = 3 * SIDE * SIDE,
    cut: tuple[int, int] = attack_step_triton.CONFIGURATIONS[0],
    *,
    gpu: GPUTarget,
) -> Work:
    pixels, origin = (_empty(BATCH, elements, dtype=dtype) for _ in range(2))
    slope, size = _empty(BATCH, elements, dtype=gradient), _empty(BATCH)
    given = (pixels, origin, slope, size, size)
    out = attack_step_triton.launch(*given, gpu=_gpu(gpu), configurations=(cut,))
    return _work(out.numel(), [(pixels, 1), (origin, 1), (slope, 1), (size, 2)], [out])


def _attack_start(dtype: torch.dtype = FP32, elements: int = 3 * SIDE * SIDE, *, gpu: GPUTarget) -> Work:
    pixels, seeds, epsilon = _empty(BATCH, elements, dtype=dtype), _empty(BATCH, dtype=torch.int64), _empty(BATCH)
    out = attack_step_triton.launch_start(pixels, seeds, epsilon, gpu=_gpu(gpu))
    return _work(out.numel(), [(pixels, 1), (seeds, 1), (epsilon, 1)], [out])


def _noise_patchify(configuration: str, *options: Any, **more: Any) -> Case:
    kernel = noise_patchify_triton.noise_patchify_kernel
    launch = functools.partial(_noise, *options, **more)
    rounds = more.get("dtype", BF16) == BF16
    return Case(
        "noise_patchify forward", configuration, kernel, lambda gpu: launch(gpu=gpu), draws="normal", rounds=rounds
    )


def _noise_patchify_backward(configuration: str, **options: Any) -> Case:
    kernel = noise_patchify_triton.noise_patchify_backward_kernel
    launch = functools.partial(_noise_backward, **options)
    rounds = options.get("dtype") == BF16
    return Case("noise_patchify backward", configuration, kernel, lambda gpu: launch(gpu=gpu), rounds=rounds)


def _patch_loss(part: str, configuration: str, *options: Any, **more: Any) -> Case:
    first, second = patch_loss_triton.partials_kernel, patch_loss_triton.loss_kernel
    kernel, also = {
        "forward": (first, (second,)),
        "sum": (second, (first,)),
        "backward": (patch_loss_triton.prediction_grad_kernel, ()),
    }[part]
    launch = functools.partial(_loss, part, *options, **more)
    rounds = part == "backward" and more.get("dtype", BF16) == BF16
    return Case(f"patch_loss {part}", configuration, kernel, lambda gpu: launch(gpu=gpu), also, rounds=rounds)


def _decode_patches(part: str, configuration: str, *options: Any, **more: Any) -> Case:
    module = decode_patches_triton
    kernel = module.decode_kernel if part == "forward" else module.decode_backward_kernel
    launch = functools.partial(_decode, part, *options, **more)
    rounds = (part == "backward" or more.get("patches", False)) and more.get("dtype", BF16) == BF16
    return Case(f"decode_patches {part}", configuration, kernel, lambda gpu: launch(gpu=gpu), rounds=rounds)


def _attack_step(configuration: str, *options: Any, **more: Any) -> Case:
    kernel = attack_step_triton.attack_step_kernel
    launch = functools.partial(_attack, *options, **more)
    return Case("attack_step", configuration, kernel, lambda gpu: launch(gpu=gpu), rounds=BF16 in options[:1])


def _attack_step_start(configuration: str, *options: Any) -> Case:
    kernel = attack_step_triton.attack_start_kernel
    launch = functools.partial(_attack_start, *options)
    rounds = BF16 in options[:1]
    return Case("attack_start", configuration, kernel, lambda gpu: launch(gpu=gpu), draws="uniform", rounds=rounds)


CASES: tuple[Case, ...] = (
    _noise_patchify("uint8, patch 16, bf16"),
    *(
        _noise_patchify(f"uint8, patch 16, bf16, {threads} threads", threads=threads)
        for threads in noise_patchify_triton.CONFIGURATIONS[1:]
    ),
    _noise_patchify("uint8, patch 16, fp32", dtype=FP32),
    _noise_patchify("uint8, patch 2, bf16", patch=2),
    _noise_patchify("uint8, patch 4, bf16", patch=4),
    _noise_patchify("uint8, patch 8, bf16", patch=8),
    _noise_patchify("uint8, patch 14, bf16", patch=14),
    _noise_patchify("uint8, patch 32, bf16", patch=32),
    _noise_patchify("uint8, patch 16, bf16, 1 channel", channels=1),
    _noise_patchify("uint8, patch 4, fp32, 1 channel", patch=4, dtype=FP32, channels=1),
    _noise_patchify("uint8, patch 16, bf16, 5 channels", channels=5),
    _noise_patchify("fp32 planes, patch 16, bf16", "float32"),
    _noise_patchify("fp32 planes, patch 14, fp32", "float32", patch=14, dtype=FP32),
    _noise_patchify("fp32 channels_last, patch 16, bf16", "float32 channels_last"),
    _noise_patchify("uint8, patch 16, bf16, 4 levels", levels=4),
    _noise_patchify("uint8, patch 16, bf16, 4 draws", draws=4),
    _noise_patchify("uint8, patch 16, bf16, 4 levels of 2 draws", levels=4, draws=2),
    _noise_patchify("fp32 planes, patch 16, bf16, 4 levels of 2 draws", "float32", levels=4, draws=2),
    _noise_patchify_backward("bf16 to fp32, patch 16"),
    *(
        _noise_patchify_backward(f"bf16 to fp32, patch 16, {threads} threads", threads=threads)
        for threads in noise_patchify_triton.CONFIGURATIONS[1:]
    ),
    _noise_patchify_backward("bf16 to fp32, patch 16, 8 leads", leads=8),
    _noise_patchify_backward("fp32 to fp32, patch 16", grad=FP32),
    _noise_patchify_backward("bf16 to fp32, patch 4", patch=4),
    _noise_patchify_backward("bf16 to bf16, patch 14", dtype=BF16, patch=14),
    *(
        _patch_loss(part, configuration, **more)
        for part in ("forward", "backward")
        for configuration, more in (
            ("uint8, patch 16, bf16", {}),
            ("uint8, patch 16, fp32", {"dtype": FP32}),
            ("uint8, patch 16, bf16, raw target", {"norm_pix": False}),
            ("uint8, patch 16, bf16, masked", {"masked": True}),
            ("uint8, patch 4, bf16", {"patch": 4}),
            ("uint8, patch 14, bf16", {"patch": 14}),
            ("uint8, patch 32, bf16", {"patch": 32}),
            ("fp32 planes, patch 16, bf16", {"pixels": "float32"}),
        )
    ),
    _patch_loss("forward", "uint8, patch 2, bf16", patch=2),
    _patch_loss("forward", "uint8, patch 8, fp16", patch=8, dtype=FP16),
    _patch_loss("forward", "uint8, patch 4, fp32, 1 channel", patch=4, dtype=FP32, channels=1),
    _patch_loss("forward", "uint8, patch 16, bf16, 5 channels", channels=5),
    _patch_loss("forward", "fp32 channels_last, patch 16, bf16", pixels="float32 channels_last"),
    _patch_loss("sum", "uint8, patch 16, bf16"),
    _patch_loss("sum", "uint8, patch 16, bf16, masked", masked=True),
    *(
        _decode_patches(part, configuration, **more)
        for part in ("forward", "backward")
        for configuration, more in (
            ("input, uint8, patch 16, bf16", {}),
            ("input, uint8, patch 16, bf16, 4 leads", {"leads": 4}),
            ("input, uint8, patch 16, fp32", {"dtype": FP32}),
            ("input, uint8, patch 4, bf16", {"patch": 4}),
            ("input, uint8, patch 32, bf16", {"patch": 32}),
            ("input, fp32 planes, patch 16, bf16", {"pixels": "float32"}),
            ("input, fp32 planes, patch 14, bf16", {"pixels": "float32", "patch": 14}),
            ("noisy, patch 16, bf16", {"statistics": "noisy"}),
            ("raw, patch 16, bf16", {"statistics": "raw"}),
            ("input, fp32 planes, patch 16, bf16, to patches", {"pixels": "float32", "patches": True}),
            ("noisy, patch 16, bf16, to patches", {"statistics": "noisy", "patches": True}),
            ("raw, patch 4, bf16, to patches", {"statistics": "raw", "patch": 4, "patches": True}),
        )
    ),
    _decode_patches("forward", "input, uint8, patch 2, bf16", patch=2),
    _decode_patches("forward", "input, uint8, patch 8, fp16", patch=8, dtype=FP16),
    _decode_patches("forward", "input, uint8, patch 4, fp32, 1 channel", patch=4, dtype=FP32, channels=1),
    _decode_patches("backward", "noisy, patch 16, bf16, fixed source", statistics="noisy", fixed=True),
    _attack_step("fp32"),
    *(_attack_step(f"fp32, {cut[0]} threads", cut=cut) for cut in attack_step_triton.CONFIGURATIONS[1:]),
    _attack_step("bf16", BF16, BF16),
    _attack_step("fp32, odd size", FP32, FP32, 3 * 35 * 35),
    _attack_step_start("fp32"),
    _attack_step_start("bf16", BF16),
    _attack_step_start("fp32, odd size", FP32, 3 * 35 * 35),
)
