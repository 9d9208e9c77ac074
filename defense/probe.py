"""Hidden randomness: whether a model answers the same question twice alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denim.defense.generators import keyed_generators
from denim.nim.adversarial import evaluating

__all__ = ["Randomness", "declares_random", "probe_randomness"]


@dataclass(frozen=True)
class Randomness:
    """What `probe_randomness` has found.

    Attributes:
        images: number of images that the model was asked about.
        calls: number of times that it was asked.
        differing: number of images whose logits were not the same bits in all calls.
        largest: largest absolute difference of a logit between the first and a later call.
        scale: largest absolute logit of the first call that is finite.
        declared: names of the modules that say of themselves that they are random (an attribute `is_random`, as that
            of `De3`); "" is the model itself.
    """

    images: int
    calls: int
    differing: int
    largest: float
    scale: float
    declared: tuple[str, ...]

    @property
    def is_random(self) -> bool:
        """Whether the model was seen to answer differently, or declares that it may."""
        return bool(self.differing or self.declared)

    def __str__(self) -> str:
        seen = f"{self.differing} of {self.images} images had other logits in one of {self.calls} calls"
        if self.differing:
            seen += f", by up to {self.largest:.3g}"
        if not self.declared:
            return seen
        names = ", ".join(name or "the model itself" for name in self.declared[:5])
        return f"{seen}; declared random: {names}"


def declares_random(part: nn.Module) -> bool:
    """Whether a module says of itself that it draws. One that does not know yet (`is_known`) says nothing."""
    return getattr(part, "is_known", True) and getattr(part, "is_random", False) is True


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards the global generators and the model's buffers are as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with keyed_generators(None):
            yield
    finally:
        for buffer, value in buffers:
            # A change in place is allowed to an inference tensor in inference mode alone.
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(value)


def probe_randomness(model: nn.Module, pixels: Tensor, *, calls: int = 4) -> Randomness:
    """Ask a model about the same images several times, and compare its logits bit by bit.

    Finds dropout that evaluation mode does not turn off, noise from torch's, NumPy's or Python's generators or from the
    module's own, counters that change the answer, and modules that declare `is_random`. It does not find randomness
    that shows on other images or in more calls. On a GPU, kernels with atomic additions differ in the last bits; see
    `largest`.

    The model is put into evaluation mode, and back at the end. Its buffers and the global generators are restored, so a
    call changes nothing but what the model keeps in other attributes.

    Args:
        model: from pixels to logits (B, K).
        pixels: (B, C, H, W) in [0, 1], on the model's device; a few images are enough.
        calls: number of calls, at least 2.

    Raises:
        ValueError: fewer than two calls, or no images.
        RuntimeError: logits of another shape in a later call.
    """
    if calls < 2 or not len(pixels):
        raise ValueError(f"probe_randomness needs at least 2 calls and an image, got {calls} and {len(pixels)} images")
    names = tuple(name for name, part in model.named_modules() if declares_random(part))
    largest, differs = 0.0, torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    with torch.no_grad(), evaluating(model), _undisturbed(model):
        first = model(pixels).clone()
        for _ in range(calls - 1):
            logits = model(pixels)
            if logits.shape != first.shape:
                raise RuntimeError(
                    f"the model gave logits of shape {tuple(first.shape)}, then {tuple(logits.shape)} for the same "
                    f"{len(pixels)} images"
                )
            unequal = (logits != first) & ~(logits.isnan() & first.isnan())
            differs |= unequal.flatten(1).any(dim=1)
            distance = (logits - first).abs()[unequal].nan_to_num(nan=float("inf"))
            largest = max(largest, float(distance.max())) if distance.numel() else largest
    scale = float(first.nan_to_num(0.0, 0.0, 0.0).abs().max()) if first.numel() else 0.0
    return Randomness(len(pixels), calls, int(differs.sum()), largest, scale, names)
