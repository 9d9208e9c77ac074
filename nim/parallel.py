"""A model on many devices: DDP or FSDP2, blocks that are compiled, and blocks whose activations are computed again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from denim.nim.adversarial import evaluating
from denim.nim.block import set_lean
from denim.nim.ranks import Ranks
from denim.nim.settings import TrainConfig

__all__ = ["alone", "compiled_blocks", "distribute", "transformer_blocks", "whole", "without_sync"]


# The gradient of the patch embedding, one small tensor, is copied: its memory has the order of patches.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)

# The prediction is a view without the class token. Nothing changes it in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


# Narrowest model whose blocks are lean on a CPU. Products grow with the square of the width, and what is computed again
# with the width: measured, a step of the preset micro (64 wide) takes 1.04 times as long with it, of mini (128) 1.02.
LEAN_WIDTH = 160


def _width(model: nn.Module) -> int:
    """Width of a model's tokens; 0 for one without such blocks."""
    width: int = getattr(getattr(model, "config", None), "embed_dim", 0)
    return width


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, encoder first: what is compiled, sharded and recomputed one at a time."""
    lists = (getattr(model, name, None) for name in ("blocks", "decoder_blocks"))
    return [block for blocks in lists if blocks is not None for block in blocks]


def _compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    for block in blocks:
        # The bound method, and not the module: the hooks of FSDP are called around the compiled code.
        compiled: Callable[..., Any] = torch.compile(block.forward, fullgraph=True, **options)
        block.forward = compiled


# Graphs of one block of a class, of which all have one limit. A width of the tokens has up to six: with and without
# gradients, for the first size of a batch, for any size, and for a batch of one, which torch compiles for itself.
GRAPHS_PER_WIDTH = 6


@contextmanager
def compiled_blocks(models: Iterable[nn.Module], **options: Any) -> Iterator[None]:
    """Inside, the transformer blocks of models are compiled, each of them in one graph; after, they are as before.

    Results agree with those of eager blocks to rounding. The first batch is compiled for its size, the second size for
    all others.

    Args:
        models: of this package, each of them once; those without such blocks stay as they are.
        options: of torch.compile, such as `backend`.
    """
    models = list(models)
    blocks = [block for model in models for block in transformer_blocks(model)]
    if not blocks:
        yield
        return
    before = [vars(block).get("forward") for block in blocks]
    # An encoder and a decoder have two widths.
    limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_WIDTH * 2 * len(models))
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            _compile_blocks(blocks, **options)
            yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def distribute(task: nn.Module, config: TrainConfig, ranks: Ranks, device: torch.device, precision: str) -> nn.Module:
    """The module to call in place of a task, so that gradients are those of all ranks. The task is changed in place.

    The names in the model's state dict stay. Under `config.fsdp` its parameters become DTensors: see `whole`.

    Args:
        task: has the model as attribute `model`, and returns the loss.
        config: the settings `lean` (on a CPU, of models from `LEAN_WIDTH` on), `grad_checkpointing`, `compile` and
            `fsdp`.
        ranks: the processes of the training.
        device: of the model.
        precision: bf16, tf32 or fp32; with bf16, FSDP sends bfloat16 parameters and float32 gradients.

    Raises:
        ValueError: `grad_checkpointing`, or no `lean`, for a model without such blocks.
    """
    model: Any = task.model
    if not config.lean or (device.type == "cpu" and 0 < _width(model) < LEAN_WIDTH):
        set_lean(model, False)
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"{type(model).__name__} has no blocks whose activations could be computed again")
        model.set_grad_checkpointing(True)
    if config.compile if config.compile is not None else device.type == "cuda":
        _compile_blocks(transformer_blocks(model))
    if config.fsdp:
        dtype = torch.bfloat16 if precision == "bf16" else None
        # Inputs keep their dtype: the residual stream is float32 under autocast, as it is without FSDP.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (ranks.world,))
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return task
    if ranks.world > 1:
        devices = [device] if device.type == "cuda" else None
        # Buffers are constants. torch 2.14 has another word for it than torch 2.11.
        words = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in words else "broadcast_buffers"
        options: dict[str, Any] = {name: False, "device_ids": devices, "gradient_as_bucket_view": True}
        return DistributedDataParallel(task, **options)
    return task


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside, a model in training may be called for a few images, without gradients and in evaluation mode.

    All ranks must do so, if FSDP has sharded it. Blocks that are compiled run without: another size of the batch and
    another mode would compile them anew.

    Args:
        model: in training mode, which it gets back.
    """
    try:
        with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # else it would keep all weights until the next backward pass


def without_sync(module: nn.Module, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Inside, gradients are added up on each rank, and exchanged only in the last part of an update.

    Args:
        module: what `distribute` has returned.
        model: the model in it.
        last: whether this is the last part.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        context: AbstractContextManager[None] = module.no_sync()
        return context
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that FSDP has sharded, all of it. All ranks must call this for the same tensor."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor
