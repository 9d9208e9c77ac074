"""Registers an operator of torch once, and decides which of its implementations serves a call.

An operator has a torch reference, which is its kernel on every device, and may have a Triton launcher. On a GPU the
launcher runs where Triton is installed and the launcher's `serves` accepts the arguments; the reference runs
everywhere else. The decision is made inside the operator, on real tensors, so callers and compiled graphs do not
see it. On a CPU, where nothing is decided, a call that nothing watches goes to the reference without torch's
dispatcher, which takes longer than a small operator.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad

__all__ = ["GPU", "gpu_of", "in_forward_mode", "launcher", "register", "triton_on_cpu"]


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

# Subclasses, such as DTensor, are told of operators.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Inside of `triton_on_cpu`.
_triton_serves_cpu = False


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
    tangent: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
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
        tangent: of forward mode; takes the operator's arguments in a tuple, and their tangents (None where there is
            none) in another, and is written in operations of torch. None: forward mode is refused by torch.
        vmap: the rule of `torch.library.register_vmap`. None: the operator runs for one member after the other.

    Returns:
        The operator, to be called with positional arguments.
    """
    definition = torch.library.custom_op(f"denim::{name}", reference, mutates_args=())
    definition.register_fake(fake)
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
    definition.register_vmap(vmap or functools.partial(_one_by_one, definition))
    if triton is not None:
        _OPERATORS[name] = _Operator(definition, reference, triton, part)
        definition.register_kernel("cuda", functools.partial(_dispatch, name, None))
    transformed = _transformable(name, definition, backward, setup_context, tangent, vmap)
    direct = _direct(reference, backward, setup_context)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return definition(*arguments)
        if torch._C._are_functorch_transforms_active() or in_forward_mode():
            return transformed(*arguments)
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if not _is_plain(tensors) or (learns and backward is None):
            return definition(*arguments)
        return direct(*arguments) if learns else reference(*arguments)

    return call


def _is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an operator's reference may be called itself: for tensors of the CPU, where nothing watches operators."""
    if _triton_serves_cpu or torch._C._len_torch_dispatch_stack():
        return False
    # `torch.autograd.grad(..., is_grads_batched=True)` has a kind of vmap that makes no subclass of its tensors.
    batched = torch._C._functorch.is_legacy_batchedtensor
    return all(tensor.is_cpu and type(tensor) in _PLAIN and not batched(tensor) for tensor in tensors)


def _direct(
    reference: Callable[..., Any], backward: Callable[..., Any] | None, setup_context: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The reference with the gradient of an operator, as autograd calls it without torch.library."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = reference(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            assert backward is not None
            return backward(ctx, *gradients)

    apply: Callable[..., Any] = Direct.apply
    return apply


def in_forward_mode() -> bool:
    """Whether derivatives may be carried forward: inside of `torch.func.jvp` or `torch.autograd.forward_ad`."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """The result of an operator under `vmap`, and in which dimension its members lie."""
    members = [
        operator(
            *(
                value.select(dim, member) if isinstance(dim, int) else value
                for value, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for member in range(info.batch_size)
    ]
    if isinstance(members[0], torch.Tensor):
        return torch.stack(members), 0
    results = tuple(torch.stack(parts) for parts in zip(*members, strict=True))
    return results, (0,) * len(results)


def _transformable(
    name: str,
    definition: Callable[..., Any],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., Any] | None,
    tangent: Callable[..., Any] | None,
    vmap: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """An operator that the transformations of `torch.func` and forward mode can differentiate.

    An operator of torch.library serves backward passes of autograd alone: torch.func refuses it, and in forward mode
    its derivative is silently zero (torch 2.14). There it runs inside of an `autograd.Function`.
    """

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return definition(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
            ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
            ctx.save_for_forward(*(inputs[place] for place in ctx.places))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.others)
            if backward is None:
                raise RuntimeError(f"denim::{name} has no derivative")
            return backward(ctx, *gradients)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
            return rule(info, in_dims, *arguments)

    rule = vmap or functools.partial(_one_by_one, Transformed.apply)

    if tangent is not None:

        def jvp(ctx: Any, *tangents: Any) -> Any:
            arguments = list(ctx.others)
            for place, value in zip(ctx.places, ctx.saved_tensors, strict=True):
                arguments[place] = value
            return tangent(tuple(arguments), tangents)

        Transformed.jvp = staticmethod(jvp)  # type: ignore[method-assign]

    apply: Callable[..., Any] = Transformed.apply
    return apply


@contextlib.contextmanager
def triton_on_cpu(gpu: GPU) -> Iterator[None]:
    """Inside, CPU tensors take the way of CUDA tensors in this process: what Triton serves is launched for `gpu`.

    For tests and for benchmarks/machine_code, which execute compiled kernels without a GPU: Triton by itself launches
    on CPU tensors in its interpreter alone.
    """
    global _triton_serves_cpu
    for name, operator in _OPERATORS.items():
        operator.definition.register_kernel("cpu", functools.partial(_dispatch, name, gpu))
    _triton_serves_cpu = True
    try:
        yield
    finally:
        _triton_serves_cpu = False
        for operator in _OPERATORS.values():
            operator.definition.register_kernel("cpu", operator.reference)
