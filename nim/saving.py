"""Checkpoints of a run: `checkpoints/UPDATE/` in its folder, each whole or absent, and safe to read.

model.safetensors, config.json   the model: `from_pretrained` takes the folder
optimizer/*.safetensors          state of AdamW, one file per rank, readable on any number of ranks
training.json                    where the run was
SHA256SUMS                       of all these files, in the format of sha256sum
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from denim.nim.checkpoint import WEIGHTS_FILE, CheckpointError, Pretrained, first_words, read_safetensors
from denim.nim.files import DamagedFileError, atomic_folder, read_json, remove_folder
from denim.nim.parallel import whole
from denim.nim.ranks import Ranks

__all__ = ["CheckpointWriter", "Progress", "latest_checkpoint", "load_optimizer", "load_progress", "newest_whole"]

TRAINING_FILE = "training.json"
OPTIMIZER_FOLDER = "optimizer"
SUMS_FILE = "SHA256SUMS"  # in the format of sha256sum
# torch warns that it saves for one process alone, which is what is meant there.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
NUMBER = re.compile(r"\d{8,}")


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        update: updates done.
        logged: the update of the last line of metrics.
        losses: sum of the losses since then.
        norms: sum of the norms of the gradients since then.
        loaders: states of the loaders, by rank.
        device_seconds: seconds of training times devices, of all parts of the run.
    """

    update: int = 0
    logged: int = 0
    losses: float = 0.0
    norms: float = 0.0
    loaders: tuple[dict[str, Any], ...] = ()
    device_seconds: float = 0.0


def _checkpoints(run: Path) -> list[Path]:
    found = [path for path in (run / "checkpoints").glob("[0-9]*") if NUMBER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None. It may be damaged."""
    found = _checkpoints(run)
    return found[-1] if found else None


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files are as they were written, or None where there is no checkpoint.

    Damaged ones that are newer get a name that ends in `.damaged`, and are passed over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.

    Warns:
        UserWarning: the newest is damaged.
    """
    broken: list[tuple[Path, str]] = []
    for folder in reversed(_checkpoints(run)):
        problem = _damage(folder)
        if not problem:
            for other, why in broken:
                moved = other.with_name(f"{other.name}.damaged")
                shutil.rmtree(moved, ignore_errors=True)
                other.rename(moved)
                warnings.warn(f"{other} is damaged: {why}; it is now {moved}, and {folder} is used", stacklevel=2)
            return folder
        broken.append((folder, problem))
    if broken:
        words = [f"{folder} is damaged: {why}" for folder, why in broken]
        raise CheckpointError(f"no checkpoint is whole: {first_words(words, '; ')}")
    return None


def load_progress(folder: Path, model: Pretrained) -> Progress:
    """Load a checkpoint's weights into a model, in place, unless something in the checkpoint is not as it must be.

    Raises:
        CheckpointError: the checkpoint is of another architecture, or its training.json is not one.
    """
    progress = _read_progress(folder)
    model.load_weights(read_safetensors(folder / WEIGHTS_FILE), folder, "is of another architecture")
    return progress


def load_optimizer(
    folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], ranks: Ranks
) -> None:
    """Load the state of AdamW and averages from a checkpoint, written on any number of ranks, with or without FSDP.

    The settings of the optimizer stay: they are those of the run, and its scheduler sets the learning rate before every
    step. All ranks must call this.

    Args:
        folder: the checkpoint.
        model: on its device, distributed as it is trained.
        optimizer: of the model's parameters.
        average: moving averages of parameters by name, which are overwritten; {} where there are none.
        ranks: the processes of the training.

    Raises:
        CheckpointError: it holds other names, shapes or dtypes than this optimizer's state, or numbers that are not
            finite. The fused step would read as many numbers as a parameter has, whatever the size of its state.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    state = training_tensors(model, optimizer, average)
    source = folder / OPTIMIZER_FOLDER
    reader = HuggingFaceStorageReader(str(source))
    try:
        with _checkpoint_errors(source):
            found = reader.read_metadata().state_dict_metadata
            if problems := _differences(found, state):
                raise CheckpointError(f"{source} does not fit this run: {first_words(problems, '; ')}")
            reader = HuggingFaceStorageReader(str(source))
            load(state, storage_reader=reader, process_group=ranks.messages, no_dist=ranks.world == 1)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises errors of many types, and none names the file
        raise CheckpointError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
    broken = [name for name, tensor in state.items() if not bool(whole(tensor.isfinite().all()))]
    if broken:
        raise CheckpointError(f"{source} does not fit this run: {first_words(broken)} not finite")


def training_tensors(
    model: Pretrained, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> dict[str, Tensor]:
    """AdamW's state and averages by name, such as `blocks.0.norm1.weight.exp_avg` or `.ema`: no copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}.{entry}": tensor
        for parameter, entries in optimizer.state.items()
        for entry, tensor in entries.items()
    }
    return state | {f"{name}.ema": tensor for name, tensor in average.items()}


def _differences(found: dict[str, Any], state: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in state if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in state]
    for name, entry in found.items():
        like = state.get(name)
        if like is None:
            continue
        if not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is no tensor")
        elif (tuple(entry.size), entry.properties.dtype) != (tuple(like.shape), like.dtype):
            is_now = f"{tuple(entry.size)} {entry.properties.dtype}"
            problems.append(f"{name} is {is_now}, expected {tuple(like.shape)} {like.dtype}")
    return problems


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, by their path in it."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS_FILE:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damage(folder: Path) -> str:
    """What is not as it was written in a checkpoint, "" for nothing."""
    file = folder / SUMS_FILE
    try:
        if not file.exists():
            return f"it has no {SUMS_FILE}"
        found = _sums(folder)
        lines = [line.partition("  ") for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    written = {name: digest for digest, _, name in lines}
    changed = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return f"{first_words(changed)} not as in {SUMS_FILE}" if changed else ""


def _read_progress(folder: Path) -> Progress:
    """The content of training.json, if such a run could have written it."""
    file = folder / TRAINING_FILE
    if not file.exists() and (folder / "training.pt").exists():
        raise CheckpointError(
            f"{folder} is the checkpoint of an earlier version, whose training cannot be resumed; its weights can be "
            f"read, and a new pretraining starts from them with --init {folder}"
        )
    try:
        state = read_json(file)
    except (DamagedFileError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    state.setdefault("device_seconds", 0.0)  # which earlier versions did not count
    kinds = {
        "update": int, "logged": int, "losses": float, "norms": float, "loaders": list, "device_seconds": float,
    }  # fmt: skip
    problems = [
        f"{name} is {str(state.get(name))[:20]!r}" for name, kind in kinds.items() if type(state.get(name)) is not kind
    ]
    if not problems:
        if f"{state['update']:08d}" != folder.name or not 0 <= state["logged"] <= state["update"]:
            problems = [f"update is {state['update']} and logged {state['logged']}"]
        if not (math.isfinite(state["losses"]) and math.isfinite(state["norms"])):
            problems.append(f"losses is {state['losses']} and norms {state['norms']}")
        if not 0 <= state["device_seconds"] < math.inf:
            problems.append(f"device_seconds is {state['device_seconds']}")
        if not all(isinstance(entry, dict) for entry in state["loaders"]):
            problems.append("loaders holds something else than states of loaders")
    if problems:
        raise CheckpointError(f"{file} does not fit this run: {first_words(problems, '; ')}")
    return Progress(**{**{name: state[name] for name in kinds}, "loaders": tuple(state["loaders"])})


@contextlib.contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """The error behind torch's `CheckpointException`, which is no `Exception` and prints every rank's traceback."""
    try:
        yield
    except CheckpointException as error:
        for rank, (failure, _) in error.failures.items():
            if isinstance(failure, Exception):
                raise failure from None
            raise RuntimeError(f"rank {rank} could not work on {folder}: {failure}") from None
        raise RuntimeError(f"{folder}: {error}") from None


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks call each method, in the same order.

    Args:
        run: folder of the run.
        ranks: the processes of the training.
        keep: how many of the newest stay.
        keep_every: updates; a checkpoint whose number is a multiple stays for good. None: no such.
        in_background: write in a thread, from copies in the host's memory, while the training goes on.
        card: what the model's card says of the training; arguments of `Pretrained.generate_model_card`.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        in_background: bool = False,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.ranks = ranks
        self.keep = keep
        self.keep_every = keep_every
        self.in_background = in_background
        self.card = card
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, model: Pretrained, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], progress: Progress
    ) -> None:
        """Write a checkpoint, which appears whole or not at all, and remove old ones.

        In the background, errors of writing are raised by the next call, or by `finish`.

        Args:
            model: whose weights are written.
            optimizer: likewise its state.
            average: moving averages of parameters by name; {} where there are none.
            progress: where the run is.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written then.
            WriteError: the disk is full, or the folder cannot be written to.
        """
        self.finish()
        folder = self.run / "checkpoints" / f"{progress.update:08d}"
        if self.ranks.share(folder.exists()):
            return
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        model.check_weights(weights)
        state = training_tensors(model, optimizer, average)
        if not self.in_background:
            self._write(folder, model, weights, state, progress)
            return
        weights = {name: _host_copy(tensor) for name, tensor in weights.items()} if self.ranks.is_first else {}
        state = {name: _host_copy(tensor) for name, tensor in state.items()}
        self._pending = self._thread.submit(self._write, folder, model, weights, state, progress)

    def remove_old(self) -> None:
        """Remove the checkpoints that do not stay. A process that was killed may have left more."""
        if self.ranks.is_first:
            for old in _checkpoints(self.run)[: -self.keep]:
                if not self.keep_every or int(old.name) % self.keep_every:
                    remove_folder(old)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            WriteError: as `save`, for what was written in the background.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, folder: Path, model: Pretrained, weights: dict[str, Tensor], state: dict[str, Tensor], progress: Progress
    ) -> None:
        group = self.ranks.checkpoints
        with contextlib.ExitStack() as stack:
            staged = stack.enter_context(atomic_folder(folder)) if self.ranks.is_first else None
            staged = self.ranks.share(staged, group)
            shards = staged / OPTIMIZER_FOLDER
            writer = HuggingFaceStorageWriter(str(shards), save_distributed=True)
            with _checkpoint_errors(shards):
                save(state, storage_writer=writer, process_group=group, no_dist=self.ranks.world == 1)
            self.ranks.barrier(group)
            if self.ranks.is_first:
                model.save_pretrained(staged, weights, model_card_kwargs=self.card)
                (staged / TRAINING_FILE).write_text(json.dumps(asdict(progress)) + "\n")
                # Read back from the files: what was written wrongly is found when the run is resumed.
                sums = _sums(staged)
                (staged / SUMS_FILE).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        self.remove_old()
        self.ranks.barrier(group)


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
