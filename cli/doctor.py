"""`denim doctor`."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from denim.kernels import attention_backends
from denim.kernels.attention import load_xformers
from denim.kernels.noise import noise_backend
from denim.nim.data.dali_loader import problem as dali_problem


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken wheel raises anything, and saying what is this command's work
        return f"{type(error).__name__}: {error}"
    return None


def _dali() -> tuple[bool, str]:
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    installed = next((f"{name} {_installed(name)}" for name in names if _installed(name)), None)
    if installed is None:
        return False, "not installed: pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120)"
    problem = _import_problem("nvidia.dali")
    return problem is None, installed if problem is None else f"{installed} does not import: {problem}"


def _triton(has_gpu: bool) -> tuple[bool, str]:
    installed = _installed("triton")
    if installed is None:
        return False, "not installed: kernels run as their torch references"
    problem = _import_problem("triton")
    if problem is not None:
        return False, f"{installed} does not import: {problem}"
    return (
        has_gpu,
        installed if has_gpu else f"{installed}; no GPU, so its kernels run in the interpreter's tests alone",
    )


def _xformers(has_gpu: bool) -> tuple[bool, str]:
    installed = _installed("xformers")
    if installed is None:
        return False, "not installed"
    ops, message = load_xformers()
    if ops is None:
        return False, f"{installed}: {message}"
    note = f"{installed}{'; ' + message if message else ''}"
    return has_gpu, note if has_gpu else f"{note}; no GPU"


def main() -> None:
    """Say what is usable on this machine, and why the rest is not."""
    console = Console()
    has_gpu = torch.cuda.is_available()
    gpu = (
        f"{torch.cuda.get_device_name(0)}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        if has_gpu
        else f"torch sees none (built for CUDA {torch.version.cuda or 'none'}); everything runs on the CPU"
    )
    noise = noise_backend()
    reason = "a C++ compiler is at hand" if noise == "compiled" else "no C++ compiler: slower, the same words"
    if "DENIM_NOISE" in os.environ:
        reason = "as DENIM_NOISE says"
    rows = [
        ("python", True, platform.python_version()),
        ("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("GPU", has_gpu, gpu),
        ("noise on the CPU", True, f"{noise}: {reason}"),
        ("triton", *_triton(has_gpu)),
        ("xformers", *_xformers(has_gpu)),
        ("DALI", *_dali()),
    ]
    missing = dali_problem()
    loaders = "takes dali for files and shards (no rotation, shift, zoom, RandAugment), else torch"
    rows.append(("loader: auto", True, loaders if missing is None else f"takes torch: {missing}"))
    # With gradients, as in training: a backend serves only if its backward pass does too.
    sample = torch.empty(1, 2, 4, 64, device="cuda" if has_gpu else "cpu", dtype=torch.float16 if has_gpu else None)
    refusals = attention_backends(*[sample.requires_grad_()] * 3)
    chosen = next(name for name, reasons in refusals.items() if not reasons)
    rows.append(("attention: auto", True, f"takes {chosen}; inside torch.compile sdpa"))
    rows += [(f"attention: {name}", not reasons, "; ".join(reasons)) for name, reasons in refusals.items()]
    table = Table("", "usable", "", title=f"denim {_installed('denim-vision') or '(not installed)'}", box=None)
    for name, usable, note in rows:
        table.add_row(name, "yes" if usable else "no", note)
    console.print(table)
