"""Memory and arithmetic of a training step, from the sizes of a model alone: nothing is allocated or run.

The bytes are those of Denim's eager step. What torch.compile makes of a block keeps at most as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from denim.nim.gpus import Gpu

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from denim.nim.autoencoder import AutoencoderConfig
    from denim.nim.classifier import ClassifierConfig
    from denim.nim.ranks import Ranks
    from denim.nim.settings import TrainConfig

__all__ = [
    "Plan",
    "Strategy",
    "exchange_bytes",
    "fitting_micro_batch",
    "least_seconds",
    "make_plan",
    "plan_table",
    "with_fitting_micro_batch",
]

Config = TypeVar("Config", bound="TrainConfig")

# Share of a GPU's free memory that a plan may fill. The rest is for workspaces of libraries, buffers of the exchange
# between devices, and what the allocator cannot use.
USABLE = 0.9
FP32 = 4  # bytes of a number: weights, gradients, the optimizer's two averages and the residual stream


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a step is computed.

    Attributes:
        precision: bf16, tf32 or fp32.
        lean: see `denim.nim.block.set_lean`.
        grad_checkpointing: keep the inputs of blocks alone.
        fsdp: shard weights, gradients and optimizer state over the devices.
        devices: number of devices.
        on_cpu: whether the device is a CPU, where attention in bf16 keeps its scores and losses work in parts.
    """

    precision: str = "bf16"
    lean: bool = True
    grad_checkpointing: bool = False
    fsdp: bool = False
    devices: int = 1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "tf32", "fp32"):
            raise ValueError(f"precision must be bf16, tf32 or fp32, got {self.precision!r}")
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, got {self.devices}")

    @property
    def bytes(self) -> int:
        """Of a number that goes into a product."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def shards(self) -> int:
        """Parts into which weights, gradients and optimizer state are cut."""
        return self.devices if self.fsdp else 1


class _Stack(NamedTuple):
    """Equal transformer blocks, and the tokens of an image in them."""

    depth: int
    width: int
    heads: int
    tokens: int

    @property
    def parameters(self) -> int:
        """Of one block: four products and their biases, two norms."""
        return 12 * self.width**2 + 13 * self.width


class _Product(NamedTuple):
    """A linear layer: rows of an image, and sizes of input and output."""

    rows: int
    inputs: int
    outputs: int
    input_gradient: bool = True


class _Piece(NamedTuple):
    """A part of the backward pass.

    Attributes:
        saved: bytes that the forward pass keeps for it.
        working: bytes that it takes at most beyond what is saved.
        gradients: bytes of gradients that it leaves.
    """

    saved: int
    working: int
    gradients: int


@dataclass(frozen=True)
class _Network:
    """The sizes of a model in one objective.

    Attributes:
        parameters, trainable: numbers.
        stacks: the blocks, in the order of the forward pass.
        products: the linear layers outside of the blocks.
        patches: (rows, size) of the embedding's input.
        outputs: those of the linear layer behind each stack, of every token; 0 where no such layer follows.
        predicted: numbers of an image that the loss compares, and those that the last layer makes; 0 without a decoder.
        masked: patches whose order is kept.
        hidden: whether the loss keeps which patches are hidden.
    """

    parameters: int
    trainable: int
    stacks: tuple[_Stack, ...]
    products: tuple[_Product, ...]
    patches: tuple[int, int]
    outputs: tuple[int, ...]
    predicted: tuple[int, int] = (0, 0)
    masked: int = 0
    hidden: bool = False


def _autoencoder(config: AutoencoderConfig, mask_ratio: float) -> _Network:
    length, size = config.num_patches, config.patch_dim
    visible = length if config.objective == "nim" else int(length * (1 - mask_ratio))
    encoder = _Stack(config.depth, config.embed_dim, config.num_heads, visible + 1)
    decoder = _Stack(config.decoder_depth, config.decoder_embed_dim, config.decoder_num_heads, length + 1)
    wide, narrow = encoder.width, decoder.width
    blocks = encoder.depth * encoder.parameters + decoder.depth * decoder.parameters
    ends = (size + 1) * wide + wide + 2 * wide + (wide + 1) * narrow + 2 * narrow + (narrow + 1) * size
    positions = (length + 1) * (wide + narrow)
    return _Network(
        parameters=blocks + ends + narrow + positions,
        trainable=blocks + ends + (0 if config.objective == "nim" else narrow),
        stacks=(encoder, decoder),
        products=(
            _Product(visible, size, wide, input_gradient=False),
            _Product(visible + 1, wide, narrow),
            _Product(length + 1, narrow, size),
        ),
        patches=(visible, size),
        outputs=(narrow, size),
        predicted=(length * size, (length + 1) * size),
        masked=0 if config.objective == "nim" else length,
        hidden=config.objective == "mae",
    )


def _classifier(config: ClassifierConfig) -> _Network:
    (height, width), channels = config.img_size, len(config.mean)
    size = config.patch_size**2 * channels
    length = height * width // config.patch_size**2
    encoder = _Stack(config.depth, config.embed_dim, config.num_heads, length + 1)
    dim, classes = encoder.width, config.num_classes
    parameters = encoder.depth * encoder.parameters + (size + 1) * dim + (length + 2) * dim + 2 * dim
    parameters += (dim + 1) * classes
    return _Network(
        parameters=parameters,
        trainable=parameters,
        stacks=(encoder,),
        products=(_Product(length, size, dim, input_gradient=False), _Product(1, dim, classes)),
        patches=(length, size),
        outputs=(0,),
    )


def _keeps_scores(stack: _Stack, strategy: Strategy) -> bool:
    """Whether attention is computed by plain products, which keep their scores; see `denim.kernels.attention`."""
    from denim.kernels.attention import MAX_SCORES

    return strategy.on_cpu and strategy.precision == "bf16" and stack.tokens <= MAX_SCORES


def _block_saved(stack: _Stack, batch: int, strategy: Strategy) -> int:
    """Bytes that autograd keeps of one block, its input included."""
    rows, size = batch * stack.tokens, strategy.bytes
    row = rows * stack.width
    saved = 2 * FP32 * row + 4 * size * row  # the inputs of the norms, and that of the GELU
    saved += 4 * size * row  # queries, keys, values and the attention's result
    if _keeps_scores(stack, strategy):
        saved += size * batch * stack.heads * stack.tokens**2
    else:
        saved += FP32 * batch * stack.heads * stack.tokens  # logarithms of the softmax's denominators
    if not strategy.lean:
        saved += 6 * size * row + 2 * 2 * FP32 * rows  # results of norms and GELU, and the norms' moments
    if strategy.precision == "bf16" and not strategy.fsdp:
        saved += 2 * 12 * stack.width**2  # the weights as autocast has cast them
    return saved


def _upstream(row: int, strategy: Strategy) -> int:
    """Bytes of the gradient of a block's result, and of its cast."""
    return FP32 * row + (strategy.bytes * row if strategy.bytes < FP32 else 0)


def _block_working(stack: _Stack, batch: int, strategy: Strategy) -> int:
    """Bytes that the backward pass of one block takes beyond what is saved: at the layer behind the GELU."""
    row, size = batch * stack.tokens * stack.width, strategy.bytes
    # On a GPU the gradients of the GELU's result and of its input; on a CPU the one takes the memory of the other.
    twice = strategy.lean and not strategy.on_cpu
    behind_gelu = _upstream(row, strategy) + (8 if twice else 4) * size * row + 4 * size * stack.width**2
    if not _keeps_scores(stack, strategy):
        return behind_gelu
    # Of the softmax: the gradients of its result and of its input, when the MLP's own tensors are gone.
    scores = 2 * size * batch * stack.heads * stack.tokens**2
    return max(behind_gelu, scores + (FP32 + size) * row - (4 * size + FP32) * row)


def _pieces(network: _Network, batch: int, strategy: Strategy) -> Iterator[_Piece]:
    """The backward pass from its end to its begin: the order of the forward pass."""
    from denim.kernels.patches import CHUNK

    size, bf16 = strategy.bytes, strategy.precision == "bf16"
    casts = 2 if bf16 and not strategy.fsdp else 0
    rows, patch = network.patches
    width = network.stacks[0].width
    extra = 8 * batch * network.masked + batch * network.masked * network.hidden
    yield _Piece(size * batch * rows * patch + extra, 0, FP32 * patch * width)
    for stack, outputs in zip(network.stacks, network.outputs, strict=True):
        row = batch * stack.tokens * stack.width
        whole, working = _block_saved(stack, batch, strategy), _block_working(stack, batch, strategy)
        kept = whole
        if strategy.grad_checkpointing:
            kept = FP32 * row
            # When it is computed again: the gradient of its result, that result, and the GELU's where it is not kept.
            again = _upstream(row, strategy) + (5 if strategy.lean else 1) * size * row
            working = max(working, again) + whole - kept
            if bf16 and not strategy.lean:
                working += casts * 12 * stack.width**2  # measured with torch 2.14: the weights are cast once more
        for _ in range(stack.depth):
            yield _Piece(kept, working, FP32 * stack.parameters)
        if outputs:
            yield _Piece(FP32 * row + 2 * FP32 * batch * stack.tokens, 2 * FP32 * row, 2 * FP32 * stack.width)
            made = size * batch * stack.tokens * outputs
            weight = stack.width * outputs
            yield _Piece(size * row + casts * weight, made + size * row + size * weight, FP32 * weight)
        else:
            # The mean over the tokens, and its norm; the gradient of all tokens.
            yield _Piece(2 * FP32 * batch * stack.width, FP32 * row, 0)
    compared, made = network.predicted
    working = size * batch * compared
    if strategy.on_cpu:
        # Some images at a time: their target, its square, the prediction's error and the clean patches.
        working += 4 * FP32 * compared * min(batch, max(1, CHUNK // max(1, compared)))
    yield _Piece(size * batch * made, working, 0)


@dataclass(frozen=True)
class Plan:
    """One device's part of a training step. Bytes, unless said otherwise.

    Attributes:
        parameters: numbers of the whole model.
        trainable: those that are trained.
        micro_batch: images of a pass.
        weights: of the model, on this device.
        optimizer: AdamW's two averages.
        gradients: of all trained weights.
        saved: what one forward pass keeps for its backward pass.
        peak: the most that one forward and backward pass takes, its gradients included.
        gathered: under FSDP, whole weights and gradients of the blocks in work; else 0.
        total: the most that an update takes.
        flops_per_image: operations of matrix products, forward and backward, by the device; twice the multiplications.
    """

    parameters: int
    trainable: int
    micro_batch: int
    weights: int
    optimizer: int
    gradients: int
    saved: int
    peak: int
    gathered: int
    total: int
    flops_per_image: int


def _network(architecture: AutoencoderConfig | ClassifierConfig, mask_ratio: float) -> _Network:
    from denim.nim.autoencoder import AutoencoderConfig

    if isinstance(architecture, AutoencoderConfig):
        return _autoencoder(architecture, mask_ratio)
    return _classifier(architecture)


def make_plan(
    architecture: AutoencoderConfig | ClassifierConfig,
    micro_batch: int,
    strategy: Strategy,
    *,
    passes: int = 1,
    mask_ratio: float = 0.75,
) -> Plan:
    """What a training step takes on one device.

    Args:
        architecture: of the model; its objective says how many tokens the encoder sees. A classifier pools the mean.
        micro_batch: images of one pass.
        strategy: how the step is computed.
        passes: passes of an update; from the second on all gradients are there.
        mask_ratio: share of hidden patches, for mae and dmae.

    Raises:
        ValueError: a micro-batch or number of passes below 1.
    """
    for name, value in (("micro_batch", micro_batch), ("passes", passes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    network = _network(architecture, mask_ratio)
    pieces = list(_pieces(network, micro_batch, strategy))
    saved = sum(piece.saved for piece in pieces)
    later = FP32 * network.trainable  # gradients that are there at the end
    peak, activations, live, done = later, 0, saved, 0
    for piece in reversed(pieces):
        activations = max(activations, live + piece.working)
        peak = max(peak, live + piece.working + done)
        live -= piece.saved
        done += piece.gradients
    shards = strategy.shards
    gradients = math.ceil(later / shards)
    gathered = 0
    if shards > 1:
        # Of the block in work and of the next one; the weights outside of the blocks stay whole; and the gradients of a
        # block, before they are summed over the devices in float32.
        block = max(stack.parameters for stack in network.stacks)
        outside = network.parameters - sum(stack.depth * stack.parameters for stack in network.stacks)
        gathered = strategy.bytes * (2 * block + outside) + (strategy.bytes + FP32) * block
    weights, optimizer = math.ceil(FP32 * network.parameters / shards), math.ceil(2 * later / shards)
    step = peak if passes == 1 and shards == 1 else activations + gradients
    return Plan(
        parameters=network.parameters,
        trainable=network.trainable,
        micro_batch=micro_batch,
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        saved=saved,
        peak=peak,
        gathered=gathered,
        total=weights + optimizer + step + gathered,
        flops_per_image=_flops(network, strategy),
    )


def _products(network: _Network, strategy: Strategy) -> Iterator[tuple[_Product, int]]:
    """The linear layers, and how many products of their size a pass has: forward, of the weight and of the input."""
    for layer in network.products:
        yield layer, 2 + layer.input_gradient
    for stack in network.stacks:
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            layer = _Product(stack.tokens, inputs * stack.width, outputs * stack.width)
            yield layer, stack.depth * (2 + _forward_runs(strategy))


def _forward_runs(strategy: Strategy) -> int:
    """How often a block is computed in a pass."""
    return 2 if strategy.grad_checkpointing else 1


def _flops(network: _Network, strategy: Strategy) -> int:
    """Operations of the products of an image, forward and backward.

    Where the backward pass of attention computes its scores again, that is not counted.
    """
    linear = sum(2 * layer.rows * layer.inputs * layer.outputs * times for layer, times in _products(network, strategy))
    scores = sum(4 * stack.tokens**2 * stack.width * stack.depth for stack in network.stacks)
    return linear + scores * (_forward_runs(strategy) + 2)


def least_seconds(
    architecture: AutoencoderConfig | ClassifierConfig,
    micro_batch: int,
    strategy: Strategy,
    gpu: Gpu,
    *,
    passes: int = 1,
    mask_ratio: float = 0.75,
) -> float:
    """Seconds below which no update can be on a GPU: a static bound from its data sheet, and no measurement.

    Each matrix product and each attention takes at least the time of its operations, and at least that of reading its
    inputs and writing its result once; AdamW at least that of its reads and writes. All else, and the exchange between
    devices, counts nothing.

    Args:
        architecture: of the model.
        micro_batch: images of one pass on one device.
        strategy: how the step is computed.
        gpu: numbers of its data sheet.
        passes: passes of an update.
        mask_ratio: share of hidden patches, for mae and dmae.

    Source: Williams et al. 2009 (roofline).
    """
    network, size = _network(architecture, mask_ratio), strategy.bytes
    peak = gpu.peak(strategy.precision)

    def bound(flops: float, moved: float) -> float:
        return max(flops / peak, moved / gpu.bandwidth)

    seconds = 0.0
    for layer, times in _products(network, strategy):
        rows = micro_batch * layer.rows
        moved = size * (rows * (layer.inputs + layer.outputs) + layer.inputs * layer.outputs)
        seconds += times * bound(2 * rows * layer.inputs * layer.outputs, moved)
    for stack in network.stacks:
        row = micro_batch * stack.tokens * stack.width
        # Forward: queries, keys and values in, the result out. Backward: those four and the result's gradient in, three
        # gradients out.
        flops = 4 * row * stack.tokens
        forward, backward = bound(flops, 4 * size * row), bound(2 * flops, 8 * size * row)
        seconds += stack.depth * (_forward_runs(strategy) * forward + backward)
    # AdamW reads weight, gradient and two averages, and writes all but the gradient.
    return passes * seconds + 7 * FP32 * network.trainable / strategy.shards / gpu.bandwidth


def exchange_bytes(
    architecture: AutoencoderConfig | ClassifierConfig,
    strategy: Strategy,
    *,
    passes: int = 1,
    mask_ratio: float = 0.75,
) -> int:
    """Bytes that each device sends in an update, and receives, in a ring of all devices.

    A ring sends (n - 1) / n of what it gathers or reduces. DDP reduces float32 gradients and gathers the sums. FSDP
    gathers the weights of a block twice in a pass, before its forward and its backward pass, and those outside of the
    blocks once, in the dtype of products; in the last pass it reduces float32 gradients.

    Args:
        architecture: of the model.
        strategy: how the step is computed.
        passes: passes of an update.
        mask_ratio: share of hidden patches, for mae and dmae.

    Source: Patarasuk and Yuan 2009 (ring all-reduce).
    """
    network, devices = _network(architecture, mask_ratio), strategy.devices
    gradients = FP32 * network.trainable
    whole = 2 * gradients
    if strategy.fsdp:
        blocks = sum(stack.depth * stack.parameters for stack in network.stacks)
        whole = passes * strategy.bytes * (network.parameters + blocks) + gradients
    return math.ceil(whole * (devices - 1) / devices)


def fitting_micro_batch(
    architecture: AutoencoderConfig | ClassifierConfig,
    share: int,
    memory: float,
    strategy: Strategy,
    *,
    mask_ratio: float = 0.75,
    multiple_of: int = 1,
    besides: float = 0.0,
) -> int:
    """The largest divisor of a device's share of a batch whose passes fit into memory.

    Args:
        architecture: of the model.
        share: images of a batch on one device.
        memory: bytes that a training may take there.
        strategy: how the step is computed.
        mask_ratio: share of hidden patches, for mae and dmae.
        multiple_of: what a micro-batch must be a multiple of.
        besides: bytes that are taken beside the model's training.

    Raises:
        ValueError: not even the smallest fits; the message says what it takes.
    """
    least = None
    for micro_batch in (size for size in range(share, 0, -1) if share % size == 0 and size % multiple_of == 0):
        plan = make_plan(architecture, micro_batch, strategy, passes=share // micro_batch, mask_ratio=mask_ratio)
        least = plan.total + besides
        if least <= memory:
            return micro_batch
    if least is None:
        raise ValueError(f"{share} images of a device are no multiple of {multiple_of}")
    more = [
        text
        for text, on in (
            ("grad_checkpointing", strategy.grad_checkpointing),
            ("lean", strategy.lean),
            ("fsdp over several devices", strategy.shards > 1),
        )
        if not on
    ]
    raise ValueError(
        f"a training step takes at least {least / 2**30:.1f} GiB, and {memory / 2**30:.1f} GiB are free"
        + (f": {' or '.join(more)} would take less" if more else "")
    )


def with_fitting_micro_batch(
    config: Config,
    architecture: AutoencoderConfig | ClassifierConfig,
    device: torch.device,
    ranks: Ranks,
    console: Console,
    *,
    mask_ratio: float = 0.75,
    besides: int = 0,
    multiple_of: int = 1,
) -> Config:
    """The settings with a micro-batch that fits into the free memory of every rank's GPU, if a rank's share does not.

    One line says so. Settings that name a micro-batch stay as they are, and so do all on a CPU. All ranks must call
    this.

    Args:
        config: the settings.
        architecture: of the model in training.
        device: of this rank.
        ranks: the processes of the training.
        console: for the line.
        mask_ratio: share of hidden patches, for mae and dmae.
        besides: bytes that other models take on the device, which are not there yet.
        multiple_of: what a micro-batch must be a multiple of.

    Raises:
        ValueError: not even the smallest micro-batch fits, or the batch cannot be cut so.
    """
    import torch

    from denim.nim.precision import resolve_precision

    if device.type != "cuda" or config.micro_batch is not None:
        return config
    share, _ = config.passes(ranks.world)
    free, _ = torch.cuda.mem_get_info(device)
    memory = USABLE * min(ranks.gather(free))
    strategy = Strategy(
        precision=resolve_precision(config.precision, device),
        lean=config.lean,
        grad_checkpointing=config.grad_checkpointing,
        fsdp=config.fsdp,
        devices=ranks.world,
    )
    try:
        micro_batch = fitting_micro_batch(
            architecture,
            share,
            memory,
            strategy,
            mask_ratio=mask_ratio,
            multiple_of=multiple_of,
            besides=besides,
        )
    except ValueError as error:
        raise ValueError(f"{error}; a micro_batch in the settings is tried without this check") from error
    if micro_batch == share:
        return config
    console.print(
        f"{share} images of a device do not fit into {memory / 2**30:.1f} GiB of free memory: {share // micro_batch} "
        f"passes of {micro_batch} each (--micro-batch changes that)",
        markup=False,
        soft_wrap=True,
    )
    return replace(config, micro_batch=micro_batch)


def plan_table(
    architecture: AutoencoderConfig,
    gpu: Gpu,
    memory: float,
    *,
    batch_size: int,
    micro_batch: int | None = None,
    devices: int = 1,
    precision: str = "bf16",
    mask_ratio: float = 0.75,
) -> list[dict[str, Any]]:
    """The plans of all ways to compute a step: kept, lean, and checkpointed, and those with FSDP on several devices.

    Args:
        architecture: of the model.
        gpu: numbers of its data sheet.
        memory: bytes of one device.
        batch_size: images of an update, on all devices together.
        micro_batch: images of one pass on one device; None: as many as fit.
        devices: number of devices.
        precision: bf16, tf32 or fp32.
        mask_ratio: share of hidden patches, for mae and dmae.

    Returns:
        For each way the entries of `Plan`, and "step" (its name), "fits" (whether the total is within the memory),
        "seconds" (see `least_seconds`) and "images_per_second" (of all devices, an upper bound). Where not even one
        image fits, the plan is that of one image.

    Raises:
        ValueError: a batch that cannot be cut so.
    """
    for name, value in (("batch_size", batch_size), ("devices", devices), ("memory", memory)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    share, rest = divmod(batch_size, devices)
    if rest:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the {devices} devices that share it")
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise ValueError(f"a device has {share} images of a batch, no multiple of micro_batch {micro_batch}")
    rows = []
    for fsdp in (False, True)[: 1 if devices == 1 else 2]:
        for name, lean, again in (("--no-lean", False, False), ("", True, False), ("--grad-checkpointing", True, True)):
            strategy = Strategy(precision=precision, lean=lean, grad_checkpointing=again, fsdp=fsdp, devices=devices)
            size = micro_batch
            if size is None:
                try:
                    size = fitting_micro_batch(architecture, share, memory, strategy, mask_ratio=mask_ratio)
                except ValueError:
                    size = 1
            passes = share // size
            plan = make_plan(architecture, size, strategy, passes=passes, mask_ratio=mask_ratio)
            seconds = least_seconds(architecture, size, strategy, gpu, passes=passes, mask_ratio=mask_ratio)
            rows.append(
                {
                    "step": f"{name}{' --fsdp' * fsdp}".strip() or "default",
                    "fits": plan.total <= memory,
                    **asdict(plan),
                    "seconds": seconds,
                    "images_per_second": batch_size / seconds,
                }
            )
    return rows
