"""Attention with several backends. Each backend answers, for a call, how it runs it or why it does not."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from denim.kernels.dispatch import in_forward_mode

__all__ = ["attention", "attention_backends", "attention_kernel", "check_backend"]


class _Kernel(NamedTuple):
    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


# What runs a call, or the reasons why the backend does not serve it.
Answer = _Kernel | list[str]


def _preload_cuda_runtime() -> None:
    """Load CUDA 12's runtime library, which the extension of PyPI's xformers is linked to.

    torch's wheels for CUDA 13 do not bring it, and not every release of torch loads it from the wheel that does.
    Without it xformers takes itself for a build without CUDA, and refuses every call.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime-cu12") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libcudart.so.12":
            ctypes.CDLL(str(file.locate()))


@functools.cache
def load_xformers() -> tuple[ModuleType | None, str]:
    """`xformers.ops` and what its import logged, or None and the reason. xformers is imported at the first call.

    With a torch that xformers was not built for, the import logs that its own extension did not load; its attention
    then runs on kernels inside torch. `denim doctor` shows that message; other commands do not print it.
    """
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("xformers"), Keep()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        _preload_cuda_runtime()
        ops = importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # wheels for another CUDA raise each of these
        return None, f"xformers cannot be imported: {error}"
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    # Releases from 2026 on may not have this function.
    if not hasattr(ops, "memory_efficient_attention"):
        return None, "this xformers has no memory_efficient_attention"
    return ops, " ".join(messages)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    if query.device.type != "cuda":
        return [f"xformers has kernels for CUDA and ROCm alone, tensors are on {query.device.type}"]
    if torch.compiler.is_compiling():
        return ["inside torch.compile SDPA is used: it does not break the graph"]
    odd = [tensor.shape[-1] for tensor in (query, value) if tensor.shape[-1] % 8]
    if odd and query.dtype in (torch.float16, torch.bfloat16):
        return [f"in half precision xformers takes head dimensions that are multiples of 8, not {odd[0]}"]
    ops, message = load_xformers()
    if ops is None:
        return [message]
    inputs = ops.fmha.Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    refusals = []
    # The forward and backward operators are chosen here, in xformers' own order, and passed to the call, so that the
    # operators that were asked are those that run. xformers' list of all operators also has some that it never selects.
    for name in ("flash3", "flash", "cutlass", "ck"):
        family = getattr(ops.fmha, name, None)
        if family is None:
            continue
        pair = (family.FwOp, family.BwOp)
        asked = pair if backward else pair[:1]
        reasons = [reason for operator in asked for reason in operator.not_supported_reasons(inputs)]
        if not reasons:
            name = " ".join(operator.NAME for operator in asked)
            return _Kernel(f"xformers {name}", functools.partial(_run_xformers, ops, pair))
        refusals.append(f"{family.FwOp.NAME}: {'; '.join(dict.fromkeys(reasons))}")
    return refusals or ["this xformers has none of the kernels flash3, flash, cutlass and ck"]


def _run_xformers(ops: ModuleType, pair: tuple[object, object], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # xformers takes (B, N, heads, head_dim). It reads transposed views of a packed qkv tensor without a copy.
    out: Tensor = ops.memory_efficient_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), op=pair
    )
    return out.transpose(1, 2)


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


# Longest key for which plain products take the place of SDPA on a CPU in bfloat16: all scores are kept for the backward
# pass, at two bytes each.
MAX_SCORES = 1024


def _order(query: Tensor, key: Tensor) -> tuple[str, ...]:
    """The backends in the order in which "auto" tries them.

    On a CPU the backward pass of torch's SDPA in bfloat16 takes two to five times as long as plain products (torch
    2.14, a CPU with avx512_bf16, up to 785 tokens, one thread).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= MAX_SCORES:
        return ("math", "xformers", "sdpa")
    return tuple(_BACKENDS)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Answer:
    if in_forward_mode():
        return ["its fused kernels have no derivative in forward mode (torch 2.14)"]
    return _SDPA


_SDPA, _MATH = _Kernel("sdpa", F.scaled_dot_product_attention), _Kernel("math", _math)
# The order in which "auto" tries them, unless `_order` has another.
_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Answer]] = {
    "xformers": _xformers,
    "sdpa": _sdpa,
    "math": lambda query, key, value: _MATH,
}


def check_backend(backend: str) -> None:
    """Check the name of a backend, "auto" included.

    Raises:
        ValueError: there is none of that name; the message lists the valid ones.
    """
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"attention backend must be auto, {', '.join(_BACKENDS)}, got {backend!r}")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"attention takes (B, heads, N, head_dim) tensors, key and value of one length, got {shapes}")
    if query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must agree in batch, heads and head_dim, got {shapes}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query is {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query is on {query.device}")
    if not query.is_floating_point():
        raise TypeError(f"attention takes floating point tensors, got {query.dtype}")


def attention_backends(query: Tensor, key: Tensor, value: Tensor) -> dict[str, list[str]]:
    """The reasons why each backend would not serve a call, in the order in which "auto" tries the backends.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, head_dim).

    Returns:
        {"xformers": [...], "sdpa": [...], "math": [...]}; an empty list means that the backend serves. "math" comes
        first for bfloat16 on a CPU and up to 1,024 keys: there it is the fastest.

    Raises:
        TypeError, ValueError: the tensors fit no backend.
    """
    _check(query, key, value)
    answers = {name: _BACKENDS[name](query, key, value) for name in _order(query, key)}
    return {name: answer if isinstance(answer, list) else [] for name, answer in answers.items()}


def _choose(query: Tensor, key: Tensor, value: Tensor, backend: str) -> _Kernel:
    _check(query, key, value)
    check_backend(backend)
    refusals: dict[str, list[str]] = {}
    for name in _order(query, key) if backend == "auto" else (backend,):
        answer = _BACKENDS[name](query, key, value)
        if not isinstance(answer, list):
            return answer
        refusals[name] = answer
    inputs = f"{query.dtype} {tuple(query.shape)} on {query.device}"
    raise ValueError(f"attention backend {backend!r} cannot serve {inputs}: {refusals}")


def attention_kernel(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> str:
    """The name of the kernel that `attention` runs for a call, which it does not run.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, head_dim).
        backend: as for `attention`.

    Returns:
        "xformers" with the names of xformers' forward operator and, where a gradient is needed, backward operator
        ("xformers fa2F@2.5.7-pt fa2B@2.5.7-pt"), "sdpa" or "math".

    Raises:
        TypeError, ValueError: as `attention`.
    """
    return _choose(query, key, value, backend).name


def attention(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value, in the layout of torch's scaled_dot_product_attention.

    Args:
        query: (B, heads, N, head_dim); views of a packed qkv tensor are taken without a copy.
        key: (B, heads, M, head_dim).
        value: (B, heads, M, head_dim).
        backend: "auto" (the first that serves), "xformers", "sdpa" or "math".

    Returns:
        (B, heads, N, head_dim) in the dtype of the query. Differentiable.

    Raises:
        TypeError, ValueError: tensors that do not fit together, an unknown backend, or a chosen backend that cannot
            serve this call: the message has its reasons.

    Source: Vaswani et al. 2017, equation 1.
    """
    return _choose(query, key, value, backend).run(query, key, value)
