"""The parts of `benchmarks.gpu_check` that start processes of their own, or run the same twice.

A real pretraining on JPEG files, killed and resumed; the bits of two equal runs; the operators under
`compute-sanitizer`. As a script, `python -m denim.benchmarks.gpu_runs pretrain SETTINGS` pretrains by a JSON file, and
`... operators DEVICE` runs a few cases of every operator once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denim import kernels
from denim.benchmarks.case import Case, passes
from denim.benchmarks.cases import OPERATIONS
from denim.benchmarks.gpu_rows import SIZES, Row
from denim.nim.files import read_json_lines

__all__ = ["pretraining_run", "sanitizer", "two_equal_runs"]

# What pretraining imports beside torch, timm and numpy.
NEEDED = ("rich", "scipy", "tensorboard", "PIL", "safetensors")
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"


def _environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds the same packages as this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | more


def _missing() -> list[str]:
    """The packages that pretraining needs and that cannot be imported."""
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def _made_photos(folder: Path, count: int, side: int) -> None:
    """JPEG files whose colours change every few pixels, which makes them about as large as photos."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for k in range(count):
        colours = np.random.default_rng(k).integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{k:05d}.jpg", quality=90)


def _metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of a run that hold a loss. The last line may be in the middle of being written, and is left out then."""
    return [record for record in read_json_lines(out / "metrics.jsonl") if "loss" in record]


def _weights(out: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def pretraining_run(device: str, sizes: str) -> Iterator[Row]:
    """`denim pretrain` on JPEG files: some epochs by each loader, and once killed, resumed and compared."""
    if missing := _missing():
        yield Row("pretraining was not run", 0, limit=0, note=f"not installed: {', '.join(missing)}")
        return
    with tempfile.TemporaryDirectory(prefix="denim-gpu-check-") as folder, contextlib.ExitStack() as stack:
        yield from _pretraining_run(device, sizes, Path(folder), stack)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _pretraining_run(device: str, sizes: str, folder: Path, stack: contextlib.ExitStack) -> Iterator[Row]:
    from denim.nim.autoencoder import PRESETS

    size = SIZES[sizes]
    config = PRESETS[size.large]
    _made_photos(folder / "photos", size.photos, max(64, config.img_size[0]))
    settings = {
        "data": str(folder / "photos"),
        "preset": size.large,
        "channels": config.channels,
        "batch_size": size.run_batch,
        "epochs": size.updates * size.run_batch // size.photos,
        "warmup_epochs": 0,
        "base_lr": 1e-3,
        "device": device,
        "workers": 2 if device == "cpu" else 8,
        "checkpoint_every": max(1, size.updates // 5),
        "log_every": max(1, size.updates // 10),
    }

    def start(name: str, **changes: Any) -> subprocess.Popen[bytes]:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(settings | {"out": str(folder / name)} | changes))
        command = [sys.executable, "-m", "denim.benchmarks.gpu_runs", "pretrain", str(file)]
        with (folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        stack.callback(_end, process)
        return process

    def end(name: str, process: subprocess.Popen[bytes]) -> Row:
        status = process.wait()
        tail = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:] if status else []
        return Row(f"{name}: exit status", abs(status), limit=0, note=" ".join(tail))

    doomed = start("resumed", loader="torch")
    loaders = ["torch"]
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        yield Row("dali: was not run", 0, limit=0, note=str(error))
    else:
        loaders += ["dali"] * (device == "cuda")
    while doomed.poll() is None and not any((folder / "resumed" / "checkpoints").glob("*")):
        time.sleep(0.05)
    _end(doomed)
    reached = max((record["update"] for record in _metrics(folder / "resumed")), default=0)
    resumed_run = start("resumed", loader="torch", resume=True)
    for loader in loaders:
        row = end(loader, start(loader, loader=loader))
        yield row
        if not row.passed:
            return
        records = _metrics(folder / loader)
        yield Row(f"{loader}: updates missing", size.updates - records[-1]["update"], limit=0)
        yield Row(f"{loader}: last loss over first", records[-1]["loss"] / records[0]["loss"], limit=1.0)
        rate = sorted(record["images_per_second"] for record in records)[len(records) // 2]
        note = f"{size.large}, batch {size.run_batch}, median of {len(records)} intervals; others run beside it"
        yield Row(f"{loader}: through the loader", rate, "images/s", note=note)

    row = end("resumed", resumed_run)
    yield row
    if not row.passed:
        return
    yield Row("resumed: updates that were logged before it was killed", reached, note=f"of {size.updates}")
    whole, resumed = (_metrics(folder / name)[-1]["loss"] for name in ("torch", "resumed"))
    yield Row("resumed: last loss against that of the whole run", abs(resumed / whole - 1), "relative error", 0.02)
    first, second = (_weights(folder / name) for name in ("torch", "resumed"))
    differing = sum(int((first[name] != second[name]).sum()) for name in first)
    # On a GPU attention sums its gradient in no fixed order (see the part of two equal runs).
    limit = 0 if device == "cpu" else None
    yield Row("resumed: weights that differ from those of the whole run", differing, limit=limit)


def _call(case: Case, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of a case that gives the result and the gradients."""
    inputs = case.inputs(device)
    with torch.no_grad():
        result = case.fused(**inputs)
    upstream = case.upstream(inputs, result) if case.leaves else None
    return passes(case.fused, inputs, case.leaves, upstream)


def _unequal(one: Tensor, other: Tensor) -> int:
    return int(((one != other) & ~(one.isnan() & other.isnan())).sum())


def two_equal_runs(device: str, sizes: str) -> Iterator[Row]:
    """What is deterministic: the operators, and training steps with every attention backend, each run twice."""
    size = SIZES[sizes]
    for name, cases in OPERATIONS.items():
        chosen = [case for case in cases if getattr(case, "patch", size.patch_sizes[0]) in size.patch_sizes]
        differing = 0
        for case in chosen:
            call = _call(case, device)
            differing += sum(map(_unequal, call(), call()))
        yield Row(f"{name}: elements that differ between two runs of {len(chosen)} cases", differing, limit=0)
    probe = torch.zeros(2, 3, 17, 16, device=device, dtype=torch.bfloat16)
    for backend, reasons in kernels.attention_backends(probe, probe, probe).items():
        if reasons:
            yield Row(f"three steps with attention {backend}: were not run", 0, limit=0, note="; ".join(reasons))
            continue
        for bf16 in (False, True):
            run = functools.partial(_three_steps, device, size.small, backend, bf16)
            differing = _unequal(run(), run())
            what = f"three steps with attention {backend} in {'bf16' if bf16 else 'fp32'}"
            note = "not deterministic" if differing else "deterministic"
            yield Row(f"{what}: weights that differ between two runs", differing, note=note)


def _three_steps(device: str, preset: str, backend: str, bf16: bool) -> Tensor:
    """All weights of a model after three updates of `denim pretrain` with an attention backend."""
    from denim.benchmarks.training import Workload, open_step
    from denim.nim import PretrainConfig
    from denim.nim.attention import set_attention

    config = PretrainConfig(
        out=Path("gpu-check"),  # not touched
        preset=preset,
        sigma="uniform:20,130",  # those of the gamma distribution need scipy
        batch_size=8,
        base_lr=1e-4 * 256 / 8,
        warmup_epochs=0,
        precision="bf16" if bf16 else "fp32",
        compile=False,  # inside a compiled block attention is SDPA
    )
    with contextlib.closing(open_step("denim", Workload(config, torch.device(device)))) as step:
        set_attention(step.model, backend)
        for _ in range(3):
            step.run()
        return torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])


def sanitizer(device: str, sizes: str) -> Iterator[Row]:
    """Accesses beyond tensors in one pass of the operators, by `compute-sanitizer` of the CUDA toolkit."""
    tool = shutil.which("compute-sanitizer") or SANITIZER
    if not Path(tool).exists():
        yield Row("compute-sanitizer was not run", 0, limit=0, note="not installed; the CUDA toolkit has it")
        return
    # In a block of torch's allocator an access beyond a tensor is within allocated memory, and the tool is silent.
    environment = _environment(DENIM_AUTOTUNE="0", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "denim.benchmarks.gpu_runs", "operators", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = [line.strip() for line in done.stdout.splitlines() if "=====" in line or "Error" in line]
    yield Row("compute-sanitizer, memcheck: exit status", abs(done.returncode), limit=0, note=" ".join(lines[-2:]))


def _pretrain(settings: str) -> None:
    from denim.nim import PretrainConfig, pretrain

    given = json.loads(Path(settings).read_text())
    pretrain(PretrainConfig(**(given | {"out": Path(given["out"])})))


def _operators(device: str) -> None:
    for cases in OPERATIONS.values():
        for case in cases[:6]:
            _call(case, device)()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    {"pretrain": _pretrain, "operators": _operators}[sys.argv[1]](sys.argv[2])
