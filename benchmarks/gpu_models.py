"""The parts of `benchmarks.gpu_check` that run models: whole steps, and times of kernels.

Each part is a function of the kind of device and the name of the sizes that yields checks and measured numbers. It also
runs on the CPU, as the tests do at "tiny" sizes.
"""

from __future__ import annotations

import functools
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denim import kernels
from denim.benchmarks import baselines
from denim.benchmarks.gpu_operators import relative_rms
from denim.benchmarks.gpu_rows import SIZES, Row, Sizes
from denim.benchmarks.timing import measure, step_seconds
from denim.benchmarks.training import TOLERANCE, Workload, check_loss, flops_per_image, open_step, peak_flops
from denim.kernels import Domain, derive_seeds, draw_seeds
from denim.nim.attention import set_attention
from denim.nim.cuda_graph import WARM_UP
from denim.nim.parallel import compiled_blocks
from denim.nim.pretraining import PretrainTask
from denim.nim.settings import PretrainConfig

__all__ = [
    "attack",
    "attention_times",
    "autoencoder",
    "captured_training",
    "compiled_and_captured",
    "kernel_times",
    "nim_loss",
    "pretraining",
    "random_batch",
    "sweep",
]


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


def autoencoder(device: str, name: str) -> Any:
    from denim.nim.autoencoder import Autoencoder, preset

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(preset(name)).to(device)


def random_batch(device: str, model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, levels and seeds for a model."""
    images = _images(device, model, batch)
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(batch, device=device))
    return images, torch.linspace(20, 130, batch, device=device), seeds


def nim_loss(model: Any, images: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
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
    model = autoencoder(device, size.small)
    images, sigma, seeds = random_batch(device, model, 4)
    draws = [seeds, *(derive_seeds(draw, Domain.SCORE, torch.arange(4, device=device)) for draw in (1, 2))]
    eager = functools.partial(nim_loss, model, images, sigma)
    function = torch.compile(functools.partial(nim_loss, model), fullgraph=True, backend=size.backend)
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


def _free() -> None:
    """Give back the memory of what is no longer used, graphs of torch.compile included."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak(device: str, function: Callable[[], object]) -> float:
    """GiB allocated at once during a call, all that is there before it included; 0 on a CPU."""
    if device != "cuda":
        function()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


def _speed(device: str, name: str, step: Callable[[], object], count: int, unit: str, steps: int) -> Iterator[Row]:
    """The speed and the memory of a step, if it fits into memory."""
    try:
        memory = _peak(device, step)
        times = _times(device, step, steps)
    except torch.OutOfMemoryError:
        yield Row(f"{name}: does not fit into memory", 0, note=f"batch {count}")
        return
    yield Row(name, count / statistics.median(times), unit, note=_spread(times))
    if device == "cuda":
        yield Row(f"{name}: peak memory", memory, "GiB")


def pretraining(device: str, sizes: str) -> Iterator[Row]:
    """A whole pretraining step in bf16: images per second, and the share of the device's arithmetic that is used.

    Denim's step is that of `denim pretrain`, its blocks compiled on a GPU. Beside it are a published one, a good eager
    one and the good one under torch.compile, see `denim.benchmarks.training`.
    """
    size = SIZES[sizes]
    batch = size.batch
    while True:
        began = False
        try:
            for row in _pretraining(device, size, batch):
                began = True
                yield row
            return
        except torch.OutOfMemoryError:
            if began or batch < 2:
                raise
        batch //= 2
        _free()


def _settings(size: Sizes, batch: int, device: str) -> PretrainConfig:
    """Settings of `denim pretrain` in bf16, with a learning rate of 1e-4 from the start."""
    return PretrainConfig(
        out=Path("gpu-check"),  # not touched
        preset=size.large,
        sigma="uniform:20,130",  # those of the gamma distribution need scipy
        batch_size=batch,
        base_lr=1e-4 * 256 / batch,
        warmup_epochs=0,
        device=device,
        precision="bf16",
    )


def _pretraining(device: str, size: Sizes, batch: int) -> Iterator[Row]:
    work = Workload(_settings(size, batch, device), torch.device(device))
    flops = flops_per_image(work)
    yield from _denim_step(device, size, work, flops)
    yield Row("batch", batch, "images", note=size.large + (f"; {size.batch} did not fit" if batch < size.batch else ""))
    yield Row("model arithmetic", flops / 1e9, "GFLOP/image", note="matrix products, forward and backward")
    for name, what in (("eager", "good eager"), ("published", "published eager"), ("compiled", "good, compiled")):
        _free()
        yield from _other_step(device, size, work, name, what, flops)


def captured_training(device: str, sizes: str) -> Iterator[Row]:
    """Updates of `denim pretrain --cuda-graph`: their weights against those of updates that run, and their speed."""
    if device != "cuda":
        yield Row("captured updates: were not run", 0, limit=0, note="CUDA graphs need a GPU")
        return
    size, weights = SIZES[sizes], {}
    settings = _settings(replace(size, large=size.small), 8, device)
    for graph in (False, True):
        # In float32, by attention that sums in a fixed order: the same bits are to be expected.
        config = replace(settings, precision="fp32", compile=False, cuda_graph=graph)
        with closing(open_step("denim", Workload(config, torch.device(device)))) as step:
            set_attention(step.model, "math")
            start = _weights(step.model)
            for _ in range(12):
                step.run()
            weights[graph] = _weights(step.model) - start
    error = relative_rms(weights[True], weights[False].double())
    yield Row("what 12 updates change, captured against run", error, "relative RMS error", 0.01)
    for graph in (False, True):
        _free()
        work = Workload(replace(_settings(size, size.batch, device), cuda_graph=graph), torch.device(device))
        with closing(open_step("denim", work)) as step:
            for _ in range(WARM_UP):
                step.run()
            name = f"pretraining, Denim, {'captured' if graph else 'not captured'}"
            yield from _speed(device, name, step.run, work.batch, "images/s", size.steps)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _denim_step(device: str, size: Sizes, work: Workload, flops: float) -> Iterator[Row]:
    """What `denim pretrain` runs; its first loss and gradients are compared with those in float32."""
    inputs, task = work.inputs(), PretrainTask(work.model(), work.objective, work.config.seed)
    batch = len(inputs["images"])
    # In parts of equal size: the activations of the whole batch may not fit.
    part = min(batch, 16)
    exact = 0.0
    for first in range(0, batch, part):
        loss = task(**{name: tensor[first : first + part] for name, tensor in inputs.items()}) * (part / batch)
        loss.backward()
        exact += loss.item()
    gradients = _gradients(task.model)
    del task
    with closing(open_step("denim", work)) as step:
        before = step.loss(inputs, True)
        before.backward()
        errors = before.item() / exact - 1, relative_rms(_gradients(step.model), gradients.double())
        # Every product has inputs of 8 bits; the loss averages over very many, the gradient goes through 20 blocks.
        yield Row("loss in bf16 against float32", abs(errors[0]), "relative error", TOLERANCE["bf16"])
        yield Row("gradients in bf16 against float32", errors[1], "relative RMS error", 0.1)
        before = before.detach()
        del gradients
        rows = list(_speed(device, "pretraining, Denim", step.run, batch, "images/s", size.steps))
        after = step.loss(inputs, True).detach()
        yield Row("loss after the steps over loss before them", after.item() / before.item(), "", 1.0)
    yield from rows
    if rows[0].unit:
        yield _utilisation(device, "pretraining, Denim", flops * rows[0].value)


def _other_step(device: str, size: Sizes, work: Workload, name: str, what: str, flops: float) -> Iterator[Row]:
    """One of `denim.benchmarks.training.BASELINES`, which must begin with the loss of Denim's step."""
    step = open_step(name, work, backend=size.backend)
    with closing(open_step("denim", work)) as reference:
        error = check_loss(step, reference, work)
    yield Row(f"{what}: first loss against Denim's", error, "relative error", TOLERANCE["bf16"])
    del reference  # and its weights
    batch, steps = work.batch, max(2, size.steps // 2)
    rows = list(_speed(device, f"pretraining, {what}", step.run, batch, "images/s", steps))
    yield from rows
    if rows[0].unit:
        yield _utilisation(device, f"pretraining, {what}", flops * rows[0].value)


def _utilisation(device: str, name: str, achieved: float) -> Row:
    """Operations per second as a share of the device's peak in bf16, where that is known."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = peak_flops(torch.device(device), "bf16")
    if peak is None:
        return Row(f"{name}: achieved", achieved / 1e12, "TFLOP/s", note=f"peak of {where!r} is not in the table")
    note = f"of {peak / 1e12:g} TFLOP/s dense bf16"
    return Row(f"{name}: model-FLOP utilisation", 100 * achieved / peak, "%", note=note)


class _Defense:
    """De^3 of random weights on random images: in one batch, and as a loop over levels and draws."""

    def __init__(self, device: str, size: Sizes, images: int) -> None:
        from denim.defense.de3 import De3
        from denim.nim.classifier import Classifier, ClassifierConfig

        self.device, self.size = device, size
        self.denoiser = autoencoder(device, size.large).eval()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.classifier = Classifier(ClassifierConfig.for_encoder(self.denoiser.config, 1000)).to(device).eval()
            # With the published initialisation all logits are nearly equal, and a wrong draw would not show.
            nn.init.normal_(self.classifier.head.weight, std=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a classifier that was trained on clean images
            self.de3 = De3(self.denoiser, self.classifier, 0.0)
        self.pixels = (_images(device, self.denoiser, images) / 255).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.arange(images, device=device) % 1000
        config = self.denoiser.config
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.mean, config.std))

    def attention(self, backend: str) -> None:
        set_attention(self.denoiser, backend)
        set_attention(self.classifier, backend)

    def batched(self, pixels: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
        """Logits sigma.shape[:-1] + seeds.shape, by the functions that evaluations call."""
        if sigma.dim() == 1:
            return self.de3.draw_logits(pixels, seeds, sigma=sigma)
        levels, most = sigma[:, 0].tolist(), sigma.numel() * len(seeds)
        return self.de3.sweep(pixels, levels, len(seeds), seeds=seeds, max_batch=most)

    def one(self, pixels: Tensor, sigma: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) of one level (B,) and one draw by chains of PyTorch operations, as published."""
        config = self.denoiser.config
        layout = {"patch_size": config.patch_size}
        noisy = baselines.noisy_patches(pixels, sigma, self.mean, self.std, noise=noise, **layout)
        decoded = baselines.decoded_pixels(
            self.denoiser(noisy),
            self.mean,
            self.std,
            img_size=config.img_size,
            statistics="input" if config.target == "norm" else None,
            source=pixels if config.target == "norm" else None,
            **layout,
        )
        logits: Tensor = self.classifier(decoded)
        return logits

    def variants(self) -> Iterator[tuple[str, Callable[..., Tensor], bool, bool]]:
        """What is timed, eager first: a name, `batched` or `one`, whether a loop calls it, and whether in bf16."""
        for name, looped, compiled, bf16, backend in (
            ("Denim in one batch, bf16", False, False, True, "auto"),
            ("looped eager fp32", True, False, False, "math"),
            ("Denim in one batch, compiled bf16", False, True, True, "auto"),
            ("looped compiled bf16", True, True, True, "sdpa"),
        ):
            self.attention(backend)
            if looped:
                one = torch.compile(self.one, fullgraph=True, backend=self.size.backend) if compiled else self.one
                yield name, one, looped, bf16
            else:
                # As `evaluate` does.
                models = (self.denoiser, self.classifier) if compiled else ()
                with compiled_blocks(models, backend=self.size.backend):
                    yield name, self.batched, looped, bf16
            _free()

    def precision(self, bf16: bool) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=bf16)

    def check_chain(self, sigma: Tensor, seeds: Tensor) -> Row:
        """Whether the loop computes what the batch does, on the same noise."""
        noise = kernels.normal_noise(seeds, (*self.pixels.shape[2:], self.pixels.shape[1])).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected = self.batched(self.pixels, sigma, seeds[None])[0].double()
            error = relative_rms(self.one(self.pixels, sigma, noise), expected)
        return Row("logits of the loop against Denim's on the same noise, fp32", error, "relative RMS error", 0.01)


def sweep(device: str, sizes: str) -> Iterator[Row]:
    """De^3 at many levels and draws, in one batch and as a loop: noise, denoise, decode, classify."""
    size, draws = SIZES[sizes], 4
    defense = _Defense(device, size, size.images)
    pixels = defense.pixels
    seeds = draw_seeds(0, Domain.SCORE, torch.arange(size.images, device=device), draws)
    sigma = torch.tensor(size.levels, device=device)[:, None].expand(-1, size.images)
    count = len(size.levels) * draws * size.images
    note = f"{size.large}, {size.images} images x {len(size.levels)} levels x {draws} draws"
    # Levels and seeds as tensors, so that one compiled graph serves the whole loop.
    with torch.no_grad():
        yield defense.check_chain(sigma[-1], seeds[0])
        with defense.precision(True):
            logits = defense.batched(pixels, sigma, seeds)
        for level, draw, image in ((0, 0, 0), (-1, -1, -1), (-1, 0, 0)):
            one = slice(image, None) if image < 0 else slice(image, image + 1)
            alone = defense.batched(pixels[one], sigma[level, one], seeds[draw : draw + 1 or None, one])[0, 0]
            # In float32 against bf16: products have inputs of 8 bits. The logits of another draw are 0.24 away, of
            # another image or level further.
            error = relative_rms(logits[level, draw, image], alone.double())
            what = f"logits of level {size.levels[level]:g}, draw {draw % draws}, image {image % size.images}"
            yield Row(f"{what} against float32 alone", error, "relative RMS error", 0.1)
        yield Row("noisy images of a sweep", count, note=note)

        for name, function, looped, bf16 in defense.variants():

            def run(function: Callable[..., Tensor] = function, looped: bool = looped, bf16: bool = bf16) -> None:
                with defense.precision(bf16):
                    if not looped:
                        function(pixels, sigma, seeds)
                        return
                    for level in sigma:
                        for _ in range(draws):
                            function(pixels, level)

            steps = max(2, size.steps // 4) if looped else size.steps
            yield from _speed(device, f"sweep, {name}", run, count, "noisy images/s", steps)


def attack(device: str, sizes: str) -> Iterator[Row]:
    """A step of PGD on De^3 with the gradient averaged over many draws (EOT): in one batch, and as a loop over them."""
    size = SIZES[sizes]
    defense = _Defense(device, size, size.attacked)
    for parameter in (*defense.denoiser.parameters(), *defense.classifier.parameters()):
        parameter.requires_grad_(False)  # a compiled backward pass would compute their gradients too
    pixels, labels, draws = defense.pixels, defense.labels, size.eot
    sigma = torch.full((size.attacked,), 70.0, device=device)
    seeds = draw_seeds(0, Domain.ATTACK, torch.arange(size.attacked, device=device), draws)
    lengths = {"step_size": torch.tensor(1 / 255, device=device), "epsilon": torch.tensor(4 / 255, device=device)}

    def gradient(function: Callable[..., Tensor], leaf: Tensor, *more: Tensor) -> Tensor:
        """Of the mean loss over the draws of a call, (R, B, K) or (B, K)."""
        logits = function(leaf, sigma, *more)
        expanded = labels.expand(logits.shape[:-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), expanded.flatten(), reduction="sum")
        return torch.autograd.grad(loss / (logits.shape[:-1].numel() / len(labels)), leaf)[0]

    def step(function: Callable[..., Tensor], looped: bool, bf16: bool) -> Tensor:
        leaf = pixels.clone().requires_grad_()
        with defense.precision(bf16):
            if not looped:
                return kernels.attack_step(leaf.detach(), pixels, gradient(function, leaf, seeds), **lengths)
            slope = torch.zeros_like(pixels)
            for _ in range(draws):
                slope += gradient(function, leaf) / draws
        return baselines.linf_step(leaf.detach(), pixels, slope, **lengths)

    yield defense.check_chain(sigma, seeds[0])
    # The sign of a gradient near zero may differ; a wrong gradient has half of the signs of the right one.
    exact, coarse = (step(defense.batched, False, bf16) for bf16 in (False, True))
    differing = float((exact - coarse).abs().gt(1e-4).double().mean())
    yield Row("elements of a step that differ between bf16 and float32", differing, "share", 0.25)
    yield Row("largest change over the length of a step", float((exact - pixels).abs().max()) * 255, "", 1.001)
    count = size.attacked * draws
    yield Row("draws of a step", count, note=f"{size.large}, {size.attacked} images, EOT {draws}")
    for name, function, looped, bf16 in defense.variants():
        call = functools.partial(step, function, looped, bf16)
        steps = max(2, size.steps // 4) if looped else size.steps
        yield from _speed(device, f"attack step, {name}", call, count, "draws/s", steps)


def attention_times(device: str, sizes: str) -> Iterator[Row]:
    """Forward and backward of every attention backend in bf16, in the shape of ViT-B/16."""
    size = SIZES[sizes]
    batch, heads, length, dim = size.attention_timed
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn((batch, length, 3, heads, dim), generator=generator, device=device).to(torch.bfloat16)
    upstream = torch.randn((batch, heads, length, dim), generator=generator, device=device).to(torch.bfloat16)
    # Two products forward and five backward, which computes the scores again, of 2 N^2 d operations each.
    flops = 14 * batch * heads * length * length * dim
    query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
    exact = kernels.attention(query.float(), key.float(), value.float(), backend="math")
    functions: dict[str, Callable[[], object]] = {}
    for backend, reasons in kernels.attention_backends(query, key, value).items():
        if reasons:
            yield Row(f"{backend}: does not serve", 0, limit=0, note="; ".join(reasons))
            continue

        def call(backend: str = backend) -> Tensor:
            leaf = packed.detach().requires_grad_()
            out = kernels.attention(*(part.transpose(1, 2) for part in leaf.unbind(2)), backend=backend)
            return torch.autograd.grad(out, leaf, upstream)[0]

        error = relative_rms(kernels.attention(query, key, value, backend=backend), exact.double())
        limit = 4 * torch.finfo(torch.bfloat16).eps
        yield Row(f"{backend}: output against float32", error, "relative RMS error", limit)
        call()
        functions[backend] = call
    shape = f"({batch}, {heads}, {length}, {dim})"
    for backend, times in measure(functions, torch.device(device), least=size.steps, cold=device == "cuda").items():
        best = min(times.seconds)
        yield Row(f"attention, {backend}", best * 1e3, "ms", note=f"{shape}; {times.method}")
        yield Row(f"attention, {backend}: achieved", flops / best / 1e12, "TFLOP/s")


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
            note = f"{record.shape}; {record.gigabytes_per_second:.0f} GB/s of what has to move at least; "
            note += record.methods["fused"] + "; L2 overwritten" * record.cold
            yield Row(f"{record.case}: time", record.best_seconds["fused"] * 1e3, "ms", note=note)
            yield Row(f"{record.case}: speed of a copy", 100 * record.copy_share, "%")
            for name, ratio in record.ratios.items():
                yield Row(f"{record.case}: {name}", ratio, "times as long")
            for name, reason in record.absent.items():
                if name == "compiled" and compile:
                    yield Row(f"{record.case}: {name} did not run", 1, limit=0, note=reason)
