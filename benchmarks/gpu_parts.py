"""The parts of `benchmarks.gpu_check`: functions of (device, name of sizes) that yield checks and measured numbers.

On the CPU the operators run their references, so every part also runs where there is no GPU: what the tests do, at
"tiny" sizes. Only Triton's own words and instructions need a GPU (or the interpreter).
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denim import kernels
from denim.benchmarks.baselines import decoded_pixels, linf_step, noisy_patches, reconstruction_loss
from denim.benchmarks.exact_noise import CONTRACT, LARGEST, exact_noise
from denim.benchmarks.gpu_check import Row
from denim.kernels import Domain, Stream, derive_seeds, draw_seeds, noise_words, normal_noise
from denim.kernels.patches import patchify

F64, F32, F16, BF16, U8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8
DTYPES = (F32, F16, BF16)
MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.3), (0.229, 0.224, 0.225, 0.25, 0.2)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    patch_sizes: tuple[int, ...]
    words: int  # a power of two; all of them is 2^32
    draws: int
    attention: tuple[tuple[int, int, int, int], ...]  # (B, heads, N, head_dim)
    levels: tuple[float, ...]
    timed: tuple[tuple[str, bool], ...]  # words that choose cases of `kernels`; with torch.compile beside
    small: str = "tiny"  # preset of the autoencoder that is compiled and captured
    large: str = "base"  # preset of the autoencoder that is timed
    batch: int = 256
    steps: int = 20
    images: int = 16
    backend: str = "inductor"  # of torch.compile


# One case of every operation is also compared with torch.compile, which takes many seconds to compile.
TIMED = (
    "noise_patchify, 224/16, uint8 -> bfloat16",
    "patch_loss, 224/16, uint8, bfloat16, forward + backward",
    "decode_patches, 224/16, input, uint8, bfloat16, forward + backward",
    "attack_step, 224/16, bfloat16",
)
SIZES = {
    "full": Sizes(
        patch_sizes=(2, 4, 8, 14, 16, 32),
        words=1 << 32,
        draws=1 << 26,
        attention=((4, 12, 197, 64), (3, 16, 197, 32), (1, 3, 63, 64), (2, 5, 1000, 80)),
        levels=(0.0, 35.0, 70.0, 105.0, 140.0),
        timed=(*((name, True) for name in TIMED), ("224/16", False)),
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
    ),
    "tiny": Sizes(
        patch_sizes=(2, 4, 14),
        words=1 << 16,
        draws=1 << 12,
        attention=((2, 3, 17, 16),),
        levels=(0.0, 70.0),
        timed=(("attack_step, 32/4, float32", False),),
        small="micro",
        large="micro",
        batch=4,
        steps=2,
        images=2,
        backend="eager",
    ),
}

# Dense bf16 with float32 accumulation, from NVIDIA's data sheets (where those count sparsity: half). Whole names as the
# driver tells them: a slice of a GPU has another name, and is not in the table.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,  # A100 data sheet
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,  # A10 data sheet
    "NVIDIA L4": 121e12,  # L4 data sheet
    "NVIDIA L40S": 362e12,  # L40S data sheet
    "NVIDIA H100 80GB HBM3": 989.4e12,  # H100 architecture white paper
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,  # H100 NVL data sheet
    "NVIDIA H200": 989.4e12,  # H200 data sheet
    "NVIDIA B200": 2250e12,  # HGX B200 data sheet
}


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _share(got: Tensor, exact: Tensor, error: Tensor | float) -> float:
    """Largest error as a share of the allowed one: `error` before the store, and half a unit for the store's rounding.

    NaN, which no limit lets pass, where `got` is NaN or has another shape.
    """
    if got.shape != exact.shape:
        return float("nan")
    information = torch.finfo(got.dtype)
    allowed = error + information.eps / 2 * (exact.abs() + error + information.smallest_normal)
    # An error of nothing where nothing is allowed; and numbers too large for fp16 are infinite on both sides.
    same = got.double() == exact.to(got.dtype).double()
    share = ((got.double() - exact).abs() / allowed).masked_fill(same, 0)
    return float(share.max()) if share.numel() else 0.0


def _check(what: str, got: Tensor, exact: Tensor, error: Tensor | float) -> Row:
    return Row(what, _share(got, exact, error), "of the allowed error", 1.0)


def _rms(got: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error over that of the exact values."""
    return float((got.double() - exact).square().mean().sqrt() / exact.double().square().mean().sqrt())


def _images(device: str, batch: int, height: int, width: int, channels: int, kind: str) -> tuple[Tensor, Tensor]:
    """Images of a kind (uint8, planes, channels_last, strided or a dtype's name), and the same as float64 planes."""
    shape = (batch, height, width, channels)
    pixels = torch.randint(0, 256, shape, generator=_generator(device), dtype=U8, device=device)
    if kind == "uint8":
        return pixels, pixels.permute(0, 3, 1, 2).to(F64) / 255
    if kind == "strided":
        return pixels.transpose(1, 2).contiguous().transpose(1, 2), pixels.permute(0, 3, 1, 2).to(F64) / 255
    planes = pixels.permute(0, 3, 1, 2) / 255  # NHWC memory
    planes = planes if kind == "channels_last" else planes.contiguous()
    planes = {"float16": planes.half, "bfloat16": planes.bfloat16}.get(kind, planes.float)()
    return planes, planes.to(F64)


def _seconds(device: str, function: Callable[[], object], repeats: int) -> list[float]:
    """Times of single calls, sorted; the first call is not among them."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)


def _spread(times: list[float]) -> str:
    return f"median of {len(times)}, {times[0] * 1e3:.2f} to {times[-1] * 1e3:.2f} ms each"


def generator(device: str, sizes: str) -> Iterator[Row]:
    """Words bit for bit those of the torch twin on the CPU; normals within the contract."""
    ends = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
    ids = torch.arange(-8, 8)
    seeds = torch.cat([ends, derive_seeds(2**40, Domain.TRAINING, ids, 3, 5)])
    derived = derive_seeds(2**40, Domain.TRAINING, ids.to(device), 3, 5).cpu()
    yield Row("derived seeds that differ from the CPU's", int((derived != seeds[len(ends) :]).sum()), limit=0)
    count = 4 * 523 + 3
    for stream in Stream:
        differing = noise_words(seeds.to(device), count, stream).cpu() != noise_words(seeds, count, stream)
        yield Row(f"words of {stream.name} that differ from the CPU's", int(differing.sum()), limit=0)
    if device == "cuda":
        from denim.benchmarks.instructions_triton import philox_words

        differing = philox_words(seeds.cuda(), 523).cpu() != noise_words(seeds, 4 * 523)
        yield Row("words of the kernels that differ from the torch twin's", int(differing.sum()), limit=0)
    # A draw in bounded pieces.
    draws, worst = SIZES[sizes].draws, 0.0
    positions = min(draws, 1 << 20)
    for first in range(0, draws // positions, 4):
        some = derive_seeds(1, Domain.TRAINING, torch.arange(first, first + 4, device=device))
        error = (normal_noise(some, (positions,)).double() - exact_noise(some, positions)).abs().max()
        worst = max(worst, float(error)) if error == error else float("nan")
    yield Row(f"largest error of {max(draws, 4 * positions)} normals of `normal_noise`", worst, limit=CONTRACT)


def instructions(device: str, sizes: str) -> Iterator[Row]:
    """The error of lg2, sin and cos over all words, and of the normals that they make."""
    if device != "cuda":
        return
    from denim.benchmarks.instructions_triton import instruction_errors, normals_errors
    from denim.kernels.dispatch import gpu_of

    where, count = torch.device(device), SIZES[sizes].words
    kind = gpu_of(where).instructions
    worst = instruction_errors(where, kind, count=count)
    # What the bound of the contract assumes: PTX ISA, sections on lg2, sin and cos.
    limits = {"lg2": 2.0**-22, "cos": 2.0**-20.5, "sin": 2.0**-20.5}
    for name, (error, word) in worst.items():
        yield Row(f"{name}, {kind}: largest error over {count} words", error, "", limits.get(name), f"at {word:#010x}")
    for name in ("cosine of the angle", "sine of the angle"):
        error, word = normals_errors(where, kind, worst[name].word, count=count)
        what = f"normals: largest error over {count} first words, at the worst {name}"
        yield Row(what, error, "", CONTRACT, f"at {word:#010x}")
    trigonometric = max(worst[name].error for name in ("cosine of the angle", "sine of the angle"))
    # |r' c' - r c| <= |r' - r| |c| + r' |c' - c|, and half a unit for rounding the product.
    bound = worst["radius"].error + (LARGEST + worst["radius"].error) * trigonometric + 2.0**-22
    yield Row("normals: bound over all pairs of words that follows", bound, "", CONTRACT)


# Channels, pixels, leading shapes of sigma and seeds; patch sizes go with them in turn.
NOISE_CASES = (
    (3, "uint8", (), ()),
    (3, "planes", (2,), (3,)),
    (3, "uint8", (2,), (3,)),
    (1, "uint8", (), (2,)),
    (3, "channels_last", (3,), ()),
    (5, "strided", (), ()),
    (1, "bfloat16", (), (2,)),
    (3, "float16", (2,), ()),
)


def _every(patch_sizes: tuple[int, ...], cases: tuple[Any, ...]) -> Iterator[tuple[int, Any, torch.dtype]]:
    """The first two cases with every patch size, the others with one each; dtypes in turn."""
    dtypes = itertools.cycle(DTYPES)
    for index, case in enumerate(cases):
        chosen = patch_sizes if index < 2 else (patch_sizes[index % len(patch_sizes)],)
        for patch in chosen:
            yield patch, case, next(dtypes)


def noise_patchify(device: str, sizes: str) -> Iterator[Row]:
    """Forward against float64 noise from the words; backward against autograd of the published chain in float64."""
    for patch, (channels, kind, levels, draws), dtype in _every(SIZES[sizes].patch_sizes, NOISE_CASES):
        batch, height, width = 3, 3 * patch, 5 * patch
        images, exact_images = _images(device, batch, height, width, channels, kind)
        mean, std = MEAN[:channels], STD[:channels]
        exact_mean, exact_std = (torch.tensor(values, dtype=F64, device=device) for values in (mean, std))
        sigma = torch.rand((*levels, batch), generator=_generator(device), device=device) * 150
        seeds = derive_seeds(3, Domain.TRAINING, torch.arange(batch, device=device))
        seeds = draw_seeds(3, Domain.TRAINING, seeds, draws[0]) if draws else seeds
        images.requires_grad_(images.is_floating_point())
        exact_images.requires_grad_()
        got = kernels.noise_patchify(images, sigma, seeds, patch_size=patch, mean=mean, std=std, dtype=dtype)
        noise = exact_noise(seeds, height * width * channels).unflatten(-1, (height, width, channels))
        exact = noisy_patches(
            exact_images,
            sigma.to(F64),
            exact_mean,
            exact_std,
            patch_size=patch,
            noise=noise.movedim(-1, -3),
            draws=draws,
            dtype=F64,
        )
        # The contract's error; and float32: half a dozen roundings of numbers as large as the value or as 1 / std.
        error = CONTRACT * float(sigma.max()) / (255 * min(std)) + 6 * 2.0**-24 * (exact.detach().abs() + 2 / min(std))
        name = f"patch {patch}, {channels} x {kind}, levels {levels}, draws {draws}, {str(dtype)[6:]}"
        yield _check(name, got.detach(), exact.detach(), error)
        if images.requires_grad:
            upstream = torch.randn(got.shape, generator=_generator(device), device=device).to(dtype)
            got.backward(upstream)
            exact.backward(upstream.to(F64))
            # A float32 sum over levels and draws of terms of a few units each.
            terms = exact.shape[:-3].numel()
            error = (terms + 2) * terms * 2.0**-24 * float(upstream.abs().max()) / min(std)
            yield _check(f"{name}: gradient", images.grad, exact_images.grad, error)


# Channels, pixels, norm_pix, masked.
LOSS_CASES = (
    (3, "uint8", True, False),
    (3, "planes", False, True),
    (1, "bfloat16", True, True),
    (3, "float16", True, False),
    (3, "channels_last", True, False),
    (5, "strided", False, False),
)


def patch_loss(device: str, sizes: str) -> Iterator[Row]:
    """Loss and gradient against the published chain in float64."""
    for patch, (channels, kind, norm_pix, masked), dtype in _every(SIZES[sizes].patch_sizes, LOSS_CASES):
        batch, rows, columns = 3, 3, 5
        images, exact_images = _images(device, batch, rows * patch, columns * patch, channels, kind)
        mean, std = MEAN[:channels], STD[:channels]
        exact_mean, exact_std = (torch.tensor(values, dtype=F64, device=device) for values in (mean, std))
        shape = (batch, rows * columns, patch * patch * channels)
        prediction = torch.randn(shape, generator=_generator(device), device=device).to(dtype).requires_grad_()
        mask = None
        if masked:
            mask = torch.rand(shape[:2], generator=_generator(device), device=device) < 0.75
        exact_prediction = prediction.detach().to(F64).requires_grad_()
        got = kernels.patch_loss(prediction, images, patch_size=patch, mean=mean, std=std, norm_pix=norm_pix, mask=mask)
        exact = reconstruction_loss(
            exact_prediction, exact_images, exact_mean, exact_std, patch_size=patch, norm_pix=norm_pix, mask=mask
        )
        name = f"patch {patch}, {channels} x {kind}, norm_pix {norm_pix}, masked {masked}, {str(dtype)[6:]}"
        # A hundred and sixty roundings: of a sum of positive numbers, and of targets that a small variance enlarges.
        yield _check(f"{name}: loss", got.detach(), exact.detach(), 1e-5 * exact.item())
        # The upstream gradient is not 1: a backward that ignores it must not pass.
        (got * 3).backward()
        (exact * 3).backward()
        error = 1e-5 * float(exact_prediction.grad.abs().max())
        yield _check(f"{name}: gradient", prediction.grad, exact_prediction.grad, error)


# Leading dimensions before the batch, channels, statistics, source.
DECODE_CASES = (
    ((2,), 3, "input", "planes"),
    ((), 3, None, ""),
    ((), 3, "input", "uint8"),
    ((2,), 3, "noisy", "float32"),
    ((), 1, "input", "bfloat16"),
    ((2, 2), 1, "noisy", "float16"),
    ((), 5, "input", "strided"),
    ((2,), 1, None, ""),
)


def decode_patches(device: str, sizes: str) -> Iterator[Row]:
    """Pixels or a classifier's patches, and gradients to prediction and source, against the published chain."""
    # Five turns of the output meet every patch size and dtype.
    outputs = itertools.cycle((None, BF16, None, F16, F32))
    for patch, (lead, channels, statistics_, kind), dtype in _every(SIZES[sizes].patch_sizes, DECODE_CASES):
        batch, img_size, output = 3, (3 * patch, 5 * patch), next(outputs)
        mean, std = MEAN[:channels], STD[:channels]
        exact_mean, exact_std = (torch.tensor(values, dtype=F64, device=device) for values in (mean, std))
        shape = (*lead, batch, 15, patch * patch * channels)
        # Wide enough for many pixels to end up on both sides of 0 and 1.
        prediction = (2 * torch.randn(shape, generator=_generator(device), device=device)).to(dtype)
        source, exact_source, sigma = None, None, None
        if statistics_ == "input":
            source, exact_source = _images(device, batch, *img_size, channels, kind)
        if statistics_ == "noisy":
            source = 2 * torch.randn(shape, generator=_generator(device).manual_seed(1), device=device)
            source = source.to(getattr(torch, kind))
            exact_source = source.to(F64)
            sigma = torch.linspace(20, 130, batch, device=device).expand(shape[:-2])
        leaves = [tensor for tensor in (prediction, source) if tensor is not None and tensor.is_floating_point()]
        exact_prediction = prediction.to(F64)
        exact_leaves = [exact_prediction] + ([exact_source] if len(leaves) == 2 and exact_source is not None else [])
        for leaf in leaves + exact_leaves:
            leaf.requires_grad_()
        options: dict[str, Any] = {"img_size": img_size, "patch_size": patch, "statistics": statistics_}
        # The classifier's own statistics: those of the pixels, the other way round.
        normal = (mean[::-1], std[::-1])
        got = kernels.decode_patches(
            prediction,
            mean=mean,
            std=std,
            source=source,
            sigma=sigma,
            normalize=None if output is None else normal,
            dtype=output,
            **options,
        )
        exact_sigma = None if sigma is None else sigma.to(F64)
        chain = functools.partial(
            decoded_pixels, mean=exact_mean, std=exact_std, source=exact_source, sigma=exact_sigma, **options
        )
        exact = chain(exact_prediction)
        # No gradient arrives where rounding may carry a pixel over an end of [0, 1].
        low, high = (chain(exact_prediction.detach() + shift) for shift in (-1e-3, 1e-3))
        edge = ((low == 0) != (high == 0)) | ((low == 1) != (high == 1))
        # A handful of roundings, and sums over a patch of some ten units in the last place, times predictions up to 10.
        error = 100 * 2.0**-24
        if output is not None:
            exact, edge = (patchify(tensor.movedim(-3, -1).flatten(0, -4), patch) for tensor in (exact, edge))
            centre, deviation = (torch.tensor(values * patch**2, dtype=F64, device=device) for values in normal)
            exact, edge = ((exact - centre) / deviation).view(shape), edge.view(shape)
            error /= min(std)
        kind = f"{statistics_ or 'raw'} {kind}".strip()
        target = "pixels" if output is None else f"{str(output)[6:]} patches"
        name = f"patch {patch}, {channels} channels, {kind}, lead {lead}, {str(dtype)[6:]} to {target}"
        yield _check(name, got.detach(), exact.detach(), error)
        upstream = (
            torch.randn(got.shape, generator=_generator(device), device=device).masked_fill(edge, 0).to(got.dtype)
        )
        gradients = torch.autograd.grad(got, leaves, upstream)
        exact_gradients = torch.autograd.grad(exact, exact_leaves, upstream.to(F64))
        for leaf, gradient, exact_gradient in zip(("prediction", "source"), gradients, exact_gradients, strict=False):
            error = 2e-5 * float(exact_gradient.abs().max())
            yield _check(f"{name}: gradient of the {leaf}", gradient, exact_gradient, error)


def attack(device: str, sizes: str) -> Iterator[Row]:
    """Steps against the published chain in float64; starts bit for bit those of the CPU, and within the ball."""
    shapes = ((3, 3, 15, 17), (2, 1, 7, 5), (5, 3, 32, 32))
    for shape, dtype in itertools.product(shapes, DTYPES):
        random = functools.partial(torch.rand, generator=_generator(device), device=device)
        origin = random(shape).to(dtype)
        pixels = (origin + 0.05 * (2 * random(shape) - 1)).clamp(0, 1).to(dtype)
        gradient = (random(shape) - 0.5).masked_fill(random(shape) < 0.1, 0).to(dtype)
        per_sample = {"step_size": 0.02 * random(shape[0]) - 0.005, "epsilon": 0.06 * random(shape[0])}
        got = kernels.attack_step(pixels, origin, gradient, **per_sample)
        exact_sizes = {name: size.to(F64) for name, size in per_sample.items()}
        exact = linf_step(pixels.to(F64), origin.to(F64), gradient.to(F64), **exact_sizes)
        name = f"{shape}, {str(dtype)[6:]}"
        yield _check(f"{name}: step", got, exact, 4 * 2.0**-24)
        nan = kernels.attack_step(pixels, origin, torch.full_like(gradient, float("nan")), **per_sample)
        yield Row(f"{name}: NaN gradients that became a step", int((~nan.isnan()).sum()), limit=0)
        seeds = derive_seeds(4, Domain.ATTACK, torch.arange(shape[0], device=device))
        start = kernels.attack_start(origin, seeds, epsilon=per_sample["epsilon"])
        there = kernels.attack_start(origin.cpu(), seeds.cpu(), epsilon=per_sample["epsilon"].cpu())
        yield Row(f"{name}: starts that differ from the CPU's", int((start.cpu() != there).sum()), limit=0)
        uniform = (noise_words(seeds, origin[0].numel(), Stream.START).to(F64) + 0.5) * 2.0**-32
        radius = exact_sizes["epsilon"].view(-1, 1, 1, 1)
        exact = (origin.to(F64) + radius * (2 * uniform.view(shape) - 1)).clamp(0, 1)
        yield _check(f"{name}: start", start, exact, 4 * 2.0**-24)


def attention(device: str, sizes: str) -> Iterator[Row]:
    """Every backend, on views of packed qkv, forward and backward against float64."""

    def run(packed: Tensor, upstream: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        out = kernels.attention(query, key, value, backend=backend)
        return out.detach(), torch.autograd.grad(out, packed, upstream)[0]

    for (batch, heads, length, dim), dtype in itertools.product(SIZES[sizes].attention, DTYPES):
        shape = (batch, length, 3, heads, dim)
        packed = torch.randn(shape, generator=_generator(device), device=device).to(dtype).requires_grad_()
        upstream = torch.randn((batch, heads, length, dim), generator=_generator(device), device=device).to(dtype)
        exact = run(packed.detach().to(F64).requires_grad_(), upstream.to(F64), "math")
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        for backend, reasons in kernels.attention_backends(query, key, value).items():
            name = f"({batch}, {heads}, {length}, {dim}), {str(dtype)[6:]}: {backend}"
            if reasons:
                yield Row(f"{name}: does not serve", 0, "", 0, "; ".join(reasons))
                continue
            # Probabilities and outputs are rounded once each, scores (a few units) before the exponential too; the
            # gradient adds one more product of each. RMS error over RMS value, as errors average out over a row. In
            # float32 the kernels make a product of three TF32 ones and sum up to a thousand: eight times as much.
            output, gradient = run(packed, upstream, backend)
            unit = torch.finfo(dtype).eps * (8 if dtype == F32 else 1)
            yield Row(f"{name}: output", _rms(output, exact[0]), "relative RMS error", 4 * unit)
            yield Row(f"{name}: gradient", _rms(gradient, exact[1]), "relative RMS error", 8 * unit)


def _autoencoder(device: str, name: str) -> Any:
    from denim.nim.autoencoder import Autoencoder, preset

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(preset(name)).to(device)


def _batch(device: str, model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, levels and seeds for a model."""
    config = model.config
    images, _ = _images(device, batch, *config.img_size, config.channels, "uint8")
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(batch, device=device))
    return images, torch.linspace(20, 130, batch, device=device), seeds


def _loss(model: Any, images: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
    """The loss of noisy image modeling (`denim.nim.Objective`, whose noise levels would need scipy)."""
    config = model.config
    pixel = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
    loss: Tensor = kernels.patch_loss(model(kernels.noise_patchify(images, sigma, seeds, **pixel)), images, **pixel)
    return loss


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def compiled_and_captured(device: str, sizes: str) -> Iterator[Row]:
    """noise_patchify, autoencoder and patch_loss in one compiled graph, and replayed as a CUDA graph."""
    size = SIZES[sizes]
    model = _autoencoder(device, size.small)
    images, sigma, seeds = _batch(device, model, 4)
    others = [derive_seeds(draw, Domain.SCORE, torch.arange(4, device=device)) for draw in (1, 2)]

    def eager(these: Tensor) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = _loss(model, images, sigma, these)
        loss.backward()
        return loss.item(), _gradients(model)

    expected = {draw: eager(these) for draw, these in enumerate((seeds, *others))}
    function = torch.compile(functools.partial(_loss, model), fullgraph=True, backend=size.backend)
    for draw, these in enumerate((seeds, *others)):
        model.zero_grad(set_to_none=True)
        loss = function(images, sigma, these)
        loss.backward()
        # float32 throughout; only the order of sums differs, through some dozens of layers.
        yield Row(f"compiled, draw {draw}: loss", abs(loss.item() / expected[draw][0] - 1), "relative error", 1e-5)
        yield Row(f"compiled, draw {draw}: gradients", _rms(_gradients(model), expected[draw][1]), "relative", 1e-3)
    yield Row("draws of other seeds with an equal loss", 3 - len({loss for loss, _ in expected.values()}), limit=0)
    if device != "cuda":
        return
    for name, captured in (("eager", functools.partial(_loss, model)), ("compiled", function)):
        buffer = seeds.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                captured(images, sigma, buffer).backward()
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = captured(images, sigma, buffer)
            loss.backward()
        for draw, these in enumerate((seeds, *others)):
            buffer.copy_(these)
            graph.replay()
            what = f"{name}, captured, replayed with draw {draw}"
            yield Row(f"{what}: loss", abs(loss.item() / expected[draw][0] - 1), "relative error", 1e-5)
            yield Row(f"{what}: gradients", _rms(_gradients(model), expected[draw][1]), "relative", 1e-3)


def model_flops(model: Any, loss: Callable[[], Tensor]) -> int:
    """Floating point operations of the matrix products of one forward and backward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from denim.nim.attention import set_attention

    # Plain products: fused attention would also count what its backward computes again, or not be counted at all.
    set_attention(model, "math")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    set_attention(model, "auto")
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def pretraining(device: str, sizes: str) -> Iterator[Row]:
    """A whole pretraining step in bf16: images per second and the share of the device's arithmetic that is used."""
    size = SIZES[sizes]
    batch = size.batch
    while True:
        try:
            yield from _pretraining(device, size, batch)
            return
        except torch.OutOfMemoryError:
            if batch < 2:
                raise
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def _pretraining(device: str, size: Sizes, batch: int) -> Iterator[Row]:
    model = _autoencoder(device, size.large)
    images, sigma, seeds = _batch(device, model, batch)
    precision = functools.partial(torch.autocast, device, torch.bfloat16)
    # In float32, in parts of equal size: whole, their activations may not fit.
    part = min(batch, 16)
    exact = 0.0
    for first in range(0, batch, part):
        rows = slice(first, first + part)
        loss = _loss(model, images[rows], sigma[rows], seeds[rows]) * (part / batch)
        loss.backward()
        exact += loss.item()
    gradients = _gradients(model)
    model.zero_grad(set_to_none=True)

    function = torch.compile(functools.partial(_loss, model), fullgraph=True, backend=size.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def forward_backward() -> Tensor:
        with precision():
            loss = function(images, sigma, seeds)
        loss.backward()
        return loss.detach()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward()
        optimizer.step()

    before = forward_backward()
    errors = before.item() / exact - 1, _rms(_gradients(model), gradients.double())
    # Every product has inputs of 8 bits; the loss averages over very many of them, the gradient goes through 20 blocks.
    rows = [
        Row("loss in bf16 against float32", abs(errors[0]), "relative error", 0.01),
        Row("gradients in bf16 against float32", errors[1], "relative RMS error", 0.1),
    ]
    del gradients
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = _seconds(device, step, size.steps)
    after = forward_backward()
    rows.append(Row("loss after the steps over loss before them", after.item() / before.item(), "", 1.0))
    yield from rows
    seconds = statistics.median(times)
    note = f"{size.large}, batch {batch}" + (f" ({size.batch} did not fit)" if batch < size.batch else "")
    yield Row("pretraining step", seconds * 1e3, "ms", note=f"{note}; {_spread(times)}")
    yield Row("pretraining", batch / seconds, "images/s", note=note)
    if device == "cuda":
        yield Row("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", note=note)
    few = min(batch, 2)

    def counted() -> Tensor:
        with precision():
            return _loss(model, images[:few], sigma[:few], seeds[:few])

    flops = model_flops(model, counted) / few
    yield Row("model arithmetic", flops / 1e9, "GFLOP/image", note="matrix products, forward and backward")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = PEAK_FLOPS.get(name)
    if peak is None:
        yield Row("achieved", flops * batch / seconds / 1e12, "TFLOP/s", note=f"peak of {name!r} is not in the table")
    else:
        utilisation = flops * batch / seconds / peak
        yield Row("model-FLOP utilisation", 100 * utilisation, "%", note=f"of {peak / 1e12:g} TFLOP/s dense bf16")


def sweep(device: str, sizes: str) -> Iterator[Row]:
    """De^3 at many levels and draws: noise, denoise, decode, classify, all combinations in one batch."""
    from denim.nim.classifier import Classifier, ClassifierConfig
    from denim.nim.reconstruction import reconstruct

    size, draws = SIZES[sizes], 4
    denoiser = _autoencoder(device, size.large).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(ClassifierConfig.for_encoder(denoiser.config, 1000)).to(device).eval()
        # The published initialisation makes all logits alike, and a comparison of them empty.
        nn.init.normal_(classifier.head.weight, std=0.05)
    pixels, _ = _images(device, size.images, *denoiser.config.img_size, denoiser.config.channels, "planes")
    seeds = draw_seeds(0, Domain.SCORE, torch.arange(size.images, device=device), draws)
    sigma = torch.tensor(size.levels, device=device)[:, None].expand(-1, size.images)

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            patches = reconstruct(denoiser, pixels, sigma, seeds, classifier=classifier)
            return classifier.forward_patches(patches.flatten(0, -3)).unflatten(0, patches.shape[:-2])

    with torch.inference_mode():
        logits = run()
        count = logits.shape[:-1].numel()
        for level, draw, image in ((0, 0, 0), (-1, -1, -1), (-1, 0, 0)):
            one = slice(image, None) if image < 0 else slice(image, image + 1)
            alone = classifier(reconstruct(denoiser, pixels[one], sigma[level, one], seeds[draw, one]))[0]
            # In float32 and through pixels, against bf16 and patches: products have inputs of 8 bits. The logits of
            # another draw are 0.24 away, of another image or level further.
            error = _rms(logits[level, draw, image], alone.double())
            what = f"logits of level {size.levels[level]:g}, draw {draw % draws}, image {image % size.images}"
            yield Row(f"{what} against float32 alone", error, "relative RMS error", 0.1)

        times = _seconds(device, run, size.steps)
    note = f"{size.large}, {size.images} images x {len(size.levels)} levels x {draws} draws, bf16; {_spread(times)}"
    yield Row("De^3 sweep", count / statistics.median(times), "noisy images/s", note=note)


def kernel_times(device: str, sizes: str) -> Iterator[Row]:
    """`denim bench kernels`: times with a cold L2, against the published chain and what else a user would have."""
    from denim.benchmarks import kernels as bench

    batch, seen = (1 if sizes == "tiny" else None), set()
    for word, compile in SIZES[sizes].timed:
        for record in bench.run(device, [word], batch, seconds=0.1, compile=compile):
            if record.case in seen:
                continue
            seen.add(record.case)
            yield Row(f"{record.case}: error", record.error, "of the allowed error", 1.0)
            note = f"batch {record.batch}; {record.gigabytes_per_second:.0f} GB/s of what has to move at least"
            yield Row(f"{record.case}: time", record.best_seconds["fused"] * 1e3, "ms", note=note)
            yield Row(f"{record.case}: speed of a copy", 100 * record.copy_share, "%")
            for name, ratio in record.ratios.items():
                yield Row(f"{record.case}: {name}", ratio, "times as long")
            for name, reason in record.absent.items():
                if name == "compiled" and compile:
                    yield Row(f"{record.case}: {name} did not run", 1, limit=0, note=reason)
