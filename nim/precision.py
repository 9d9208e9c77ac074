"""Precision of the networks' arithmetic, by one word: float32, float32 with TF32 products, or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PRECISIONS", "autocast", "check_precision", "precise", "resolve_precision", "tf32_products"]

PRECISIONS = ("auto", "bf16", "tf32", "fp32")


def check_precision(name: str) -> None:
    """Check the name of a precision, "auto" included.

    Raises:
        ValueError: there is none of that name; the message lists the valid ones.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {name!r}")


def resolve_precision(name: str, device: torch.device) -> str:
    """What a precision means on a device: "bf16", "tf32" or "fp32".

    Args:
        name: one of `PRECISIONS`. "auto" is bf16 on a CUDA device that has it, and fp32 elsewhere.
        device: that computes.

    Raises:
        ValueError: an unknown name, or tf32 on a device that has no TF32 (a CPU, or a GPU before Ampere).
    """
    check_precision(name)
    on_cuda = device.type == "cuda"
    if name == "auto":
        return "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "fp32"
    if name == "tf32" and not (on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise ValueError(f"precision tf32 needs an NVIDIA GPU of capability 8.0 or later, not {device}: take fp32")
    return name


def autocast(name: str, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 for a forward pass where the precision is bf16, and to nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(name, device) == "bf16")


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Inside, matrix products and convolutions of float32 on CUDA have TF32 inputs (10 bits) or not; after, as before.

    torch's own defaults differ: convolutions have TF32 inputs, and matrix products do not.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def precise(name: str, device: torch.device) -> Iterator[str]:
    """Inside, networks compute in a precision; after, all settings are as before.

    For evaluation: gradients of what was computed inside are taken outside of autocast (see `autocast`).

    Args:
        name: one of `PRECISIONS`.
        device: that computes.

    Yields:
        What the name means on the device, see `resolve_precision`.
    """
    resolved = resolve_precision(name, device)
    with tf32_products(resolved == "tf32"), autocast(resolved, device):
        yield resolved
