"""`denim doctor`.

A process of its own looks at the parts of the installation. What a broken wheel does to that process (exceptions of any
kind, a segmentation fault) becomes the row of that part in the table.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Finding = tuple[bool, str]  # usable, and details or the reason why not


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken wheel raises anything
        return f"{type(error).__name__}: {error}"
    return None


def _python() -> Finding:
    return True, platform.python_version()


def _torch() -> Finding:
    import torch

    return True, f"{torch.__version__}, {torch.get_num_threads()} threads"


@functools.cache
def _has_gpu() -> Finding:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch warns where the driver does not fit
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
            return True, f"{torch.cuda.get_device_name(0)}, bf16 {bf16}"
    notes = [
        f"torch sees none (built for CUDA {torch.version.cuda or 'none'})",
        *(str(note.message) for note in caught),
    ]
    return False, f"{'; '.join(notes)}; everything runs on the CPU"


def _noise() -> Finding:
    from denim.kernels.noise import noise_backend

    backend = noise_backend()
    if "DENIM_NOISE" in os.environ:
        return True, f"{backend}: set by DENIM_NOISE"
    return True, f"{backend}: " + (
        "C++ compiler found" if backend == "compiled" else "no C++ compiler, which is slower"
    )


def _triton() -> Finding:
    installed = _installed("triton")
    if installed is None:
        return False, "not installed: the torch references of the kernels run"
    problem = _import_problem("triton")
    if problem is not None:
        return False, f"{installed} does not import: {problem}"
    return (True, installed) if _has_gpu()[0] else (False, f"{installed}; no GPU")


def _xformers(full: bool) -> Finding:
    installed = _installed("xformers")
    if installed is None:
        return False, "not installed"
    if not full and not _has_gpu()[0]:  # its import takes longer than all the rest, and nothing would use it
        return False, f"{installed}; no GPU, so it is not imported (`denim doctor --full` imports it)"
    from denim.kernels.attention import load_xformers

    ops, message = load_xformers()
    if ops is None:
        return False, f"{installed}: {message}"
    details = f"{installed}{'; ' + message if message else ''}"
    return (True, details) if _has_gpu()[0] else (False, f"{details}; no GPU")


@functools.cache
def _dali() -> Finding:
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    installed = next((f"{name} {_installed(name)}" for name in names if _installed(name)), None)
    if installed is None:
        return False, "not installed: pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120)"
    problem = _import_problem("nvidia.dali")
    return problem is None, installed if problem is None else f"{installed} does not import: {problem}"


def _loader() -> Finding:
    if _dali()[0]:
        return True, "takes dali for files and shards (no rotation, shift, zoom, timm's RandAugment), else torch"
    return True, "takes torch: DALI is not usable"


def _attention_sample(half: bool) -> list[torch.Tensor]:
    """Query, key and value with gradients, as in training: a backend serves only if its backward pass does too."""
    import torch

    gpu = _has_gpu()[0]
    low = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported() else torch.float16
    sample = torch.empty(1, 2, 4, 64, device="cuda" if gpu else "cpu", dtype=low if half else torch.float32)
    return [sample.requires_grad_()] * 3


def _attention_kernel(half: bool) -> Finding:
    from denim.kernels import attention_kernel

    note = " (xformers: head dimensions that are multiples of 8)" if half else ""
    return True, f"{attention_kernel(*_attention_sample(half))}; inside torch.compile sdpa{note}"


def _attention_backend(name: str) -> Finding:
    from denim.kernels import attention_backends

    reasons = {half: attention_backends(*_attention_sample(half))[name] for half in (True, False)}
    if reasons[True] == reasons[False]:
        return not reasons[True], "; ".join(reasons[True])
    told = {half: "; ".join(why) or "yes" for half, why in reasons.items()}
    return not all(reasons.values()), f"half precision: {told[True]}; float32: {told[False]}"


def _checks(full: bool) -> dict[str, Callable[[], Finding]]:
    return {
        "python": _python,
        "torch": _torch,
        "GPU": _has_gpu,
        "noise on the CPU": _noise,
        "triton": _triton,
        "xformers": functools.partial(_xformers, full),
        "DALI": _dali,
        "loader: auto": _loader,
        "attention, half precision": functools.partial(_attention_kernel, True),
        "attention, float32": functools.partial(_attention_kernel, False),
        **{f"attention: {name}": functools.partial(_attention_backend, name) for name in ("xformers", "sdpa", "math")},
    }


def _look(full: bool, names: list[str]) -> None:
    """Write one line of JSON, [usable, details], to stdout for every check; everything else goes to stderr."""
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        for name in names:
            try:
                finding = _checks(full)[name]()
            except Exception as error:
                finding = False, f"{type(error).__name__}: {error}"
            results.write(json.dumps(finding) + "\n")
            results.flush()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _findings(full: bool) -> dict[str, Finding]:
    left = list(_checks(full))
    findings: dict[str, Finding] = {}
    while left:
        command = [sys.executable, "-m", "denim.cli.doctor", json.dumps([full, left])]
        done = subprocess.run(command, capture_output=True, errors="backslashreplace")
        for line in done.stdout.splitlines():
            usable, details = json.loads(line)
            findings[left.pop(0)] = (usable, details)
        if left:  # the process ended within this check: another one looks at the rest
            said = done.stderr.strip().splitlines()
            reason = f"the process that tried it ended with {_ending(done.returncode)}{': ' + said[-1] if said else ''}"
            findings[left.pop(0)] = (False, reason)
    return findings


def main(full: bool = False) -> None:
    """Say what is usable on this machine, and why the rest is not.

    Args:
        full: Also import what this machine has no use for (xformers without a GPU) to see whether it is intact.
    """
    from rich.table import Table

    from denim.cli import version
    from denim.nim.text import open_console, printable

    table = Table("", "usable", "", title=f"denim {version()}", box=None)
    for name, (usable, details) in _findings(full).items():
        table.add_row(name, "yes" if usable else "no", printable(details))
    open_console().print(table)


if __name__ == "__main__":
    _look(*json.loads(sys.argv[1]))
