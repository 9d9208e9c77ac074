"""Registers an operator of torch once, and decides which of its implementations serves a call.

An operator has a torch reference, which is its kernel on every device, and may have a Triton launcher. On a GPU the
launcher runs where Triton is installed and the launcher's `serves` accepts the arguments; the reference runs
everywhere else. The decision is made inside the operator, on real tensors, so callers and compiled graphs do not
see it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

__all__ = ["GPU", "gpu_of", "launcher", "register", "triton_on_cpu"]


class GPU(NamedTuple):
    """What a Triton launcher has to know of a GPU."""

    instructions: str
    """Instruction set of logarithm, sine and cosine: "ptx" (NVIDIA), "gcn" (AMD's CDNA) or "plain" (Triton's own)."""
    warp_size: int
    """Threads of a warp."""


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    """The GPU behind a CUDA or ROCm device. "gcn" is written for CDNA, which is told by its warps of 64 threads."""
    warp_size = int(torch.cuda.get_device_properties(device).warp_size)
    if torch.version.hip is None:
        return GPU("ptx", warp_size)
    return GPU("gcn" if warp_size == 64 else "plain", warp_size)


class _Operator(NamedTuple):
    definition: Any  # torch.library.CustomOpDef, which torch does not export to type checkers
    reference: Callable[..., Any]
    triton: str
    part: str


# By name: every operator that has a Triton launcher.
_OPERATORS: dict[str, _Operator] = {}


@functools.cache
def _triton_module(name: str) -> ModuleType | None:
    # Imported at the first use: a CPU run needs no Triton, and importing Triton looks for a driver.
    return importlib.import_module(f"denim.kernels.{name}") if importlib.util.find_spec("triton") else None


def launcher(name: str) -> tuple[Callable[..., bool], Callable[..., Any]]:
    """`serves` and `launch` of an operator.

    Args:
        name: of an operator with a Triton launcher, without its namespace.

    Returns:
        serves(*arguments): whether `launch` takes these arguments of the operator.
        launch(*arguments, gpu): what the operator returns, computed by Triton kernels on `gpu`.

    Raises:
        KeyError: no operator of this name has a Triton launcher.
        ModuleNotFoundError: Triton is not installed.
    """
    operator = _OPERATORS[name]
    module = _triton_module(operator.triton)
    if module is None:
        raise ModuleNotFoundError("Triton is not installed", name="triton")
    return getattr(module, "serves" + operator.part), getattr(module, "launch" + operator.part)


def _dispatch(name: str, gpu: GPU | None, *arguments: Any) -> Any:
    """The operator's kernel on a GPU: that of its first argument, or the one that is given."""
    operator = _OPERATORS[name]
    if _triton_module(operator.triton) is not None:
        serves, launch = launcher(name)
        if serves(*arguments):
            return launch(*arguments, gpu=gpu or gpu_of(arguments[0].device))
    return operator.reference(*arguments)


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    triton: str | None = None,
    part: str = "",
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `torch.ops.denim.NAME`.

    Args:
        name: of the operator, without its namespace.
        reference: torch implementation; its type hints are the operator's schema, and its first argument is a tensor.
            It mutates nothing, and its results share no memory with its arguments.
        fake: takes the same arguments, and returns tensors of the right shape, dtype, device and strides without data.
        triton: file in kernels/ (without ".py") that has the Triton launcher: `serves`, which takes the operator's
            arguments and answers whether `launch` computes them, and `launch`, which takes them and `gpu`, a `GPU`.
            It is imported at the operator's first call on a GPU. None: the reference serves every device.
        part: of a file with several launchers the suffix of this one: "_backward" for `serves_backward` and
            `launch_backward`.
        backward: gradient formula of `torch.library.register_autograd`. None: not differentiable.
        setup_context: saves what `backward` needs.

    Returns:
        The operator, to be called with positional arguments.
    """
    definition = torch.library.custom_op(f"denim::{name}", reference, mutates_args=())
    definition.register_fake(fake)
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
    if triton is not None:
        _OPERATORS[name] = _Operator(definition, reference, triton, part)
        definition.register_kernel("cuda", functools.partial(_dispatch, name, None))
    return definition


@contextlib.contextmanager
def triton_on_cpu(gpu: GPU) -> Iterator[None]:
    """Inside, CPU tensors take the way of CUDA tensors in this process: what Triton serves is launched for `gpu`.

    For tests and for benchmarks/machine_code, which execute compiled kernels without a GPU: Triton by itself launches
    on CPU tensors in its interpreter alone.
    """
    for name, operator in _OPERATORS.items():
        operator.definition.register_kernel("cpu", functools.partial(_dispatch, name, gpu))
    try:
        yield
    finally:
        for operator in _OPERATORS.values():
            operator.definition.register_kernel("cpu", operator.reference)
