"""The parts of `benchmarks.gpu_check` that run models: whole steps, and times of kernels.

Each part is a function of the kind of device and the name of the sizes that yields checks and measured numbers. It also
runs on the CPU, as the tests do at "tiny" sizes.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from denim import kernels
from denim.benchmarks.gpu_operators import relative_rms
from denim.benchmarks.gpu_rows import SIZES, Row, Sizes
from denim.benchmarks.timing import step_seconds
from denim.kernels import Domain, derive_seeds, draw_seeds

__all__ = ["compiled_and_captured", "kernel_times", "model_flops", "pretraining", "sweep"]

# Dense bf16 with float32 accumulation, by NVIDIA's data sheets (half the number where they count sparsity). The keys
# are the driver's names; a slice of a GPU has another name and is not in the table.
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


def _times(device: str, function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of calls one behind another, sorted."""
    return sorted(step_seconds(function, torch.device(device), repeats))


def _spread(times: list[float]) -> str:
    return f"median of {len(times)}, {times[0] * 1e3:.2f} to {times[-1] * 1e3:.2f} ms each"


def _images(device: str, model: Any, batch: int) -> Tensor:
    """Random bytes (B, H, W, C) for a model."""
    shape = (batch, *model.config.img_size, model.config.channels)
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)


def _autoencoder(device: str, name: str) -> Any:
    from denim.nim.autoencoder import Autoencoder, preset

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(preset(name)).to(device)


def _batch(device: str, model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, levels and seeds for a model."""
    images = _images(device, model, batch)
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(batch, device=device))
    return images, torch.linspace(20, 130, batch, device=device), seeds


def _loss(model: Any, images: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
    """The loss of noisy image modeling (`denim.nim.Objective`, whose noise levels would need scipy)."""
    config = model.config
    pixel = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
    loss: Tensor = kernels.patch_loss(
        model(kernels.noise_patchify(images, sigma, seeds, dtype=model.patch_dtype, **pixel)), images, **pixel
    )
    return loss


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def _pass(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one forward and backward pass.

    Neither is attached to the graph of the pass, which is gone when this returns. A graph that is still there during a
    capture makes torch fail: its AccumulateGrad nodes, which later passes share, belong to the stream of the pass that
    made them.
    """
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach(), _gradients(model)


def _agreement(what: str, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Iterator[Row]:
    # float32 throughout; only the order of sums differs, through some dozens of layers.
    yield Row(f"{what}: loss", abs(got[0].item() / expected[0].item() - 1), "relative error", 1e-5)
    yield Row(f"{what}: gradients", relative_rms(got[1], expected[1]), "relative", 1e-3)


def _capture(device: str, function: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
    """A CUDA graph of one call, after three on a stream beside: its replay, and what the call returned.

    Each replay writes the same tensors again. None on a device without graphs.
    """
    if device != "cuda":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def compiled_and_captured(device: str, sizes: str) -> Iterator[Row]:
    """One compiled graph of noise_patchify, autoencoder and patch_loss; and a CUDA graph of them, replayed."""
    size = SIZES[sizes]
    model = _autoencoder(device, size.small)
    images, sigma, seeds = _batch(device, model, 4)
    draws = [seeds, *(derive_seeds(draw, Domain.SCORE, torch.arange(4, device=device)) for draw in (1, 2))]
    eager = functools.partial(_loss, model, images, sigma)
    function = torch.compile(functools.partial(_loss, model), fullgraph=True, backend=size.backend)
    compiled = functools.partial(function, images, sigma)

    expected = [_pass(model, functools.partial(eager, these)) for these in draws]
    for draw, these in enumerate(draws):
        got = _pass(model, functools.partial(compiled, these))
        yield from _agreement(f"compiled, draw {draw}", got, expected[draw])
    distinct = len({loss.item() for loss, _ in expected})
    yield Row("draws of other seeds with an equal loss", len(draws) - distinct, limit=0)

    for name, loss in (("eager", eager), ("compiled", compiled)):
        buffer = seeds.clone()
        captured = _capture(device, functools.partial(_pass, model, functools.partial(loss, buffer)))
        if captured is None:
            return
        replay, result = captured
        for draw, these in enumerate(draws):
            buffer.copy_(these)
            replay()
            yield from _agreement(f"{name}, captured, replayed with draw {draw}", result, expected[draw])


def model_flops(model: Any, loss: Callable[[], Tensor]) -> int:
    """Floating point operations of the matrix products of one forward and backward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from denim.nim.attention import set_attention

    # Plain products, since the backward of fused attention computes products again, and some kernels are not counted.
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
    # In float32, in parts of equal size: the activations of the whole batch may not fit.
    part = min(batch, 16)
    exact = 0.0
    for first in range(0, batch, part):
        some = slice(first, first + part)
        loss = _loss(model, images[some], sigma[some], seeds[some]) * (part / batch)
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
    errors = before.item() / exact - 1, relative_rms(_gradients(model), gradients.double())
    # Every product has inputs of 8 bits; the loss averages over very many of them, the gradient goes through 20 blocks.
    rows = [
        Row("loss in bf16 against float32", abs(errors[0]), "relative error", 0.01),
        Row("gradients in bf16 against float32", errors[1], "relative RMS error", 0.1),
    ]
    del gradients
    memory = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        memory = torch.cuda.max_memory_allocated()
    times = _times(device, step, size.steps)
    after = forward_backward()
    rows.append(Row("loss after the steps over loss before them", after.item() / before.item(), "", 1.0))
    yield from rows
    seconds = statistics.median(times)
    note = f"{size.large}, batch {batch}" + (f" ({size.batch} did not fit)" if batch < size.batch else "")
    yield Row("pretraining step", seconds * 1e3, "ms", note=f"{note}; {_spread(times)}")
    yield Row("pretraining", batch / seconds, "images/s", note=note)
    if device == "cuda":
        yield Row("peak memory", memory / 2**30, "GiB", note=note)
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
        # With the published initialisation all logits are nearly equal, and a wrong draw would not show.
        nn.init.normal_(classifier.head.weight, std=0.05)
    pixels = (_images(device, denoiser, size.images) / 255).permute(0, 3, 1, 2).contiguous()
    seeds = draw_seeds(0, Domain.SCORE, torch.arange(size.images, device=device), draws)
    sigma = torch.tensor(size.levels, device=device)[:, None].expand(-1, size.images)

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            patches = reconstruct(denoiser, pixels, sigma, seeds, classifier=classifier)
            flat = classifier.forward_patches(patches.flatten(0, -3))
        logits: Tensor = flat.unflatten(0, patches.shape[:-2])
        return logits

    with torch.inference_mode():
        logits = run()
        count = logits.shape[:-1].numel()
        for level, draw, image in ((0, 0, 0), (-1, -1, -1), (-1, 0, 0)):
            one = slice(image, None) if image < 0 else slice(image, image + 1)
            alone = classifier(reconstruct(denoiser, pixels[one], sigma[level, one], seeds[draw, one]))[0]
            # In float32 and through pixels, against bf16 and patches: products have inputs of 8 bits. The logits of
            # another draw are 0.24 away, of another image or level further.
            error = relative_rms(logits[level, draw, image], alone.double())
            what = f"logits of level {size.levels[level]:g}, draw {draw % draws}, image {image % size.images}"
            yield Row(f"{what} against float32 alone", error, "relative RMS error", 0.1)

        times = _times(device, run, size.steps)
    note = f"{size.large}, {size.images} images x {len(size.levels)} levels x {draws} draws, bf16; {_spread(times)}"
    yield Row("De^3 sweep", count / statistics.median(times), "noisy images/s", note=note)


def kernel_times(device: str, sizes: str) -> Iterator[Row]:
    """Times of `denim bench kernels` with a cold L2, beside those of the baselines."""
    from denim.benchmarks import kernels as bench

    batch, seen = (1 if sizes == "tiny" else None), set()
    for word, compile in SIZES[sizes].timed:
        for record in bench.run(device, [word], batch, seconds=0.1, compile=compile, cold=device == "cuda"):
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
