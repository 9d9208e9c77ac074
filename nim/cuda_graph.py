"""The device's work of an update as one CUDA graph: captured once, replayed for every later update.

The host then launches one graph instead of some thousand kernels. A graph repeats what was launched while it was
captured, on the same memory. So what changes between updates has to lie in tensors that stay where they are: inputs are
copied into tensors of the graph's own, and weights, the state of AdamW, learning rates, sums of losses and norms, and
averages are changed in place. A number of the host (an argument of a kernel) would stay what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from denim.nim.settings import TrainConfig

__all__ = ["UpdateGraph", "check_capturable"]

Parts = Sequence[dict[str, Tensor]]
# Updates that run as usual first, on the stream of the capture: they make the optimizer's state, compile and tune
# kernels. DDP needs 11 (torch's notes on CUDA graphs).
WARM_UP, WARM_UP_DDP = 3, 11


def check_capturable(config: TrainConfig, device: torch.device) -> None:
    """Check that `cuda_graph` can be had on a device.

    Raises:
        ValueError: it is asked for on another device than a GPU.
    """
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU, not {device}: leave it out")


def _capture(function: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """A CUDA graph of a call, which it does not run; its replay."""
    graph = torch.cuda.CUDAGraph()
    # The thread that prepares batches goes on allocating and copying meanwhile, on a stream of its own.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


class UpdateGraph:
    """Runs updates: the first ones as usual, the later ones as replays of a graph.

    Args:
        device: that computes.
        warm_up: updates that run as usual.
    """

    def __init__(self, device: torch.device, warm_up: int = WARM_UP) -> None:
        self.device = device
        self.warm_up = warm_up
        self._stream = torch.cuda.Stream(device)
        self._inputs: list[dict[str, Tensor]] = []
        self._replay: Callable[[], None] | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, work goes to the stream of the capture, after what was enqueued before and before what comes after.

        What belongs to a stream for good has to be made here: DDP, and passes before the capture.
        """
        stream, current = self._stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def run(self, update: Callable[[Parts], None], parts: Parts) -> None:
        """Make an update.

        Args:
            update: what the device does in an update with the inputs of its parts; the same function in every call.
            parts: inputs of the parts, on the device, with the same names, shapes and dtypes in every call.

        Raises:
            ValueError: inputs of other names, shapes or dtypes than those that were captured.
        """
        if self.warm_up > 0:
            self.warm_up -= 1
            with self.beside():
                update(parts)
            return
        if self._replay is None:
            self._inputs = [{name: tensor.clone() for name, tensor in part.items()} for part in parts]
            self._replay = _capture(lambda: update(self._inputs), self._stream)
        if (found := _kinds(parts)) != (kept := _kinds(self._inputs)):
            raise ValueError(f"cuda_graph has captured inputs {kept}, and got {found}: leave cuda_graph out")
        for own, part in zip(self._inputs, parts, strict=True):
            for name, tensor in part.items():
                own[name].copy_(tensor, non_blocking=True)
        self._replay()


def _kinds(parts: Parts) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    return [{name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.items()} for part in parts]
