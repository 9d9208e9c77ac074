"""Which draws a call of a random defense makes, where torch runs a function twice or for many members at once.

A region of activation checkpointing runs once more in the backward pass and repeats its draws. Members of
`torch.func.vmap` draw like the images of one batch.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from denim.kernels.dispatch import register

__all__ = ["member_of_vmap", "number_of_call"]


class _Regions(NamedTuple):
    first: list[Any]
    """Keepers of the regions that run for the first time, innermost first."""
    again: Any | None
    """Keeper of the region that runs once more, if one does."""
    backward: object
    """The backward pass that needs it."""


def _regions() -> _Regions:
    """The checkpointed regions that the caller runs in, found on the stack.

    torch.utils.checkpoint restores torch's own generators before it runs a region once more, and has nothing for
    modules with a generator of their own. A keeper is the object that it keeps for a region as long as that can run
    once more: the `ctx` of a reentrant region, the `_CheckpointFrame` of any other. Where a release of torch has other
    names, no keeper is found, and `number_of_call` refuses to draw in a backward pass.
    """
    first: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is torch.utils.checkpoint.__dict__:
            known, name = frame.f_locals, frame.f_code.co_name
            if name == "backward" and "ctx" in known:
                return _Regions(first, known["ctx"], torch._C._current_graph_task_id())
            if name == "unpack_hook" and "frame" in known:
                return _Regions(first, known["frame"], known["gid"])
            if name == "forward" and "ctx" in known:
                first.append(known["ctx"])
            generator = getattr(known.get("gen"), "gi_frame", None)
            if generator is not None and "new_frame" in generator.f_locals:
                first.append(generator.f_locals["new_frame"])
        frame = frame.f_back
    return _Regions(first, None, None)


def _replayed_number(calls: Tensor) -> tuple[Tensor, bool]:
    """As `number_of_call`, without the error."""
    regions = _regions()
    number, is_new = calls, True
    if regions.again is not None:
        # The calls of a region are told apart by their order, which is the same in every run of it.
        numbers, done = regions.again.__dict__.get("denim_calls", ([], {}))
        place = done.get(regions.backward, 0)
        if place < len(numbers):
            number, is_new = numbers[place], False
            done[regions.backward] = place + 1
    if regions.first:
        number = number.clone()  # the counter itself will change
    for keeper in regions.first:
        keeper.__dict__.setdefault("denim_calls", ([], {}))[0].append(number)
    return number, is_new


def _reference(calls: Tensor) -> Tensor:
    return _replayed_number(calls)[0].clone()


def _fake(calls: Tensor) -> Tensor:
    return calls.new_empty(calls.shape)


# For compiled code, which has no stack of its own: as an operator it is executed on the stack of the call.
_compiled_number = register("number_of_call", _reference, _fake)


def number_of_call(calls: Tensor) -> tuple[Tensor, bool]:
    """Number of a call that draws; a checkpointed region repeats those of its first run.

    Args:
        calls: int64 (), the number of a new call.

    Returns:
        int64 (), perhaps `calls` itself, and whether the call is new, so that the caller has to count it.

    Raises:
        RuntimeError: an eager call in a backward pass, in no region of torch.utils.checkpoint that is known: new draws
            would give the gradient of another function.
    """
    if torch.compiler.is_compiling():
        return _compiled_number(calls), True
    number, is_new = _replayed_number(calls)
    if is_new and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a random defense is called within a backward pass, and its draws of the forward pass are not known: the "
            "gradient would be that of other draws. A call in torch.utils.checkpoint is repeated by itself; elsewhere "
            "hand it the draws: seeds = defense.seeds(...) outside, and inside defense.draw_logits(pixels, seeds)"
        )
    return number, is_new


def _member_reference(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


def _member_fake(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def _member_rule(info: Any, in_dims: tuple[int | None, ...], like: Tensor) -> tuple[Tensor, int | None]:
    outer = member_of_vmap(like.select(in_dims[0] or 0, 0))
    if info.randomness == "same":
        return outer, None
    return torch.arange(info.batch_size, device=like.device) + outer * info.batch_size, 0


member_of_vmap = register("member_of_vmap", _member_reference, _member_fake, vmap=_member_rule)
"""(like) -> int64 (): the number of the member of `torch.func.vmap` that a tensor belongs to; 0 outside, and where vmap
was called with randomness="same". Members of a vmap within a vmap are numbered as if they were one row."""
