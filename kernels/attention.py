"""Attention backends, each of which says why it would not serve a call."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "attention_backends"]


@functools.cache
def load_xformers() -> tuple[ModuleType | None, str]:
    """xformers' operators and what their import logged, or None and the reason. Imported on first use.

    Beside a torch that xformers was not built for, the import logs that its own extension did not load; its attention
    then runs on the kernels inside torch. That message belongs to `denim doctor`, not to every user's terminal.
    """
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("xformers"), Keep()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        ops = importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # a wheel for another CUDA raises any of these
        return None, f"xformers cannot be imported: {error}"
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    # From 2026 on the name can vanish although the package is there.
    if not hasattr(ops, "memory_efficient_attention"):
        return None, "this xformers has no memory_efficient_attention"
    return ops, " ".join(messages)


def _xformers_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    if query.device.type != "cuda":
        return [f"xformers has kernels for CUDA and ROCm alone, tensors are on {query.device.type}"]
    if torch.compiler.is_compiling():
        return ["inside torch.compile SDPA is used: it does not break the graph"]
    ops, message = load_xformers()
    if ops is None:
        return [message]
    inputs = ops.fmha.Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    operators = ops.fmha.ALL_FW_OPS
    refusals = {operator.NAME: operator.not_supported_reasons(inputs) for operator in operators}
    if any(not reasons for reasons in refusals.values()):
        return []
    return [f"{name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    ops, _ = load_xformers()
    assert ops is not None
    out: Tensor = ops.memory_efficient_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def _no_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return []


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1) @ value


# In the order in which "auto" tries them.
_BACKENDS: dict[str, tuple[Callable[..., list[str]], Callable[..., Tensor]]] = {
    "xformers": (_xformers_reasons, _xformers),
    "sdpa": (_no_reasons, F.scaled_dot_product_attention),
    "math": (_no_reasons, _math),
}


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
    """Every backend in the order in which "auto" tries them, with the reasons why it would not serve this call.

    Args:
        query: (B, heads, N, head_dim).
        key: (B, heads, M, head_dim).
        value: (B, heads, M, head_dim).

    Returns:
        {"xformers": [...], "sdpa": [...], "math": [...]}; an empty list means that the backend serves.

    Raises:
        TypeError, ValueError: the tensors fit no backend.
    """
    _check(query, key, value)
    return {name: reasons(query, key, value) for name, (reasons, _) in _BACKENDS.items()}


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
    _check(query, key, value)
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"attention backend must be auto, {', '.join(_BACKENDS)}, got {backend!r}")
    refusals: dict[str, list[str]] = {}
    for name in _BACKENDS if backend == "auto" else (backend,):
        reasons, run = _BACKENDS[name]
        refusals[name] = reasons(query, key, value)
        if not refusals[name]:
            return run(query, key, value)
    inputs = f"{query.dtype} {tuple(query.shape)} on {query.device}"
    raise ValueError(f"attention backend {backend!r} cannot serve {inputs}: {refusals}")
