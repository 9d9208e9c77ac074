"""The loader that decodes with NVIDIA DALI, on the CPU or on a GPU. Order, windows and flips stay Denim's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from denim.nim.data.decode import LARGE, DaliTrial, MachineError
from denim.nim.data.loader import Batch, PlannedLoader
from denim.nim.data.processes import processors
from denim.nim.data.sources import EncodedSource, Source
from denim.nim.data.views import DALI_MAGNITUDE, MOST_RESIZED, EvalView, TrainView, View, dali_policy, sample_rng

__all__ = ["DaliLoader", "dali_version", "problem", "reasons"]

QUEUE = 2  # batches that DALI works on at a time
AHEAD = 2  # batches that are read before DALI takes them
BUDGET = 1 << 27  # pixels that DALI decodes at a time: 400 MB; a batch that has more is decoded in parts
READERS = 2  # threads; more get in each other's way where files are small and at hand
CHUNK = 32  # images that one thread reads in one go
# Side of the smallest views that torch resizes on the CPU. A 224 crop of a photo takes it 0.26 ms, DALI 1.75 ms and
# Pillow 1.2 ms; of small views, the calls from Python would take longer than the work.
RESIZED_BY_TORCH = 64
# DALI's RandAugment, in the order in which the samples' generators number them: another order in a later DALI must not
# change what a run that is resumed sees.
OPERATIONS = (
    "translate_x", "translate_y", "shear_x", "shear_y", "rotate", "brightness", "contrast", "color", "sharpness",
    "posterize", "solarize", "equalize", "auto_contrast", "identity",
)  # fmt: skip

_WORD = (1 << 64) - 1


@functools.cache
def problem() -> str | None:
    """Why DALI cannot be used in this environment at all; None if it can. Imports it."""
    try:
        importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as error:
        if error.name in ("nvidia", "nvidia.dali"):
            return "DALI is not installed: pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120)"
        return f"DALI does not import: {error}"
    except Exception as error:  # a broken wheel raises anything
        return f"DALI does not import: {type(error).__name__}: {error}"
    return None


def dali_version() -> str:
    """The version of DALI that is installed.

    Raises:
        ImportError: none is.
    """
    version: str = importlib.import_module("nvidia.dali").__version__
    return version


def reasons(source: Source, view: View, device: torch.device) -> list[str]:
    """Why `DaliLoader` cannot make this view of this source on this device; none means that it can.

    DALI itself, which takes a second to import, is only tried where nothing else stands against it.

    Args:
        source: images.
        view: what is to be made of them.
        device: where batches are wanted.
    """
    found = []
    if not isinstance(source, EncodedSource):
        found.append(f"{source.name} has pixels and no encoded images")
    if not isinstance(view, (TrainView, EvalView)):
        found.append(f"it knows TrainView and EvalView, not {getattr(view, '__name__', type(view).__name__)}")
    if isinstance(view, TrainView):
        if view.degrees or view.translate or view.zoom:
            found.append("random rotation, shift and zoom are made by Pillow (loader 'torch')")
        if view.auto_augment is not None and dali_policy(view.auto_augment) is None:
            found.append(
                "timm's RandAugment is made by Pillow (loader 'torch'); DALI's own, which differs, is asked for by "
                "auto_augment='dali-rand-m9-n2'"
            )
        elif view.auto_augment is not None and source.channels != 3:
            found.append(f"DALI's RandAugment takes images of 3 channels, not {source.channels}")
    if device.type not in ("cpu", "cuda"):
        found.append(f"its batches lie on the CPU or on a CUDA device, not on {device.type}")
    elif device.type == "cuda" and not torch.cuda.is_available():
        found.append("torch finds no CUDA device")
    if not found and (missing := problem()) is not None:
        found.append(missing)
    return found


class _Sample(NamedTuple):
    content: npt.NDArray[np.uint8]
    geometry: tuple[int, ...]
    pixels: int  # that DALI may have to decode


_Read = dict[int, _Sample | OSError]


# A batch as DALI takes it, one entry a sample: encoded images, and what the view does to each.
_Inputs = tuple[list[npt.NDArray[np.uint8]] | npt.NDArray[Any], ...]


@dataclass
class _Ready:
    """A batch that is read, and what was found bad for it.

    Inputs are those of parts of the batch, in their order. Without any the run stops: more is bad than may be, or the
    machine cannot read an image.
    """

    step: int
    chosen: npt.NDArray[np.int64]
    real: npt.NDArray[np.bool_]
    found: dict[int, str]
    inputs: list[_Inputs]
    failure: MachineError | None = None


class DaliLoader(PlannedLoader):
    """Decodes with DALI: of a JPEG only the rows of the window, on a GPU with its hardware where it has any.

    Samples, windows and flips are those of `TorchLoader`. Pixels differ from Pillow's by rounding and, beside sharp
    edges, by clipping, which Pillow does between the two passes of a resize. DALI resizes on a GPU, and views of less
    than 64 pixels everywhere: on photos 0.2 levels of 255 on average, 15 at most. On the CPU torch resizes the others:
    0.03 levels, 15 at most. A sample's pixels depend on its file, its window and the view, and not on batch, rank or
    threads; they differ between the CPU and a GPU.
    In one channel, DALI takes the luma of a JPEG as it is stored, where Pillow computes it from clipped RGB: up to 4
    levels; of other colour files it is 1 level at most, and of grey ones none.
    DALI decodes what any decoder sees the same picture in, which is settled when a data set is indexed (see `Verdict`):
    usual JPEG, PNG and WebP files. Of all others, of images with more than 33 million pixels (one at a time) and of
    those so thin that the whole of them would be huge when it is resized, Pillow makes the view, with the same pixels
    as in `TorchLoader`.
    DALI's RandAugment ("dali-rand-m9-n2", see `TrainView`) has its randomness from the samples' generators too: after
    window and flip, each draws `integers(14, size=n)`, the operations as numbered by `OPERATIONS`, and then
    `integers(2, size=n)`, 1 where an operation that has a sign is negated. There DALI resizes views of every size.

    Where DALI resizes, `Batch.images` is its own memory, without a copy. DALI decodes at most 134 million pixels at a
    time: a batch of large images is made in parts, which changes no pixel.

    **Bad files.** A batch with an image that DALI cannot decode would end the process (see `DaliTrial`). So each file
    is decoded alone before it is first taken into a batch: by `denim data index`, whose word the manifest keeps, or
    else in the first epoch of a loader, which then takes about twice as long. What fails there, or has changed since,
    Pillow decodes; what Pillow cannot decode either, or what has another size than at the start, is bad. Files must not
    be overwritten in place by others of the same length.

    Args:
        workers: threads that decode; 0 takes as many as there are processors for each process of this machine (torchrun
            says how many there are in LOCAL_WORLD_SIZE). The result is the same.
        device: "cpu", or the GPU where the batches are to lie. On a GPU, they are ordered behind torch's stream that is
            current when a batch is asked for.
        others: as for `PlannedLoader`.

    Attributes:
        sound: bool (N,), whether DALI has been seen to decode the file alone.

    Raises:
        ValueError: negative workers, something that DALI cannot do (see `reasons`), and as `PlannedLoader`.
        RuntimeError: while iterating; DALI fails, for want of memory for instance.
    """

    backend = "dali"

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "drop",
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        max_bad: float = 0.01,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self.device = torch.device(device)
        if against := reasons(source, view, self.device):
            raise ValueError(f"DALI cannot serve {source.name}: {'; '.join(against)}")
        super().__init__(
            source, view, batch_size, seed=seed, shuffle=shuffle, last=last, rank=rank, world=world, max_bad=max_bad
        )
        self.workers = workers or max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        assert isinstance(view, (TrainView, EvalView))
        self.view: TrainView | EvalView = view
        self._encoded = cast(EncodedSource, source)
        # What DALI refuses and Pillow does not. Like `sound` no part of the state: a resumed run finds the same.
        self.sound = np.zeros(len(source), np.bool_)
        self._refused: set[int] = set()
        self._large = threading.Lock()
        self._trials: list[DaliTrial] = []
        self._version = dali_version()
        # An epoch takes a pipeline from here and puts it back at its end: building takes as long as some batches.
        self._idle: list[_Pipeline] = []

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        readers = ThreadPoolExecutor(max(READERS, self.workers), "denim-read")
        fed: deque[_Ready] = deque()
        pipeline = self._idle.pop() if self._idle else self._pipeline(self.batch_size, QUEUE)
        try:
            parts: list[Tensor] = []
            for images in pipeline.run(self._feed(epoch, start_step, readers, fed)):
                parts.append(images)
                if len(parts) < len(fed[0].inputs):
                    continue
                batch = fed.popleft()
                self.record(batch.found)
                yield self.gather(torch.cat(parts) if len(parts) > 1 else images, batch.chosen, batch.real)
                parts = []
            if fed:
                if fed[0].failure is not None:
                    raise fed[0].failure
                self.record(fed[0].found)  # raises: it stopped there, with more bad samples than may be
            self._idle.append(pipeline)
        finally:
            readers.shutdown(cancel_futures=True)

    def _feed(self, epoch: int, start_step: int, readers: ThreadPoolExecutor, fed: deque[_Ready]) -> Iterator[_Inputs]:
        """What DALI is handed, batch by batch; each is appended to `fed` before."""
        bad = dict(self.bad)  # also what was found for batches that are not handed out yet
        steps = iter(range(start_step, self.steps_per_epoch))

        def start(count: int) -> Iterator[tuple[int, list[Future[_Read]]]]:
            for step in islice(steps, count):
                indices = self.plan(epoch, step, bad)[0].tolist()
                chunks = [indices[k : k + CHUNK] for k in range(0, len(indices), CHUNK)]
                yield step, [readers.submit(self._read, epoch, chunk) for chunk in chunks]

        ahead = deque(start(AHEAD))
        while ahead:
            step, chunks = ahead.popleft()
            ahead.extend(start(1))
            ready = self._settle(
                epoch, step, {k: sample for chunk in chunks for k, sample in chunk.result().items()}, bad
            )
            fed.append(ready)
            if not ready.inputs:
                return
            yield from ready.inputs

    def _settle(self, epoch: int, step: int, samples: _Read, bad: dict[int, str]) -> _Ready:
        """Batch `step`, given what was read for it ahead; others are read for samples that turn out bad."""
        found: dict[int, str] = {}
        while True:
            chosen, real = self.plan(epoch, step, bad)
            indices = chosen.tolist()
            samples |= self._read(epoch, [index for index in dict.fromkeys(indices) if index not in samples])
            errors = {index: error for index in indices if isinstance(error := samples[index], OSError)}
            machines = [error for error in errors.values() if isinstance(error, MachineError)]
            if machines:
                return _Ready(step, chosen, real, found, [], machines[0])
            failed = {index: str(error) for index, error in errors.items()}
            if not failed:
                parts = _parts([cast(_Sample, samples[index]) for index in indices])
                return _Ready(step, chosen, real, found, [self._inputs(part) for part in parts])
            found |= failed
            bad |= failed
            if self.exceeded(bad):
                return _Ready(step, chosen, real, found, [])

    def _read(self, epoch: int, indices: list[int]) -> _Read:
        """These samples of an epoch, as DALI takes them, or why they cannot be read."""
        read: _Read = {}
        for index, geometry in zip(indices, self._geometry(epoch, indices), strict=True):
            try:
                content = self._for_dali(index)
                if content is None:
                    read[index] = self._by_pillow(epoch, index, geometry)
                else:
                    read[index] = _Sample(content, geometry, self._pixels(index))
            except OSError as error:
                read[index] = error
        return read

    def _for_dali(self, index: int) -> npt.NDArray[np.uint8] | None:
        """The encoded image if DALI is to decode it."""
        length, word = self._encoded.plain_length(index), self._encoded.dali(index)
        refused = word == f"-{self._version}" or index in self._refused
        if length < 0 or refused or self._pixels(index) > LARGE or self._is_thin(index):
            return None
        content = self._encoded.encoded(index)
        if len(content) == length and (word == self._version or self.sound[index] or self._decodes(content)):
            self.sound[index] = True
            return np.frombuffer(content, np.uint8)
        # It has changed, or DALI has no way with it: Pillow tells whether it is bad.
        self._refused.add(index)
        return None

    def _is_thin(self, index: int) -> bool:
        """Whether the whole of it, resized for `EvalView`, would take too much memory."""
        if not isinstance(self.view, EvalView):
            return False
        width, height, *_ = self.view.geometry(*self.source.sizes[index].tolist())
        return width * height > MOST_RESIZED

    def _decodes(self, content: bytes) -> bool:
        trial = self._trials.pop() if self._trials else DaliTrial()
        try:
            same = trial(content)
        except Exception:  # DALI cannot, and it is of no more use; or Pillow cannot, which `read` will tell
            return False
        self._trials.append(trial)
        return same

    def _by_pillow(self, epoch: int, index: int, geometry: tuple[int, ...]) -> _Sample:
        """The view of a sample, made by Pillow as `TorchLoader` makes it, and encoded as PGM or PPM."""
        view, side = self.view, self.view.size
        if isinstance(view, TrainView):
            view = replace(view, auto_augment=None)  # DALI's, which comes after
        # Of large images one at a time is decoded: readers are many.
        with self._large if self._pixels(index) > LARGE else contextlib.nullcontext():
            made = view(self.source.read(index), sample_rng(self.seed, epoch, int(self.source.ids[index])))
        header = f"P{5 if made.shape[2] == 1 else 6} {side} {side} 255\n"
        content = np.frombuffer(header.encode() + made.tobytes(), np.uint8)
        whole = (side, side, 0, 0, 0) if isinstance(view, EvalView) else (0, 0, side, side, 0, *geometry[5:])
        return _Sample(content, whole, side * side)

    def _pixels(self, index: int) -> int:
        width, height = self.source.sizes[index].tolist()
        return int(width) * int(height)

    def _geometry(self, epoch: int, indices: list[int]) -> list[tuple[int, ...]]:
        """What the view does to each image. In the order in which `_Pipeline` takes the numbers."""
        sizes = self.source.sizes[indices].tolist()
        if isinstance(self.view, EvalView):
            resized = (self.view.geometry(width, height) for width, height in sizes)
            return [(height, width, upper, left, 0) for width, height, left, upper in resized]
        # One generator, its key set anew, is what `sample_rng` would make for each sample, ten times as fast.
        rng = sample_rng(self.seed, epoch, 0)
        state = cast(dict[str, Any], rng.bit_generator.state)
        policy = dali_policy(self.view.auto_augment)
        windows: list[tuple[int, ...]] = []
        for (width, height), sample_id in zip(sizes, self.source.ids[indices].tolist(), strict=True):
            state["state"]["key"][1] = sample_id & _WORD
            rng.bit_generator.state = state
            left, upper, w, h, flip = self.view.window(width, height, rng)
            operations: list[int] = []
            if policy is not None:
                operations = [k for high in (len(OPERATIONS), 2) for k in rng.integers(high, size=policy[1]).tolist()]
            windows.append((upper, left, h, w, int(flip), *operations))
        return windows

    def _inputs(self, samples: list[_Sample]) -> _Inputs:
        """In the order of the graph's inputs, see `_Pipeline`."""
        numbers = np.array([sample.geometry for sample in samples], np.int32)
        contents, first, second = [s.content for s in samples], numbers[:, :2], numbers[:, 2:4].copy()
        if isinstance(self.view, EvalView):
            return contents, first.astype(np.float32), second
        operations = np.split(numbers[:, 5:], 2, axis=1) if numbers.shape[1] > 5 else ()
        return contents, first.copy(), second, numbers[:, 4].copy(), *(half.copy() for half in operations)

    def _pipeline(self, batch_size: int, depth: int) -> _Pipeline:
        return _Pipeline(self.view, self.source.channels, self.device, self.workers, batch_size, depth)


def _parts(samples: list[_Sample]) -> list[list[_Sample]]:
    """The samples of a batch, in parts that keep to `BUDGET`."""
    parts: list[list[_Sample]] = []
    left = 0
    for sample in samples:
        if sample.pixels > left:
            parts.append([])
            left = BUDGET
        parts[-1].append(sample)
        left -= sample.pixels
    return parts


class _Pipeline:
    """DALI's graph of a view, and behind it the resize where torch is faster at that.

    Args:
        view: what is to be made of the images.
        channels: 1 or 3.
        device: where the views are to lie.
        threads: that decode.
        batch_size: images at most.
        depth: batches under way.
    """

    def __init__(
        self, view: View, channels: int, device: torch.device, threads: int, batch_size: int, depth: int
    ) -> None:
        dali: Any = importlib.import_module("nvidia.dali")  # its stubs lack much of it
        fn, types = dali.fn, dali.types
        assert isinstance(view, (TrainView, EvalView))
        on_gpu = device.type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu and device.index is None else device
        policy = dali_policy(view.auto_augment) if isinstance(view, TrainView) else None
        resized = not on_gpu and view.size >= RESIZED_BY_TORCH and policy is None
        self._resizer = _Resizer(view, threads) if resized else None
        feed = self._feed = [cast(Iterator[_Inputs], iter(()))]
        options = {"device": "mixed" if on_gpu else "cpu", "output_type": types.GRAY if channels == 1 else types.RGB}
        resize = {"interp_type": types.INTERP_CUBIC, "antialias": True}

        # DALI keeps the function; through this object it would keep itself, and its threads, until a collection.
        def take() -> _Inputs:
            return next(feed[0])

        def inputs(*dtypes: Any) -> Any:
            return fn.external_source(take, num_outputs=len(dtypes), dtype=list(dtypes))

        def graph() -> Any:
            if isinstance(view, EvalView):
                encoded, size, corner = inputs(types.UINT8, types.FLOAT, types.INT32)
                images = fn.decoders.image(encoded, **options)
                if resized:
                    return images, size, corner
                images = fn.resize(images, size=size, **resize)
                return fn.slice(images, start=corner, shape=[view.size] * 2, axes=[0, 1])
            encoded, corner, shape, flip, *operations = inputs(
                types.UINT8, *[types.INT32] * (3 if policy is None else 5)
            )
            images = fn.decoders.image_slice(encoded, corner, shape, axes=[0, 1], **options)
            if resized:
                return images, flip
            images = fn.flip(fn.resize(images, size=[view.size] * 2, **resize), horizontal=flip)
            return images if policy is None else _rand_augment(images, view.size, *policy, *operations)

        self._pipe = dali.pipeline_def(
            graph,
            enable_conditionals=policy is not None,
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=depth,
            exec_dynamic=True,  # with another executor, a batch would be overwritten by the next but one
        )()

    def run(self, feed: Iterator[_Inputs]) -> Iterator[Tensor]:
        """Views, uint8 (B, H, W, C) on the device, of all batches that `feed` has.

        Raises:
            RuntimeError: an image cannot be decoded; batches before its own have been yielded. The pipeline is of no
                more use.
        """
        self._feed[0] = feed
        decoded = self._decoded()
        try:
            yield from decoded if self._resizer is None else self._resizer.run(decoded)
        finally:
            self._feed[0] = iter(())

    def _decoded(self) -> Iterator[Any]:
        self._pipe.reset()
        self._pipe.schedule_run()
        while True:
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            try:
                outputs = self._pipe.outputs(cuda_stream=stream)
            except StopIteration:
                return
            self._pipe.schedule_run()
            yield from_dlpack(outputs[0].as_tensor()) if self._resizer is None else outputs


def _rand_augment(images: Any, side: int, magnitude: int, count: int, operations: Any, signs: Any) -> Any:
    """DALI's RandAugment in its graph, with operations and signs (int32 (count,) a sample) from outside."""
    # An import by a call would be translated with this function, in which DALI reads "if" as a choice for each sample.
    from nvidia.dali.auto_aug import core, rand_augment

    suite = {operation.name: operation for operation in rand_augment.get_rand_augment_suite(use_shape=True)}
    # Recorded, as it does not let itself be silenced: it calls operators of its own by names that it deprecates.
    with warnings.catch_warnings(record=True):
        for k in range(count):
            images = core.select(
                [suite[name] for name in OPERATIONS],
                operations[k],
                data=images,
                magnitude_bin=core.signed_bin(magnitude, random_sign=signs[k]),
                num_magnitude_bins=DALI_MAGNITUDE + 1,
                shape=(side, side),
                fill_value=128,
            )
    return images


class _Resizer:
    """Resizes what DALI has decoded, on the CPU, by torch: for uint8 it has a kernel that is several times as fast.

    Args:
        view: what is to be made of the images.
        threads: that resize, while DALI decodes the next batch.
    """

    def __init__(self, view: TrainView | EvalView, threads: int) -> None:
        self.view, self.threads = view, threads

    def run(self, decoded: Iterator[Any]) -> Iterator[Tensor]:
        """Views, uint8 (B, size, size, C), for each output of the graph; an error of the graph comes in its turn."""
        pool = ThreadPoolExecutor(self.threads, "denim-resize")
        begun: deque[tuple[Tensor, list[Future[None]]]] = deque()

        def finished() -> Tensor:
            views, parts = begun.popleft()
            for part in parts:
                part.result()
            return views

        try:
            while True:
                try:
                    images, *numbers = next(decoded)
                except (StopIteration, RuntimeError) as end:
                    while begun:
                        yield finished()
                    if isinstance(end, StopIteration):
                        return
                    raise
                count, channels = len(images), images[0].shape()[2]
                views = torch.empty(count, self.view.size, self.view.size, channels, dtype=torch.uint8)
                arrays = [np.asarray(values.as_tensor()) for values in numbers]
                parts = [range(first, count, self.threads) for first in range(self.threads)]
                begun.append((views, [pool.submit(self._resize, views, images, arrays, rows) for rows in parts]))
                if len(begun) > 1:
                    yield finished()
        finally:
            pool.shutdown(cancel_futures=True)

    def _resize(self, views: Tensor, images: Any, numbers: list[npt.NDArray[Any]], rows: range) -> None:
        side = self.view.size
        for row in rows:
            image = from_dlpack(images[row]).permute(2, 0, 1)[None]
            if isinstance(self.view, EvalView):
                height, width = (int(length) for length in numbers[0][row])
                upper, left = (int(edge) for edge in numbers[1][row])
                image = _bicubic(image, height, width)[..., upper : upper + side, left : left + side]
            else:
                image = _bicubic(image, side, side)
                image = image.flip(-1) if numbers[0][row] else image
            views[row] = image[0].permute(1, 2, 0)


def _bicubic(image: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
